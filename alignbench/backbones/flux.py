"""flux: a local `FluxPipeline` folder (FLUX.1-dev, FLUX.1-schnell), with full training or LoRA."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from alignbench.backbones.guidance import DistilledFolder
from alignbench.backbones.pipelines.embeddings import Conditioning, Embeddings
from alignbench.backbones.pipelines.packing import PATCH, pack, unpack


class Flux(DistilledFolder):
    """A folder of FLUX.1."""

    class Settings(DistilledFolder.Settings):
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
        self._positions = image_positions(self.latent_shape[1] // PATCH, self.latent_shape[2] // PATCH).to(self.device)

    @property
    def patch(self) -> int:
        return PATCH

    @property
    def text_tokens(self) -> int:
        """Tokens of T5 only; CLIP provides the pooled embedding."""
        return int(self.call["max_sequence_length"])

    @property
    def text_widths(self) -> tuple[int, int]:
        config = self.pipeline.transformer.config
        return config.joint_attention_dim, config.pooled_projection_dim

    def embed(self, pipeline: Any, prompts: list[str]) -> Embeddings:
        states, pooled, _ = pipeline.encode_prompt(
            prompt=prompts, prompt_2=prompts, max_sequence_length=self.call["max_sequence_length"], device=self.device
        )
        return Embeddings(states, pooled)

    def pipeline_arguments(self, noise: Tensor) -> dict[str, Any]:
        return super().pipeline_arguments(pack(noise))

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, group: Tensor) -> Tensor:
        texts = conditioning.prompts[group]
        answer = self.call_transformer(
            hidden_states=pack(x.to(self.weights_dtype)),
            timestep=sigma,
            guidance=self.guidance_input(sigma),
            encoder_hidden_states=texts.states,
            pooled_projections=texts.pooled,
            txt_ids=x.new_zeros(texts.states.shape[1], 3),
            img_ids=self._positions,
        )
        return unpack(answer, *x.shape[2:])


def image_positions(rows: int, columns: int) -> Tensor:
    """Makes the positions of tokens for the rotary embedding, [rows * columns, 3]: (0, row, column)."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()
