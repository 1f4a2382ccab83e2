"""diffusers_folder: any local `StableDiffusion3Pipeline` folder (SD3, SD3.5), trained in full or through LoRA."""

import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from alignbench import Backbone, UserError, flow
from alignbench.backbone import BackboneSettings
from alignbench.backbones.trust import refuse_code


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings of P prompts, [P, tokens, width] and [P, width], and of the empty prompt where guidance is on."""

    states: Tensor
    pooled: Tensor
    empty_states: Tensor | None
    empty_pooled: Tensor | None


class DiffusersFolder(Backbone):
    class Settings(BackboneSettings):
        path: str
        """A folder with `model_index.json`."""
        train: Literal["full", "lora"] = "lora"
        """Train all weights of the transformer, or a LoRA."""
        lora_rank: int = Field(32, ge=1)
        lora_alpha: float = Field(64, gt=0)
        lora_targets: tuple[str, ...] = (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        )  # fmt: skip
        """Modules that get a LoRA, by the end of their names."""
        precision: Literal["fp32", "bf16", "fp16"] = "fp32"
        """Of the frozen weights and the model's arithmetic; step maths is float32 in any case."""
        decode_batch: int = Field(32, ge=1)
        """Latents that the decoder takes at a time."""

    settings: Settings

    def __init__(self, settings: Settings) -> None:
        from diffusers import StableDiffusion3Pipeline
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        for logging in (diffusers_logging, transformers_logging):
            logging.disable_progress_bar()  # their bars would stand between ours
            logging.set_verbosity_error()
        self.settings = settings
        folder = Path(settings.path)
        index = folder / "model_index.json"
        if not index.is_file():
            raise UserError(f"{folder} is no diffusers folder: it has no model_index.json")
        refuse_code(folder)
        found = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
        if found != "StableDiffusion3Pipeline":
            raise UserError(f"{folder} holds a {found}; this backbone opens StableDiffusion3Pipeline folders")
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
        self.device = settings.torch_device
        with warnings.catch_warnings():
            # Its new name, dtype, is not known to older versions.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            pipeline = StableDiffusion3Pipeline.from_pretrained(
                folder, torch_dtype=self.dtype, local_files_only=True, use_safetensors=True
            )
        pipeline.set_progress_bar_config(disable=True)
        scheduler = pipeline.scheduler.config
        if scheduler.get("prediction_type", "flow_prediction") not in ("flow_prediction", None) or "shift" not in scheduler:
            raise UserError(
                f"{folder}/scheduler is no flow-matching schedule; alignbench needs FlowMatchEulerDiscreteScheduler"
            )
        self.pipeline = pipeline.to(self.device)
        self.shift = float(scheduler["shift"])
        call_file = folder / "alignbench.json"
        self.call: dict[str, Any] = json.loads(call_file.read_text(encoding="utf-8"))["call"] if call_file.is_file() else {}
        self.guidance = settings.guidance or float(self.call.get("guidance_scale", 1.0))
        self.default_steps = int(self.call.get("num_inference_steps", 28))
        transformer = pipeline.transformer
        size = transformer.config.sample_size
        self.latent_shape = (transformer.config.in_channels, size, size)
        for module in (
            pipeline.vae,
            pipeline.text_encoder,
            pipeline.text_encoder_2,
            pipeline.text_encoder_3,
            transformer,
        ):
            if module is not None:
                module.requires_grad_(False).eval()
        self._base: nn.Module | None = None
        if settings.train == "full":
            self._base = copy.deepcopy(transformer)
            transformer.requires_grad_(True)
        else:
            from peft import LoraConfig

            transformer.add_adapter(
                LoraConfig(
                    r=settings.lora_rank,
                    lora_alpha=settings.lora_alpha,
                    init_lora_weights="gaussian",
                    target_modules=list(settings.lora_targets),
                )
            )
            for parameter in self.parameters():
                parameter.data = parameter.data.float()
        self._active: nn.Module = transformer
        self._encoded: dict[str, tuple[Tensor, Tensor]] = {}

    def sigmas(self, steps: int) -> Tensor:
        return flow.sigmas(steps, self.shift)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        wanted = [*prompts, ""] if self.guidance > 1 else list(prompts)
        new = [p for p in dict.fromkeys(wanted) if p not in self._encoded]
        if new:
            states, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=new,
                prompt_2=new,
                prompt_3=new,
                do_classifier_free_guidance=False,
                max_sequence_length=self.call.get("max_sequence_length", 256),
                device=self.device,
            )
            self._encoded.update(zip(new, zip(states, pooled, strict=True), strict=True))
        empty = self._encoded.get("") if self.guidance > 1 else None
        return Conditioning(
            torch.stack([self._encoded[p][0] for p in prompts]),
            torch.stack([self._encoded[p][1] for p in prompts]),
            empty[0] if empty else None,
            empty[1] if empty else None,
        )

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, group: Tensor) -> Tensor:
        states, pooled = conditioning.states[group], conditioning.pooled[group]
        if conditioning.empty_states is None or conditioning.empty_pooled is None:
            return self._answer(x, sigma, states, pooled)
        empty_states = conditioning.empty_states.expand_as(states)
        empty_pooled = conditioning.empty_pooled.expand_as(pooled)
        both = self._answer(
            torch.cat([x, x]),
            torch.cat([sigma, sigma]),
            torch.cat([empty_states, states]),
            torch.cat([empty_pooled, pooled]),
        )
        unguided, guided = both.chunk(2)
        return unguided + self.guidance * (guided - unguided)

    def _answer(self, x: Tensor, sigma: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        answer: Tensor = self._active(
            hidden_states=x.to(self.dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return answer.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        vae = self.pipeline.vae
        pictures = []
        for part in latents.split(self.settings.decode_batch):
            scaled = part / vae.config.scaling_factor + vae.config.shift_factor
            decoded = vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float()
            pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            pictures.append(pixels.permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(pictures)

    @torch.no_grad()
    def encode_images(self, images: Sequence[np.ndarray]) -> Tensor:
        vae = self.pipeline.vae
        side = self.latent_shape[-1] * self.pipeline.vae_scale_factor
        for image in images:
            if image.shape != (side, side, 3):
                raise UserError(f"this model draws {side} x {side} pictures; got one of {image.shape[1]} x {image.shape[0]}")
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1
        parts = [vae.encode(part.to(vae.dtype)).latent_dist.mode().float() for part in pixels.split(self.settings.decode_batch)]
        return (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor

    def trainable(self) -> nn.Module:
        module: nn.Module = self.pipeline.transformer
        return module

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
