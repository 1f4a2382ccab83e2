"""sd3: a local `StableDiffusion3Pipeline` folder (SD3, SD3.5), with full training or LoRA."""

from typing import Any

from pydantic import Field
from torch import Tensor

from alignbench import UserError
from alignbench.backbones.diffusers_folder import EQUALLY_SPACED
from alignbench.backbones.guidance import GuidedFolder
from alignbench.backbones.pipelines.embeddings import Embeddings
from alignbench.backbones.pipelines.trust import read_json

CLIP_TOKENS = 77
"""Number of tokens of a CLIP text encoder whose config does not give it."""


class SD3(GuidedFolder):
    """A folder of SD3 or SD3.5."""

    class Settings(GuidedFolder.Settings):
        lora_rank: int = Field(32, ge=1)
        """Rank of the LoRA (train=lora)."""
        lora_alpha: float = Field(64, gt=0)
        """Scale of the LoRA (train=lora): its output is multiplied by alpha / rank."""
        lora_targets: tuple[str, ...] = (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        )  # fmt: skip
        """Ends of the names of modules that get a LoRA; the default is that of Flow-GRPO."""

    settings: Settings
    PIPELINE = "StableDiffusion3Pipeline"
    MODELS = {  # noqa: RUF012
        "transformer": "diffusers.SD3Transformer2DModel",
        "vae": "diffusers.AutoencoderKL",
        "text_encoder": "transformers.CLIPTextModelWithProjection",
        "text_encoder_2": "transformers.CLIPTextModelWithProjection",
        "text_encoder_3": "transformers.T5EncoderModel",
    }
    OPTIONAL = frozenset({"text_encoder_3", "tokenizer_3"})

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        most = self.pipeline.transformer.config.pos_embed_max_size * self.patch
        if self.latent_shape[-1] > most:
            pixels = most * self.pipeline.vae_scale_factor
            raise UserError(f"{self.folder} supports at most {pixels} x {pixels} pixels; choose a smaller resolution")

    @property
    def patch(self) -> int:
        return int(self.pipeline.transformer.config.patch_size)

    @property
    def text_tokens(self) -> int:
        """Tokens of the CLIP encoders, followed by those of T5."""
        clip = read_json(self.folder, "text_encoder/config.json")
        return int(clip.get("max_position_embeddings", CLIP_TOKENS) + self.call["max_sequence_length"])

    @property
    def text_widths(self) -> tuple[int, int]:
        config = self.pipeline.transformer.config
        return config.joint_attention_dim, config.pooled_projection_dim

    def embed(self, pipeline: Any, prompts: list[str]) -> Embeddings:
        states, _, pooled, _ = pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=prompts,
            prompt_3=prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.call["max_sequence_length"],
            device=self.device,
        )
        return Embeddings(states, pooled)

    def pipeline_arguments(self, noise: Tensor) -> dict[str, Any]:
        return super().pipeline_arguments(noise) | EQUALLY_SPACED

    def answer(self, x: Tensor, sigma: Tensor, texts: Embeddings) -> Tensor:
        return self.call_transformer(
            hidden_states=x.to(self.weights_dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=texts.states,
            pooled_projections=texts.pooled,
        )
