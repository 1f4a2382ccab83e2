"""z_image: a local `ZImagePipeline` folder (Z-Image, Z-Image-Turbo), with full training or LoRA."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alignbench.backbones.guidance import GuidedFolder
from alignbench.backbones.pipelines.embeddings import Embeddings

PATCH = 2
"""Side of a token, in latents."""
SIDE = 1024
"""Side of the images that the pipeline's call draws by itself, in pixels."""


class ZImage(GuidedFolder):
    """A folder of Z-Image."""

    class Settings(GuidedFolder.Settings):
        lora_rank: int = Field(32, ge=1)
        """Rank of the LoRA (train=lora)."""
        lora_alpha: float = Field(64, gt=0)
        """Scale of the LoRA (train=lora): its output is multiplied by alpha / rank."""
        lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
        """Ends of the names of modules that get a LoRA; the default is that of the DreamBooth script of diffusers."""

    settings: Settings
    PIPELINE = "ZImagePipeline"
    MODELS = {  # noqa: RUF012
        "transformer": "diffusers.ZImageTransformer2DModel",
        "vae": "diffusers.AutoencoderKL",
        "text_encoder": "transformers.Qwen3Model",
    }
    TOKENIZERS = frozenset({"Qwen2Tokenizer", "Qwen2TokenizerFast"})

    def _guidance(self) -> float:
        """Our guidance is the pipeline's guidance_scale plus 1: the pipeline adds its scale times the difference of the two
        velocities to the velocity for the prompt, so that 0 means no guidance there."""
        return self.settings.guidance or 1 + float(self.call[self.GUIDANCE])

    @property
    def patch(self) -> int:
        return PATCH

    @property
    def default_side(self) -> int:
        return int(self.call["height"] or SIDE)

    @property
    def text_tokens(self) -> int:
        """The largest number of tokens; most prompts have a tenth of it."""
        return int(self.call["max_sequence_length"])

    @property
    def text_widths(self) -> tuple[int, None]:
        return self.pipeline.transformer.config.cap_feat_dim, None

    def embed(self, pipeline: Any, prompts: list[str]) -> Embeddings:
        states, _ = pipeline.encode_prompt(
            prompt=list(prompts),  # a copy, because the pipeline changes the list in place
            do_classifier_free_guidance=False,
            max_sequence_length=self.call["max_sequence_length"],
            device=self.device,
        )
        mask = pad_sequence([s.new_ones(len(s), dtype=torch.bool) for s in states], batch_first=True)
        return Embeddings(pad_sequence(states, batch_first=True), mask=mask)

    def pipeline_arguments(self, noise: Tensor) -> dict[str, Any]:
        return super().pipeline_arguments(noise) | {self.GUIDANCE: self.guidance - 1}

    def answer(self, x: Tensor, sigma: Tensor, texts: Embeddings) -> Tensor:
        """Computes the velocity without guidance. The transformer's time is 1 - sigma, and its output is minus the velocity."""
        lengths = [texts.states.shape[1]] * len(x) if texts.mask is None else texts.mask.sum(1).tolist()
        answer = self.call_transformer(
            x=list(x.to(self.weights_dtype).unsqueeze(2)),
            t=1 - sigma,
            cap_feats=[states[:length] for states, length in zip(texts.states, lengths, strict=True)],
        )
        return -answer.squeeze(2)
