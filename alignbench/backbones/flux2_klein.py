"""flux2_klein: a local `Flux2KleinPipeline` folder (FLUX.2 [klein], base or distilled), with full training or LoRA."""

from torch import Tensor

from alignbench import UserError
from alignbench.backbones.flux2_layout import Flux2Layout
from alignbench.backbones.guidance import GuidedFolder
from alignbench.backbones.pipelines.embeddings import Embeddings


class Flux2Klein(GuidedFolder, Flux2Layout):
    """A folder of FLUX.2 [klein], with classifier-free guidance unless it is distilled."""

    PIPELINE = "Flux2KleinPipeline"
    MODELS = {  # noqa: RUF012
        "transformer": "diffusers.Flux2Transformer2DModel",
        "vae": "diffusers.AutoencoderKLFlux2",
        "text_encoder": "transformers.Qwen3ForCausalLM",
    }
    TOKENIZERS = frozenset({"Qwen2Tokenizer", "Qwen2TokenizerFast"})

    def _guidance(self) -> float:
        """A model that was distilled to few steps draws without guidance (`is_distilled` in `model_index.json`)."""
        if not self.index.get("is_distilled"):
            return super()._guidance()
        if (self.settings.guidance or 1) > 1:
            raise UserError(f"{self.folder} is distilled (is_distilled) and draws without guidance; leave guidance at 1")
        return 1.0

    def answer(self, x: Tensor, sigma: Tensor, texts: Embeddings) -> Tensor:
        return self.predict(x, sigma, texts, None)
