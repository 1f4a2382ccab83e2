"""wan: a local `WanPipeline` folder (Wan 2.1, Wan 2.2 TI2V-5B; text to video), with full training or LoRA."""

from functools import partial
from typing import Any

import numpy as np
from pydantic import Field
from torch import Tensor

from alignbench import UserError
from alignbench.backbones.pipelines.embeddings import Embeddings
from alignbench.backbones.pipelines.schedule import PLACE, Schedule
from alignbench.backbones.solver import SolverFolder

LOW_NOISE = "transformer_2"
"""The transformer that some folders have for small sigmas."""


class Wan(SolverFolder):
    """A folder of Wan, which draws clips from a prompt. Scorers see some frames of each clip."""

    class Settings(SolverFolder.Settings):
        width: int | None = Field(None, ge=1)
        """Width of the frames in pixels; `resolution` is their height. Null takes `resolution`, or the width of the pipeline's
        call where that is null as well."""
        frames: int | None = Field(None, ge=1)
        """Number of frames of a clip. Null uses the default of the pipeline's call."""
        scored_frames: int | tuple[int, ...] = 4
        """The frames of a clip that scorers see: their number, equally spaced from the first to the last (1 is the middle one,
        and a shorter clip is seen whole), or their indices, counted from 0."""
        lora_rank: int = Field(32, ge=1)
        """Rank of the LoRA (train=lora)."""
        lora_alpha: float = Field(64, gt=0)
        """Scale of the LoRA (train=lora): its output is multiplied by alpha / rank."""
        lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
        """Ends of the names of modules that get a LoRA; the default is that of Flow-GRPO for Wan 2.1."""
        decode_batch: int = Field(1, ge=1)
        """Number of clips that the decoder takes at a time."""

    settings: Settings
    PIPELINE = "WanPipeline"
    MODELS = {  # noqa: RUF012
        "transformer": "diffusers.WanTransformer3DModel",
        LOW_NOISE: "diffusers.WanTransformer3DModel",
        "vae": "diffusers.AutoencoderKLWan",
        "text_encoder": "transformers.UMT5EncoderModel",
    }
    OPTIONAL = frozenset({LOW_NOISE})
    INDEX_OPTIONS = ("expand_timesteps",)
    SOLVER = "UniPCMultistepScheduler"
    SCHEDULERS = frozenset({SOLVER})

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.scored = _scored(settings.scored_frames, self.frames)

    def _read_schedule(self) -> Schedule:
        """The folder's schedule; refuses a second transformer, to which the pipeline changes at a sigma of the schedule."""
        if self.parts.classes[LOW_NOISE]:
            raise UserError(
                f"{self.folder} has two transformers ({LOW_NOISE}), which alignbench cannot train; open another model"
            )
        found = super()._read_schedule()
        if found.dynamic:
            raise UserError(f"{self.folder}/{PLACE} sets use_dynamic_shifting, which a {self.PIPELINE} does not support")
        return found

    @property
    def patch(self) -> int:
        return int(self.pipeline.transformer.config.patch_size[-1])

    @property
    def latent_pixels(self) -> int:
        return int(self.pipeline.vae_scale_factor_spatial)

    @property
    def latent_channels(self) -> int:
        return int(self.pipeline.vae.config.z_dim)

    @property
    def frames(self) -> int:
        """Number of frames of a clip."""
        return int(self.settings.frames or self.call["num_frames"])

    def _sides(self) -> dict[str, int]:
        height, width = self.settings.resolution, self.settings.width
        return {"resolution": height or int(self.call["height"]), "width": width or height or int(self.call["width"])}

    def _latent_shape(self) -> tuple[int, ...]:
        channels, *sides = super()._latent_shape()
        step = int(self.pipeline.vae_scale_factor_temporal)
        if (self.frames - 1) % step:
            raise UserError(f"frames must be 1 more than a multiple of {step} for {self.folder}, got {self.frames}")
        return channels, (self.frames - 1) // step + 1, *sides

    @property
    def text_tokens(self) -> int:
        """Number of tokens of every text: the pipeline fills short ones up with zeros, which the transformer reads."""
        return int(self.call["max_sequence_length"])

    @property
    def text_widths(self) -> tuple[int, None]:
        return self.pipeline.transformer.config.text_dim, None

    def embed(self, pipeline: Any, prompts: list[str]) -> Embeddings:
        states, _ = pipeline.encode_prompt(
            prompt=prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.call["max_sequence_length"],
            device=self.device,
        )
        return Embeddings(states)

    def answer(self, x: Tensor, sigma: Tensor, texts: Embeddings) -> Tensor:
        """Computes the velocity without guidance. With `expand_timesteps` the pipeline tells the same time for every token."""
        return self.call_transformer(
            hidden_states=x.to(self.weights_dtype), timestep=sigma * 1000, encoder_hidden_states=texts.states
        )

    # ------------------------------------------------------------------------------------------------ frames

    def vae_decode(self, latents: Tensor) -> Tensor:
        """Decodes clips into the pixels of their scored frames, [B, 3, F, H, W]; [B, 3, H, W] if a single one is scored."""
        vae = self.pipeline.vae
        mean, std = self.channel_statistics(latents)
        decoded: Tensor = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
        return decoded[:, :, self.scored].squeeze(2) if len(self.scored) == 1 else decoded[:, :, self.scored]

    def check_image(self, image: np.ndarray) -> None:
        if self.frames > 1:
            raise UserError(
                f"images cannot be encoded as clips of {self.frames} frames; set backbone.frames=1 to train on them"
            )
        super().check_image(image)

    def vae_encode(self, pixels: Tensor) -> Tensor:
        vae = self.pipeline.vae
        encoded: Tensor = vae.encode(pixels.unsqueeze(2).to(vae.dtype)).latent_dist.mode().float()
        mean, std = self.channel_statistics(encoded)
        return (encoded - mean) / std

    # ------------------------------------------------------------------------------------------------ the pipeline's own call

    def pipeline_arguments(self, noise: Tensor) -> dict[str, Any]:
        return super().pipeline_arguments(noise) | {"num_frames": self.frames}

    def follow_our_sigmas(self, pipeline: Any, steps: int) -> None:
        """The call has no argument for sigmas, and its own end above 0, because their end is shifted twice."""
        scheduler = pipeline.scheduler
        scheduler.set_timesteps = partial(scheduler.set_timesteps, sigmas=[1 - i / steps for i in range(steps)])

    def drawn_images(self, output: Any) -> np.ndarray:
        frames = np.asarray(output.frames)[:, self.scored]
        return frames[:, 0] if len(self.scored) == 1 else frames


def _scored(asked: int | tuple[int, ...], frames: int) -> list[int]:
    """The indices of the scored frames in a clip.

    Raises:
        UserError: there are none, or one of them is not in the clip.
    """
    if isinstance(asked, int):
        if asked < 1:
            raise UserError(f"scored_frames must be at least 1, got {asked}")
        if asked == 1:
            return [frames // 2]
        indices: list[int] = np.linspace(0, frames - 1, min(asked, frames)).round().astype(int).tolist()
        return indices
    if not asked or any(not 0 <= i < frames for i in asked) or list(asked) != sorted(set(asked)):
        raise UserError(f"scored_frames must be increasing indices below the {frames} frames of a clip, got {list(asked)}")
    return list(asked)
