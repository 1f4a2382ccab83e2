"""The common base of backbones that open a local diffusers folder; a file for each family adds what differs.

On the device `meta` a folder opens from its config files only. Its tensors have no values, but all shapes, types and numbers of
parameters are those of the real model.
"""

import copy
import inspect
import shutil
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from math import isfinite, prod
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from alignbench import Backbone, UserError, flow
from alignbench.backbone import BackboneSettings, Component
from alignbench.backbones import families
from alignbench.backbones.pipelines import schedule
from alignbench.backbones.pipelines.components import Components
from alignbench.backbones.pipelines.embeddings import Conditioning, Embeddings, on_cpu
from alignbench.backbones.pipelines.trust import read_json
from alignbench.files.paths import local_path
from alignbench.runtime.hardware import computes_in_bfloat16

ENCODE_BATCH = 64
"""Number of prompts that the text encoders take at a time."""
COMPARED_STEPS = 4
"""Denoising steps in a comparison with the folder's own pipeline."""
EQUALLY_SPACED = {"sigmas": [1 - i / COMPARED_STEPS for i in range(COMPARED_STEPS)]}
"""The argument that makes a pipeline take our sigmas, for pipelines that shift their own sigmas twice and end above 0."""
CACHED_PROMPTS = 4000
"""Number of prompts whose embeddings are kept in main memory; for FLUX.1 these take 17 GB."""
TEXT = ("text_encoder", "tokenizer")
"""Prefixes of the names of components that encode prompts."""
OWN_CALL = "alignbench.json"
"""A file of our own folders, with the arguments for the call of a plain pipeline."""
OWN_ARGUMENTS: dict[str, type[int] | type[float]] = {
    **dict.fromkeys(("height", "width", "num_frames", "max_sequence_length", "num_inference_steps"), int),
    **dict.fromkeys(("guidance_scale", "true_cfg_scale"), float),
}


