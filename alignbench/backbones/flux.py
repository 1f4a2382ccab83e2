"""flux: a local `FluxPipeline` folder (FLUX.1-dev, FLUX.1-schnell), with full training or LoRA."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from alignbench import UserError
from alignbench.backbones.diffusers_folder import Conditioning, DiffusersFolder, Embeddings

PATCH = 2
"""Side of a token in latents: FLUX's transformer packs 2 x 2 latents into one token."""


class Flux(DiffusersFolder):
    class Settings(DiffusersFolder.Settings):
        lora_rank: int = Field(64, ge=1)
        """Rank of the LoRA (train=lora)."""
        lora_alpha: float = Field(128, gt=0)
        """Scale of the LoRA (train=lora): its output is multiplied by alpha / rank."""
        lora_targets: tuple[str, ...] = (
            "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
            "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
        )  # fmt: skip
        """Ends of the names of modules that get a LoRA; the default is that of TMPO and Flow-GRPO."""

    settings: Settings
    PIPELINE = "FluxPipeline"
    MODELS = {  # noqa: RUF012
        "transformer": "diffusers.FluxTransformer2DModel",
        "vae": "diffusers.AutoencoderKL",
        "text_encoder": "transformers.CLIPTextModel",
        "text_encoder_2": "transformers.T5EncoderModel",
    }

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._places = places(self.latent_shape[1] // PATCH, self.latent_shape[2] // PATCH).to(self.device)

    @property
    def patch(self) -> int:
        return PATCH

    @property
    def text_tokens(self) -> int:
        """Tokens of T5 only; CLIP provides the pooled embedding."""
        return int(self.call["max_sequence_length"])

    def _guidance(self) -> float:
        """Guidance is an input of the distilled transformer and costs no second row. It is 1 for a model without this input."""
        if self.pipeline.transformer.config.guidance_embeds:
            return super()._guidance()
        if (self.settings.guidance or 1) > 1:
            raise UserError(f"{self.folder}/transformer has no guidance (guidance_embeds is false); leave guidance at 1")
        return 1.0

    def embed(self, pipeline: Any, prompts: list[str]) -> Embeddings:
        states, pooled, _ = pipeline.encode_prompt(
            prompt=prompts, prompt_2=prompts, max_sequence_length=self.call["max_sequence_length"], device=self.device
        )
        return Embeddings(states, pooled)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, group: Tensor) -> Tensor:
        texts = conditioning.prompts[group]
        distilled = self.pipeline.transformer.config.guidance_embeds
        answer = self.call_transformer(
            hidden_states=pack(x.to(self.weights_dtype)),
            timestep=sigma,
            guidance=torch.full_like(sigma, self.guidance) if distilled else None,
            encoder_hidden_states=texts.states,
            pooled_projections=texts.pooled,
            txt_ids=x.new_zeros(texts.states.shape[1], 3),
            img_ids=self._places,
        )
        return unpack(answer, *x.shape[2:])


def pack(latents: Tensor) -> Tensor:
    """Packs latents [B, C, H, W] into tokens [B, H/2 * W/2, C * 4]: a token has 2 x 2 latents; tokens are row by row."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), c * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents with this height and width."""
    b, _, c = tokens.shape
    patches = tokens.reshape(b, height // 2, width // 2, c // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, height, width)


def places(rows: int, columns: int) -> Tensor:
    """Positions of tokens for the rotary embedding, [rows * columns, 3]: (0, row, column)."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()
