"""sana: a local `SanaPipeline` folder (SANA, SANA 1.5), with full training or LoRA."""

from typing import Any

from pydantic import Field
from torch import Tensor

from alignbench.backbones.diffusers_folder import EQUALLY_SPACED, OWN_CALL
from alignbench.backbones.pipelines.embeddings import Embeddings
from alignbench.backbones.solver import SolverFolder


class Sana(SolverFolder):
    """A folder of SANA."""

    class Settings(SolverFolder.Settings):
        lora_rank: int = Field(32, ge=1)
        """Rank of the LoRA (train=lora)."""
        lora_alpha: float = Field(64, gt=0)
        """Scale of the LoRA (train=lora): its output is multiplied by alpha / rank."""
        lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v")
        """Ends of the names of modules that get a LoRA; the default is that of the DreamBooth script of diffusers."""

    settings: Settings
    PIPELINE = "SanaPipeline"
    MODELS = {  # noqa: RUF012
        "transformer": "diffusers.SanaTransformer2DModel",
        "vae": "diffusers.AutoencoderDC",
        "text_encoder": "transformers.Gemma2Model",
    }
    TOKENIZERS = frozenset({"GemmaTokenizer", "GemmaTokenizerFast"})
    SOLVER = "DPMSolverMultistepScheduler"
    SCHEDULERS = frozenset({SOLVER})

    @property
    def patch(self) -> int:
        return int(self.pipeline.transformer.config.patch_size)

    @property
    def default_side(self) -> int:
        """The size that the model was trained on, to which the pipeline's call rounds its height."""
        trained = self.pipeline.transformer.config.sample_size * self.latent_pixels
        return int(self.call["height"] if (self.folder / OWN_CALL).is_file() else trained)

    @property
    def text_tokens(self) -> int:
        return int(self.call["max_sequence_length"])

    @property
    def text_widths(self) -> tuple[int, None]:
        return self.pipeline.transformer.config.caption_channels, None

    def embed(self, pipeline: Any, prompts: list[str]) -> Embeddings:
        """Encodes prompts after an instruction to the language model; the tokens of the instruction are left out."""
        return self._texts(pipeline, prompts, self.call["complex_human_instruction"])

    def embed_with_negative(self, pipeline: Any, prompts: list[str]) -> Embeddings:
        """Encodes prompts, followed by the negative prompt, which has no instruction."""
        negative = self._texts(pipeline, [self.NEGATIVE], None)
        return Embeddings.joined([self.embed(pipeline, prompts), negative]) if prompts else negative

    def _texts(self, pipeline: Any, prompts: list[str], instruction: list[str] | None) -> Embeddings:
        states, mask, _, _ = pipeline.encode_prompt(
            prompt=prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.call["max_sequence_length"],
            complex_human_instruction=instruction,
            device=self.device,
        )
        return Embeddings(states, mask=mask.bool())

    def pipeline_arguments(self, noise: Tensor) -> dict[str, Any]:
        return super().pipeline_arguments(noise) | EQUALLY_SPACED | {"use_resolution_binning": False}

    def answer(self, x: Tensor, sigma: Tensor, texts: Embeddings) -> Tensor:
        config = self.pipeline.transformer.config
        answer = self.call_transformer(
            hidden_states=x.to(self.weights_dtype),
            timestep=sigma * 1000 * config.timestep_scale,
            encoder_hidden_states=texts.states,
            encoder_attention_mask=texts.mask,
        )
        return answer[:, : x.shape[1]]  # some models also predict a variance, which is not used

    def vae_decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        decoded: Tensor = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        return decoded

    def vae_encode(self, pixels: Tensor) -> Tensor:
        vae = self.pipeline.vae
        encoded: Tensor = vae.encode(pixels.to(vae.dtype), return_dict=False)[0].float()
        return encoded * vae.config.scaling_factor
