"""What local diffusers folders have in common, whatever architecture they hold; `sd3` and `flux` say how they differ.

On the device `meta` a folder opens from its config files alone: nothing of it has values, but every shape, type and count
of parameters is that of the real model.
"""

import copy
import inspect
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from alignbench import Backbone, UserError, flow
from alignbench.backbone import BackboneSettings, Component
from alignbench.backbones import families
from alignbench.backbones.components import SCHEDULER, Components
from alignbench.backbones.trust import read_json
from alignbench.files.paths import local_path

ENCODE_BATCH = 64
"""Prompts that the text encoders take at a time."""
CACHED_PROMPTS = 4000
"""Prompts whose embeddings are kept, in the main memory; 17 GB of FLUX.1's."""
FOLLOWED = frozenset(
    {"shift", "use_dynamic_shifting", "time_shift_type", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"}
)
"""Options of a scheduler that alignbench follows; any other that is set would change the steps."""
AS_DEFAULT = {"num_train_timesteps": 1000, "prediction_type": "flow_prediction"}
"""Options that may be set to one value."""
TEXT = ("text_encoder", "tokenizer")
"""Beginnings of the names of components that encode prompts."""
OWN_CALL = "alignbench.json"
"""A file of our own folders: the arguments that a plain pipeline's call is to be given."""
OWN_ARGUMENTS: dict[str, type[int] | type[float]] = {
    **dict.fromkeys(("height", "width", "max_sequence_length", "num_inference_steps"), int),
    "guidance_scale": float,
}


@dataclass(frozen=True)
class Embeddings:
    """What text encoders answer for P prompts: states [P, tokens, width] and pooled [P, width]."""

    states: Tensor
    pooled: Tensor

    def __getitem__(self, rows: Tensor) -> "Embeddings":
        return Embeddings(self.states[rows], self.pooled[rows])


@dataclass(frozen=True)
class Conditioning:
    """Embeddings of the prompts, and of the empty prompt (P = 1) where the model needs it for guidance."""

    prompts: Embeddings
    empty: Embeddings | None


class DiffusersFolder(Backbone):
    """A folder that `DiffusionPipeline.from_pretrained` opens; latents are [C, H, W] whatever the transformer takes."""

    class Settings(BackboneSettings):
        path: str
        """A folder with `model_index.json`."""
        resolution: int | None = Field(None, ge=1)
        """Side of the pictures in pixels; what the model's own call takes where it is null."""
        train: Literal["full", "lora"] = "lora"
        """Train all weights of the transformer, or a LoRA."""
        lora_rank: int = Field(ge=1)
        """Rank of the LoRA, with train=lora."""
        lora_alpha: float = Field(gt=0)
        """Scale of the LoRA: its output is multiplied by alpha / rank."""
        lora_targets: tuple[str, ...]
        """Modules that get a LoRA, by the end of their names."""
        precision: Literal["fp32", "bf16", "fp16"] = "fp32"
        """Of the model's arithmetic and of frozen weights. Weights that are trained, and step maths, are float32 in any case:
        train=full with bf16 is autocast."""
        compile: bool = False
        """torch.compile the transformer: minutes before the first step, fewer seconds a row after it."""
        gradient_checkpointing: bool = False
        """Keep only each block's input for the way back, and compute the rest again; the gradient is the same."""
        keep_text_encoders: bool = False
        """Keep them in memory once all prompts are encoded."""
        decode_batch: int = Field(32, ge=1)
        """Latents that the decoder takes at a time."""

        @model_validator(mode="after")
        def _gradients_do_not_underflow(self) -> Self:
            if self.train == "full" and self.precision == "fp16":
                raise ValueError("train=full takes precision fp32 or bf16: small gradients underflow in fp16")
            return self

    settings: Settings
    supports_meta_device = True
    PIPELINE: ClassVar[str]
    """Class of the pipeline that the folder must hold."""
    MODELS: ClassVar[Mapping[str, str]]
    """Component with weights -> library.Class that opens it; the transformer, the vae and the text encoders in their order."""
    OPTIONAL: ClassVar[frozenset[str]] = frozenset()
    """Components that the pipeline does without."""

    def __init__(self, settings: Settings) -> None:
        _silence()
        self.settings = settings
        self.folder = local_path(settings.path)
        index = families.read_index(self.folder)
        if index["_class_name"] != self.PIPELINE:
            raise UserError(f"{self.folder} holds a {index['_class_name']}; this backbone opens {self.PIPELINE} folders")
        self.parts = Components(self.folder, index, self.MODELS, self.OPTIONAL)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
        self.mixed = settings.train == "full" and self.dtype != torch.float32
        self.device = settings.torch_device
        schedule = _schedule(self.folder)
        texts = [name for name, cls in self.parts.classes.items() if name.startswith(TEXT) and cls]
        self.pipeline = self._open(dict.fromkeys(texts))
        if self.device.type == "meta" and not self.parts.empty:
            for name in (n for n in texts if n.startswith("tokenizer")):
                self.parts.open(name, self.dtype)  # so that a folder that opens here opens in a run, too
        # Its convolutions take half the time so on a CPU; pictures differ by rounding.
        self.pipeline.vae.to(memory_format=torch.channels_last)
        self.call = _call(type(self.pipeline).__call__, self.folder)
        self.guidance = self._guidance()
        self.default_steps = int(self.call["num_inference_steps"])
        side, token = self._side(), self.pipeline.vae_scale_factor * self.patch
        self.latent_shape = (self.pipeline.vae.config.latent_channels, *[side // self.pipeline.vae_scale_factor] * 2)
        self.shift = _shift(schedule, (side // token) ** 2)
        transformer = self.pipeline.transformer
        self._base: nn.Module | None = None
        if settings.train == "full":
            self._base = copy.deepcopy(transformer)
            transformer.requires_grad_(True)
        else:
            self._add_lora(transformer)
        if settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if settings.compile:
            self._compile(*filter(None, (transformer, self._base)))
        self._active: nn.Module = transformer
        self._text: Any = None
        self._encoded: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    @abstractmethod
    def patch(self) -> int:
        """Latents along the side of one of the transformer's tokens."""

    @property
    @abstractmethod
    def text_tokens(self) -> int:
        """Tokens of a prompt's states, told without encoding one."""

    @abstractmethod
    def embed(self, pipeline: Any, prompts: list[str]) -> Embeddings:
        """What the text encoders of `pipeline` answer."""

    def _guidance(self) -> float:
        return self.settings.guidance or float(self.call["guidance_scale"])

    # ------------------------------------------------------------------------------------------------ opening

    def _open(self, given: dict[str, Any]) -> Any:
        """The folder's pipeline on its device, with some components given in place of its own, or None to leave them out."""
        import diffusers

        opener = self.parts.open_on_meta if self.device.type == "meta" else self.parts.open
        own = {name: opener(name, self.weights_dtype) for name, cls in self.parts.classes.items() if name not in given and cls}
        absent = dict.fromkeys(name for name, cls in self.parts.classes.items() if name not in given and not cls)
        try:
            pipeline = getattr(diffusers, self.PIPELINE)(**own, **absent, **given).to(self.device)
        except torch.OutOfMemoryError as error:
            raise UserError(f"{self.folder} does not fit into the memory of {self.device}") from error
        pipeline.set_progress_bar_config(disable=True)
        for module in own.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        return pipeline

    def _side(self) -> int:
        """Of a picture, in pixels."""
        scale = self.pipeline.vae_scale_factor
        wanted = self.settings.resolution or self.call["height"] or self.pipeline.default_sample_size * scale
        side, token = int(wanted), scale * self.patch
        if side % token:
            raise UserError(f"{self.folder} draws pictures whose side is a multiple of {token} pixels; resolution is {side}")
        return side

    def _add_lora(self, transformer: Any) -> None:
        from peft import LoraConfig

        s = self.settings
        names = [f".{name}" for name, _ in transformer.named_modules()]
        for target in s.lora_targets:
            if not any(name.endswith(f".{target}") for name in names):
                raise UserError(f"lora_targets: the name of no module of {self.folder}/transformer ends in {target!r}")
        with torch.device("meta") if self.device.type == "meta" else nullcontext():
            transformer.add_adapter(
                LoraConfig(
                    r=s.lora_rank,
                    lora_alpha=s.lora_alpha,
                    init_lora_weights="gaussian",
                    target_modules=list(s.lora_targets),
                )
            )
        for parameter in self.parameters():
            parameter.data = parameter.data.float()

    # ------------------------------------------------------------------------------------------------ prompts

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encodes all prompts and lets go of the text encoders; more than can be kept are encoded when they are asked for."""
        if self.settings.keep_text_encoders or len(set(prompts)) > CACHED_PROMPTS:
            return
        self._encode(prompts)
        self._text = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        self._encode(prompts)
        return Conditioning(self._embeddings(prompts), self._embeddings([""]) if self.needs_empty_prompt else None)

    @property
    def needs_empty_prompt(self) -> bool:
        """Whether guidance compares with the answer for the empty prompt."""
        return False

    def _embeddings(self, prompts: Sequence[str]) -> Embeddings:
        states, pooled = zip(*(self._encoded[p] for p in prompts), strict=True)
        return Embeddings(torch.stack(states).to(self.device), torch.stack(pooled).to(self.device))

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> None:
        """Makes sure that the embeddings of these prompts are at hand."""
        wanted = dict.fromkeys([*prompts, ""] if self.needs_empty_prompt else prompts)
        new = [p for p in wanted if p not in self._encoded]
        others = [p for p in self._encoded if p not in wanted]
        for prompt in others[: max(0, len(self._encoded) + len(new) - CACHED_PROMPTS)]:
            del self._encoded[prompt]
        for i in range(0, len(new), ENCODE_BATCH):
            part = new[i : i + ENCODE_BATCH]
            found = self._shapes(len(part)) if self.device.type == "meta" else self.embed(self._text_pipeline(), part)
            rows = zip(_on_cpu(found.states), _on_cpu(found.pooled), strict=True)
            self._encoded.update(zip(part, rows, strict=True))

    def _shapes(self, prompts: int) -> Embeddings:
        config = self.pipeline.transformer.config
        states = torch.empty(prompts, self.text_tokens, config.joint_attention_dim, device="meta", dtype=self.dtype)
        return Embeddings(states, states.new_empty(prompts, config.pooled_projection_dim))

    def _text_pipeline(self) -> Any:
        if self._text is None:
            self._text = self._open({"transformer": self.pipeline.transformer, "vae": None})
        return self._text

    # ------------------------------------------------------------------------------------------------ the model

    @property
    def weights_dtype(self) -> torch.dtype:
        """In which the folder is opened."""
        return torch.float32 if self.mixed else self.dtype

    def ask(self, **inputs: Any) -> Tensor:
        """What the transformer answers, float32: the policy, or within `reference` the base model."""
        mixed = self.mixed and self.device.type != "meta"
        with torch.autocast(self.device.type, self.dtype) if mixed else nullcontext():
            answer: Tensor = self._active(**inputs, return_dict=False)[0]
        return answer.float()

    def _compile(self, *transformers: nn.Module) -> None:
        if self.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            raise UserError("compile=true needs a C++ compiler (g++ or clang++) on a CPU; install one or leave it out")
        for transformer in transformers:
            transformer.compile(dynamic=True)  # in place, so that names of parameters stay; batches differ step by step

    def sigmas(self, steps: int) -> Tensor:
        return flow.sigmas(steps, self.shift)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        vae = self.pipeline.vae
        pictures = []
        for part in latents.split(self.settings.decode_batch):
            scaled = part / vae.config.scaling_factor + vae.config.shift_factor
            decoded = vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float()
            pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            pictures.append(_on_cpu(pixels.permute(0, 2, 3, 1)).numpy())
        return np.concatenate(pictures)

    def check_image(self, image: np.ndarray) -> None:
        side = self.latent_shape[-1] * self.pipeline.vae_scale_factor
        if image.shape != (side, side, 3):
            raise UserError(f"this model draws {side} x {side} pictures; got one of {image.shape[1]} x {image.shape[0]}")

    @torch.no_grad()
    def encode_images(self, images: Sequence[np.ndarray]) -> Tensor:
        for image in images:
            self.check_image(image)
        vae = self.pipeline.vae
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1
        parts = [vae.encode(part.to(vae.dtype)).latent_dist.mode().float() for part in pixels.split(self.settings.decode_batch)]
        return (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor

    def trainable(self) -> nn.Module:
        module: nn.Module = self.pipeline.transformer
        return module

    def components(self) -> dict[str, Component]:
        found = {name: Component(getattr(self.pipeline, name)) for name in ("transformer", "vae")}
        if self._base is not None:
            found["reference"] = Component(self._base)
        for name in (n for n, cls in self.parts.classes.items() if n.startswith("text_encoder") and cls):
            found[name] = Component(
                self.parts.open_on_meta(name, self.weights_dtype), training=self.settings.keep_text_encoders
            )
        return found

    def shard(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for transformer in filter(None, (self.pipeline.transformer, self._base)):
            adapter = {p for p in transformer.parameters() if p.requires_grad} if self.settings.train == "lora" else set()
            blocks = [block for child in transformer.children() if isinstance(child, nn.ModuleList) for block in child]
            for module in (*blocks, transformer):
                # Also after the last call of many, so that parameters are always this process's part.
                fully_shard(module, ignored_params=adapter, reshard_after_forward=True)
                module.set_gradient_divide_factor(1.0)  # gradients are added up, see `engine`
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other way

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self._base is not None:
            policy, self._active = self._active, self._base
            try:
                yield
            finally:
                self._active = policy
        else:
            transformer = self.pipeline.transformer
            transformer.disable_adapters()
            try:
                yield
            finally:
                transformer.enable_adapters()


def _silence() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()  # their bars would stand between ours
        logging.set_verbosity_error()


def _call(call: Any, folder: Path) -> dict[str, Any]:
    """The arguments that a pipeline's call takes where none are given; a folder of ours may ask for others.

    Raises:
        UserError: the folder asks for what the call does not take.
    """
    defaults = {name: p.default for name, p in inspect.signature(call).parameters.items() if p.default is not p.empty}
    if not (folder / OWN_CALL).is_file():
        return defaults
    own = read_json(folder, OWN_CALL).get("call")
    if not isinstance(own, dict):
        raise UserError(f"{folder / OWN_CALL} has no call")
    for name, value in own.items():
        if name not in OWN_ARGUMENTS or type(value) not in (int, float) or not isfinite(value) or value <= 0:
            raise UserError(f"{folder / OWN_CALL}: call.{name} must be a positive number, one of {', '.join(OWN_ARGUMENTS)}")
    return {**defaults, **{name: OWN_ARGUMENTS[name](value) for name, value in own.items()}}


def _schedule(folder: Path) -> dict[str, Any]:
    """The options of a folder's scheduler, those that its file leaves out as diffusers has them.

    Raises:
        UserError: it steps in another way than alignbench.
    """
    import diffusers

    place = "scheduler/scheduler_config.json"
    options = read_json(folder, place)
    if (cls := options.get("_class_name", SCHEDULER)) != SCHEDULER:
        raise UserError(f"{folder}/{place} is of a {cls}; alignbench steps as {SCHEDULER} does")
    for key, value in options.items():
        if not (key.startswith("_") or key in FOLLOWED or not value or (key in AS_DEFAULT and value == AS_DEFAULT[key])):
            raise UserError(f"{folder}/{place} sets {key}, which alignbench does not follow: it steps as a plain {SCHEDULER}")
    defaults = inspect.signature(getattr(diffusers, SCHEDULER).__init__).parameters
    found = {key: options.get(key, defaults[key].default) for key in FOLLOWED}
    dynamic = found["use_dynamic_shifting"]
    if not isinstance(dynamic, bool):
        raise UserError(f"{folder}/{place}: use_dynamic_shifting must be true or false, got {dynamic!r}")
    if dynamic and found["time_shift_type"] not in ("exponential", "linear"):
        raise UserError(f"{folder}/{place}: time_shift_type must be exponential or linear, got {found['time_shift_type']!r}")
    for key in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len") if dynamic else ("shift",):
        positive = not dynamic or key.endswith("seq_len") or found["time_shift_type"] == "linear"
        if type(found[key]) not in (int, float) or not isfinite(found[key]) or (positive and found[key] <= 0):
            raise UserError(f"{folder}/{place}: {key} must be a {'positive ' * positive}number, got {found[key]!r}")
    if dynamic and found["base_image_seq_len"] == found["max_image_seq_len"]:
        raise UserError(f"{folder}/{place}: max_image_seq_len must differ from base_image_seq_len")
    return found


def _shift(schedule: Mapping[str, Any], tokens: int) -> float:
    """Of the sigma schedule, for pictures of that many tokens."""
    if not schedule["use_dynamic_shifting"]:
        return float(schedule["shift"])
    return flow.dynamic_shift(
        tokens,
        base_shift=schedule["base_shift"],
        max_shift=schedule["max_shift"],
        base_tokens=schedule["base_image_seq_len"],
        max_tokens=schedule["max_image_seq_len"],
        exponential=schedule["time_shift_type"] == "exponential",
    )


def _on_cpu(tensor: Tensor) -> Tensor:
    """Its values on the CPU; a tensor without values stays without."""
    return torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor.cpu()