class DiffusersFolder(Backbone):
    """A folder that `DiffusionPipeline.from_pretrained` can open. Latents are [C, H, W], or [C, F, H, W] for videos."""

    class Settings(BackboneSettings):
        path: str
        """Folder with `model_index.json`."""
        resolution: int | None = Field(None, ge=1)
        """Side of the images in pixels. Null uses the default of the pipeline's call."""
        train: Literal["full", "lora"] = "lora"
        """What is trained: full, all weights of the transformer; or lora, an adapter."""
        lora_rank: int = Field(ge=1)
        """Rank of the LoRA (train=lora)."""
        lora_alpha: float = Field(gt=0)
        """Scale of the LoRA (train=lora): its output is multiplied by alpha / rank."""
        lora_targets: tuple[str, ...]
        """Ends of the names of modules that get a LoRA."""
        precision: Literal["fp32", "bf16", "fp16"] = "fp32"
        """Precision of the model's arithmetic and of frozen weights. Trained weights and the step maths are always float32;
        train=full with bf16 uses autocast."""
        unscored_precision: Literal["same", "bf16", "auto"] = "same"
        """Precision of the transformer where no log-density and no gradient depends on it: at steps of a rollout that are not
        scored, and for images of evaluations. same: that of `precision`. bf16: by autocast, if `precision` is fp32. auto: bf16
        where the device has instructions for it."""
        compile: bool = False
        """Whether torch.compile is applied to the transformer. It takes minutes before the first step and speeds up all later
        ones."""
        gradient_checkpointing: bool = False
        """Whether only the input of each block is kept for the backward pass, and the rest is recomputed. The gradient is the
        same."""
        keep_text_encoders: bool = False
        """Whether the text encoders stay in memory after all prompts are encoded."""
        decode_batch: int = Field(32, ge=1)
        """Number of latents that the decoder takes at a time."""

        @model_validator(mode="after")
        def _gradients_do_not_underflow(self) -> Self:
            if self.train == "full" and self.precision == "fp16":
                raise ValueError("train=full needs precision fp32 or bf16: small gradients underflow in fp16")
            return self

    settings: Settings
    supports_meta_device = True
    PIPELINE: ClassVar[str]
    """Class of the pipeline in the folder."""
    MODELS: ClassVar[Mapping[str, str]]
    """For each component with weights, the library.Class that opens it: transformer, vae and text encoders, in this order."""
    OPTIONAL: ClassVar[frozenset[str]] = frozenset()
    """Components that the pipeline can do without."""
    TOKENIZERS: ClassVar[Collection[str]] = frozenset()
    """Classes of tokenizers that this family has beside the common ones."""
    SCHEDULERS: ClassVar[Collection[str]] = frozenset()
    """Classes of schedulers that this family may name beside Euler's, see `_read_schedule`."""
    INDEX_OPTIONS: ClassVar[Collection[str]] = ()
    """Keys of `model_index.json` that are not components but arguments of the pipeline's constructor."""
    GUIDANCE: ClassVar[str] = "guidance_scale"
    """Name of the guidance among the arguments of the pipeline's call."""

    def ineffective_settings(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if self.settings.train == "full":
            found |= dict.fromkeys(("lora_rank", "lora_alpha", "lora_targets"), "train=full trains all weights, without a LoRA")
        if self.settings.precision != "fp32":
            low = self.settings.precision
            found["unscored_precision"] = f"precision={low} already computes everything in that precision"
        return found

    def __init__(self, settings: Settings) -> None:
        _silence()
        self.settings = settings
        self.folder = local_path(settings.path)
        index = families.read_index(self.folder)
        if index["_class_name"] != self.PIPELINE:
            raise UserError(f"{self.folder} has a {index['_class_name']}; this backbone opens {self.PIPELINE} folders")
        kinds = {"tokenizer": self.TOKENIZERS, "scheduler": self.SCHEDULERS}
        self.parts = Components(self.folder, index, self.MODELS, self.OPTIONAL, kinds)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
        self.mixed = settings.train == "full" and self.dtype != torch.float32
        self.device = settings.torch_device
        self.index = index
        self._lower_dtype = self._lower_precision()
        self._in_unscored = False
        self.schedule = self._read_schedule()
        texts = [name for name, cls in self.parts.classes.items() if name.startswith(TEXT) and cls]
        self.pipeline = self._open(dict.fromkeys(texts))
        if self.device.type == "meta" and not self.parts.empty:
            for name in (n for n in texts if n.startswith("tokenizer")):
                self.parts.open(name, self.dtype)  # so that a folder that opens here also opens in a run
        if all(parameter.ndim < 5 for parameter in self.pipeline.vae.parameters()):
            # This halves the time of convolutions on a CPU; images differ only by rounding.
            self.pipeline.vae.to(memory_format=torch.channels_last)
        self.call = _call(type(self.pipeline).__call__, self.folder)
        self.guidance = self._guidance()
        self.default_steps = int(self.call["num_inference_steps"])
        self.latent_shape = self._latent_shape()
        self.image_tokens = prod(self.latent_shape[1:]) // self.patch**2
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
        self._encoded: dict[str | None, Embeddings] = {}  # None stands for the negative prompt

    @property
    @abstractmethod
    def patch(self) -> int:
        """Side of one of the transformer's tokens, in latents."""

    @property
    def latent_pixels(self) -> int:
        """Side of one latent, in pixels."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def latent_channels(self) -> int:
        return int(self.pipeline.vae.config.latent_channels)

    @property
    def default_side(self) -> int:
        """Side of the images that the pipeline's call draws by itself, in pixels."""
        return int(self.call["height"] or self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    @property
    @abstractmethod
    def text_tokens(self) -> int:
        """Number of tokens of a prompt's states, known without encoding a prompt; the largest one where it differs."""

    @property
    @abstractmethod
    def text_widths(self) -> tuple[int, int | None]:
        """Widths of a prompt's states and of its pooled embedding; None for a model without the latter."""

    @abstractmethod
    def embed(self, pipeline: Any, prompts: list[str]) -> Embeddings:
        """The embeddings that the text encoders of `pipeline` compute."""

    def _guidance(self) -> float:
        return self.settings.guidance or float(self.call[self.GUIDANCE])

    def _read_schedule(self) -> schedule.Schedule:
        """The folder's schedule; refuses a scheduler that would take other steps than alignbench."""
        return schedule.read(self.folder)

    # ------------------------------------------------------------------------------------------------ opening

    def _open(self, given: dict[str, Any]) -> Any:
        """Opens the folder's pipeline on its device. Components in `given` replace its own; None leaves a component out."""
        import diffusers

        opener = self.parts.open_on_meta if self.device.type == "meta" else self.parts.open
        own = {name: opener(name, self.weights_dtype) for name, cls in self.parts.classes.items() if name not in given and cls}
        absent = dict.fromkeys(name for name, cls in self.parts.classes.items() if name not in given and not cls)
        options = {key: self.index[key] for key in self.INDEX_OPTIONS if key in self.index}
        try:
            pipeline = getattr(diffusers, self.PIPELINE)(**own, **absent, **given, **options).to(self.device)
        except torch.OutOfMemoryError as error:
            raise UserError(f"{self.folder} does not fit into the memory of {self.device}") from error
        pipeline.set_progress_bar_config(disable=True)
        for module in own.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        return pipeline

    def _latent_shape(self) -> tuple[int, ...]:
        """The shape of a latent, for images or frames with the sides of `_sides`."""
        token = self.latent_pixels * self.patch
        for name, side in self._sides().items():
            if side % token:
                raise UserError(f"{name} must be a multiple of {token} pixels for {self.folder}, got {side}")
        return (self.latent_channels, *[side // self.latent_pixels for side in self._sides().values()])

    def _sides(self) -> dict[str, int]:
        """Height and width of an image in pixels, by the name of the setting that each comes from."""
        side = self.settings.resolution or self.default_side
        return {"resolution": side, "width": side}

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.latent_shape[-2] * self.latent_pixels, self.latent_shape[-1] * self.latent_pixels

    def _add_lora(self, transformer: Any) -> None:
        from peft import LoraConfig

        s = self.settings
        # A name may end alike for a layer and for a list of layers, of which only a layer can get a LoRA.
        layers = [name for name, module in transformer.named_modules() if next(module.children(), None) is None]
        for target in s.lora_targets:
            if not any(f".{name}".endswith(f".{target}") for name in layers):
                raise UserError(f"lora_targets: no module name in {self.folder}/transformer ends with {target!r}")
        adapted = [name for name in layers if any(f".{name}".endswith(f".{target}") for target in s.lora_targets)]
        with torch.device("meta") if self.device.type == "meta" else nullcontext():
            transformer.add_adapter(
                LoraConfig(
                    r=s.lora_rank,
                    lora_alpha=s.lora_alpha,
                    init_lora_weights="gaussian",
                    target_modules=adapted,
                )
            )
        for parameter in self.parameters():
            parameter.data = parameter.data.float()

    # ------------------------------------------------------------------------------------------------ prompts

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encodes all prompts and frees the text encoders. Too many prompts to be kept are encoded when they are needed."""
        if self.settings.keep_text_encoders or len(set(prompts)) > CACHED_PROMPTS:
            return
        self._encode(prompts)
        self._text = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        self._encode(prompts)
        negative = None if self.negative_prompt is None else self._embeddings([None])
        return Conditioning(self._embeddings(prompts), negative)

    @property
    def negative_prompt(self) -> str | None:
        """The negative prompt, if guidance needs the velocity for it."""
        return None

    def embed_with_negative(self, pipeline: Any, prompts: list[str]) -> Embeddings:
        """The embeddings of prompts, followed by those of the negative prompt; some families encode these in another way."""
        assert self.negative_prompt is not None
        return self.embed(pipeline, [*prompts, self.negative_prompt])

    def _embeddings(self, prompts: Sequence[str | None]) -> Embeddings:
        """The cached embeddings of prompts, on the device; None stands for the negative prompt."""
        embeddings = Embeddings.joined([self._encoded[p] for p in prompts])
        if embeddings.mask is not None and embeddings.mask.all():
            embeddings = replace(embeddings, mask=None)
        return embeddings.to(self.device)

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> None:
        """Makes sure that the embeddings of these prompts are in the cache."""
        requested: dict[str | None, None] = dict.fromkeys(prompts if self.negative_prompt is None else [*prompts, None])
        new = [p for p in requested if p not in self._encoded]
        others = [p for p in self._encoded if p not in requested]
        for prompt in others[: max(0, len(self._encoded) + len(new) - CACHED_PROMPTS)]:
            del self._encoded[prompt]
        for i in range(0, len(new), ENCODE_BATCH):
            part = new[i : i + ENCODE_BATCH]
            self._encoded.update(zip(part, self._new_embeddings(part).split(), strict=True))

    def _new_embeddings(self, prompts: Sequence[str | None]) -> Embeddings:
        """Encodes prompts; None, which may be the last, stands for the negative prompt."""
        if self.device.type == "meta":
            return self._shapes(len(prompts))
        texts = [prompt for prompt in prompts if prompt is not None]
        embed = self.embed if len(texts) == len(prompts) else self.embed_with_negative
        return embed(self._text_pipeline(), texts)

    def _shapes(self, prompts: int) -> Embeddings:
        """Embeddings on the device `meta`, which have shapes but no values."""
        width, pooled = self.text_widths
        states = torch.empty(prompts, self.text_tokens, width, device="meta", dtype=self.dtype)
        return Embeddings(states, None if pooled is None else states.new_empty(prompts, pooled))

    def _text_pipeline(self) -> Any:
        if self._text is None:
            self._text = self._open({"transformer": self.pipeline.transformer, "vae": None})
        return self._text

    def drawn_by_pipeline(self, prompts: Sequence[str], noise: Tensor) -> np.ndarray:
        """Draws one image for each prompt from this noise with the folder's own pipeline, for comparison with ours.

        Args:
            prompts: the prompts.
            noise: initial latents, one for each prompt.

        Returns:
            uint8 [B, H, W, 3], or what else `decode` returns.
        """
        height, width = self.image_size
        pipeline = self._open({"transformer": self.pipeline.transformer, "vae": self.pipeline.vae})
        self.follow_our_sigmas(pipeline, COMPARED_STEPS)
        drawn = pipeline(
            prompt=list(prompts),
            height=height,
            width=width,
            num_inference_steps=COMPARED_STEPS,
            max_sequence_length=self.call["max_sequence_length"],
            output_type="np",
            **self.pipeline_arguments(noise),
        )
        return np.round(self.drawn_images(drawn) * 255).astype(np.uint8)

    def drawn_images(self, output: Any) -> np.ndarray:
        """The images in what the pipeline's call returns, float from 0 to 1, in the shape that `decode` gives them."""
        return np.asarray(output.images)

    def follow_our_sigmas(self, pipeline: Any, steps: int) -> None:
        """Makes a pipeline take our sigmas if its call has no argument for them (see `pipeline_arguments`)."""

    def pipeline_arguments(self, noise: Tensor) -> dict[str, Any]:
        """The arguments with which the pipeline's call takes this noise, our guidance and our schedule."""
        return {"latents": noise, self.GUIDANCE: self.guidance}

    # ------------------------------------------------------------------------------------------------ the model

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype in which the folder is opened."""
        return torch.float32 if self.mixed else self.dtype

    def call_transformer(self, **inputs: Any) -> Tensor:
        """Calls the transformer, in float32: the policy, or inside `reference` the base model."""
        with self._arithmetic():
            answer = self._active(**inputs, return_dict=False)[0]
        # Some transformers answer with a list that has an element for each row.
        return (answer if isinstance(answer, Tensor) else torch.stack(list(answer))).float()

    def _arithmetic(self) -> AbstractContextManager[Any]:
        """The context in which the transformer is called: autocast where it does not compute in the dtype of its weights."""
        usual = self.dtype if self.mixed else None
        dtype = (self._in_unscored and self._lower_dtype) or usual
        return nullcontext() if dtype is None or self.device.type == "meta" else torch.autocast(self.device.type, dtype)

    def _lower_precision(self) -> torch.dtype | None:
        """The dtype that `unscored_precision` asks for; None where it changes nothing."""
        lower = self.dtype == torch.float32 and computes_in_bfloat16(self.settings.unscored_precision, self.device)
        return torch.bfloat16 if lower else None

    @contextmanager
    def unscored(self) -> Iterator[None]:
        before, self._in_unscored = self._in_unscored, True
        try:
            yield
        finally:
            self._in_unscored = before

    def _compile(self, *transformers: nn.Module) -> None:
        if self.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            raise UserError("compile=true needs a C++ compiler (g++ or clang++) on a CPU; install one, or set compile=false")
        for transformer in transformers:
            transformer.compile(dynamic=True)  # in place, so that parameters keep their names; batch sizes differ between steps

    def sigmas(self, steps: int) -> Tensor:
        return self.schedule.sigmas(steps, self.shift_of(steps))

    def shift_of(self, steps: int) -> float:
        """The shift of the schedule with this number of steps."""
        return self.schedule.shift(self.image_tokens)

    def schedule_shift(self) -> float:
        halfway = float(flow.sigmas(2, self.shift_of(self.default_steps))[1])
        return halfway / (1 - halfway)

    def vae_decode(self, latents: Tensor) -> Tensor:
        """Decodes final latents into pixels from -1 to 1: [B, 3, H, W], or [B, 3, F, H, W] of the scored frames of videos."""
        vae = self.pipeline.vae
        scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        decoded: Tensor = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
        return decoded

    def vae_encode(self, pixels: Tensor) -> Tensor:
        """Encodes pixels into latents: the inverse of `vae_decode`."""
        vae = self.pipeline.vae
        encoded: Tensor = vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float()
        return (encoded - vae.config.shift_factor) * vae.config.scaling_factor

    def channel_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the standard deviation of each of the autoencoder's channels, for latents [B, C, ...]."""
        config, ones = self.pipeline.vae.config, [1] * (latents.ndim - 2)
        mean, std = (torch.tensor(v, device=latents.device).view(-1, *ones) for v in (config.latents_mean, config.latents_std))
        return mean, std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        images = []
        for part in latents.split(self.settings.decode_batch):
            pixels = ((self.vae_decode(part).float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            images.append(on_cpu(pixels.movedim(1, -1)).numpy())
        return np.concatenate(images)

    def check_image(self, image: np.ndarray) -> None:
        height, width = self.image_size
        if image.shape != (height, width, 3):
            raise UserError(f"this model draws {width} x {height} images; got one of {image.shape[1]} x {image.shape[0]}")

    @torch.no_grad()
    def encode_images(self, images: Sequence[np.ndarray]) -> Tensor:
        for image in images:
            self.check_image(image)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1
        return torch.cat([self.vae_encode(part) for part in pixels.split(self.settings.decode_batch)])

    def trainable(self) -> nn.Module:
        module: nn.Module = self.pipeline.transformer
        return module

    def mixed_weights(self, weight: float) -> list[Tensor]:
        transformer = self.trainable()
        if self._base is not None:
            pairs = zip(transformer.parameters(), self._base.parameters(), strict=True)
            return [base + weight * (policy.detach() - base) for policy, base in pairs]
        # A LoRA is B A with B = 0 at the start, so that its output is linear in B.
        named = ((name, p.detach()) for name, p in transformer.named_parameters() if p.requires_grad)
        return [weight * p if ".lora_B." in name else p.clone() for name, p in named]

    def components(self) -> dict[str, Component]:
        components = {name: Component(getattr(self.pipeline, name)) for name in ("transformer", "vae")}
        if self._base is not None:
            components["reference"] = Component(self._base)
        for name in (n for n, cls in self.parts.classes.items() if n.startswith("text_encoder") and cls):
            components[name] = Component(
                self.parts.open_on_meta(name, self.weights_dtype), training=self.settings.keep_text_encoders
            )
        return components

    def shard(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for transformer in filter(None, (self.pipeline.transformer, self._base)):
            adapter = {p for p in transformer.parameters() if p.requires_grad} if self.settings.train == "lora" else set()
            blocks = [block for child in transformer.children() if isinstance(child, nn.ModuleList) for block in child]
            for module in (*blocks, transformer):
                # Reshard after the last call too, so that parameters are always the shards of this rank.
                fully_shard(module, ignored_params=adapter, reshard_after_forward=True)
                module.set_gradient_divide_factor(1.0)  # gradients are summed, see `engine`
                module.set_force_sum_reduction_for_comms(True)  # gloo supports only sums

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
        logging.disable_progress_bar()  # their progress bars would break ours
        logging.set_verbosity_error()


def _call(call: Any, folder: Path) -> dict[str, Any]:
    """The default arguments of a pipeline's call; a folder of ours can override them.

    Raises:
        UserError: the folder sets an argument that is unknown or not a positive number.
    """
    defaults = {name: p.default for name, p in inspect.signature(call).parameters.items() if p.default is not p.empty}
    if not (folder / OWN_CALL).is_file():
        return defaults
    own = read_json(folder, OWN_CALL).get("call")
    if not isinstance(own, dict):
        raise UserError(f"{folder / OWN_CALL} has no key call with arguments")
    for name, value in own.items():
        if name not in OWN_ARGUMENTS or type(value) not in (int, float) or not isfinite(value) or value <= 0:
            raise UserError(f"{folder / OWN_CALL}: call.{name} must be a positive number, one of {', '.join(OWN_ARGUMENTS)}")
    return {**defaults, **{name: OWN_ARGUMENTS[name](value) for name, value in own.items()}}
