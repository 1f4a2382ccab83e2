"""What local diffusers folders have in common, whatever architecture they hold; `sd3` and `flux` say how they differ.

On the device `meta` a folder opens from its config files alone: nothing of it has values, but every shape, type and count
of parameters is that of the real model.
"""

import copy
import importlib
import inspect
import json
import shutil
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from alignbench import Backbone, UserError, flow
from alignbench.backbone import BackboneSettings, Component
from alignbench.backbones import families
from alignbench.backbones.trust import refuse_code
from alignbench.paths import local_path

ENCODE_BATCH = 64
"""Prompts that the text encoders take at a time."""
CACHED_PROMPTS = 4000
"""Prompts whose embeddings are kept, in the main memory; 17 GB of FLUX.1's."""
UNSUPPORTED = ("shift_terminal", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""Options of a flow-matching schedule that change it in ways we do not follow."""


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
        lora_alpha: float = Field(gt=0)
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
    hollow = True
    PIPELINE: ClassVar[str]
    """Class of the pipeline that the folder must hold."""

    def __init__(self, settings: Settings) -> None:
        _silence()
        self.settings = settings
        self.folder = local_path(settings.path)
        self.index = families.read_index(self.folder)
        refuse_code(self.folder)
        if self.index["_class_name"] != self.PIPELINE:
            raise UserError(f"{self.folder} holds a {self.index['_class_name']}; this backbone opens {self.PIPELINE} folders")
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
        self.mixed = settings.train == "full" and self.dtype != torch.float32
        self.device = settings.torch_device
        self.pipeline = self._open(dict.fromkeys(self._components("text_encoder", "tokenizer")))
        # Its convolutions take half the time so on a CPU; pictures differ by rounding.
        self.pipeline.vae.to(memory_format=torch.channels_last)
        self.call = {**_defaults(type(self.pipeline).__call__), **_own_call(self.folder)}
        self.guidance = self._guidance()
        self.default_steps = int(self.call["num_inference_steps"])
        side, token = self._side(), self.pipeline.vae_scale_factor * self.patch
        self.latent_shape = (self.pipeline.vae.config.latent_channels, *[side // self.pipeline.vae_scale_factor] * 2)
        self.shift = _shift(self.folder, self.pipeline.scheduler.config, (side // token) ** 2)
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

    def _components(self, *kinds: str) -> list[str]:
        return [name for name in self.index if name.startswith(kinds) and not name.startswith("_")]

    def _open(self, given: dict[str, Any]) -> Any:
        """The folder's pipeline on its device, with some components given in place of its own, or None to leave them out."""
        import diffusers

        cls = getattr(diffusers, self.PIPELINE)
        # A component that the folder itself leaves out has to be left out by an argument.
        given = {name: None for name, entry in self.index.items() if entry == [None, None]} | given
        try:
            with warnings.catch_warnings():
                # Its new name, dtype, is not known to older versions.
                warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
                if self.device.type == "meta":
                    pipeline = cls(**{name: self._hollow(name) for name in self._components("") if name not in given}, **given)
                else:
                    options = {"torch_dtype": self.weights_dtype, "local_files_only": True, "use_safetensors": True}
                    pipeline = cls.from_pretrained(self.folder, **options, **given).to(self.device)
        except UserError:
            raise
        except torch.OutOfMemoryError as error:
            raise UserError(f"{self.folder} does not fit into the memory of {self.device}") from error
        except Exception as error:  # whatever a folder that lacks something makes its reader raise
            first = str(error).strip().split("\n", 1)[0]
            raise UserError(f"{self.folder} does not open as a {self.PIPELINE}: {first}") from error
        pipeline.set_progress_bar_config(disable=True)
        for name, module in pipeline.components.items():
            if isinstance(module, nn.Module) and name not in given:
                module.requires_grad_(False).eval()
        return pipeline

    def _hollow(self, name: str) -> Any:
        """A component made from its config; a module of it has shapes and types, but no values."""
        library, class_name = self.index[name]
        if library not in ("diffusers", "transformers"):
            raise UserError(f"{self.folder} has a {name} from {library!r}, which only opens with its weights")
        cls = getattr(importlib.import_module(library), class_name)
        if not issubclass(cls, nn.Module):
            return cls.from_pretrained(self.folder / name, local_files_only=True)
        with torch.device("meta"):
            if library == "diffusers":
                module = cls.from_config(cls.load_config(self.folder / name, local_files_only=True))
            else:
                module = cls(cls.config_class.from_pretrained(self.folder / name, local_files_only=True))
        return module.to("meta", self.weights_dtype)  # buffers that were computed have values

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

    @torch.no_grad()
    def check_image(self, image: np.ndarray) -> None:
        side = self.latent_shape[-1] * self.pipeline.vae_scale_factor
        if image.shape != (side, side, 3):
            raise UserError(f"this model draws {side} x {side} pictures; got one of {image.shape[1]} x {image.shape[0]}")

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
        for name in self._components("text_encoder"):
            if self.index[name] != [None, None]:
                found[name] = Component(self._hollow(name), training=self.settings.keep_text_encoders)
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


def _defaults(call: Any) -> dict[str, Any]:
    """The arguments that a pipeline's call takes where none are given."""
    return {name: p.default for name, p in inspect.signature(call).parameters.items() if p.default is not p.empty}


def _own_call(folder: Path) -> dict[str, Any]:
    """The arguments that a folder of ours asks a plain pipeline's call to be given."""
    file = folder / "alignbench.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))["call"]) if file.is_file() else {}


def _shift(folder: Path, scheduler: Mapping[str, Any], tokens: int) -> float:
    """Of the sigma schedule, for pictures of that many tokens.

    Raises:
        UserError: the folder's scheduler is of another kind.
    """
    if scheduler.get("prediction_type", "flow_prediction") not in ("flow_prediction", None) or "shift" not in scheduler:
        raise UserError(f"{folder}/scheduler is no flow-matching schedule; alignbench needs FlowMatchEulerDiscreteScheduler")
    for option in UNSUPPORTED:
        if scheduler.get(option):
            raise UserError(f"{folder}/scheduler sets {option}, which alignbench does not follow")
    if not scheduler.get("use_dynamic_shifting"):
        return float(scheduler["shift"])
    return flow.dynamic_shift(
        tokens,
        base_shift=scheduler["base_shift"],
        max_shift=scheduler["max_shift"],
        base_tokens=scheduler["base_image_seq_len"],
        max_tokens=scheduler["max_image_seq_len"],
        exponential=scheduler.get("time_shift_type", "exponential") == "exponential",
    )


def _on_cpu(tensor: Tensor) -> Tensor:
    """Its values on the CPU; a tensor without values stays without."""
    return torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor.cpu()
