"""flux2: a local `Flux2Pipeline` folder (FLUX.2-dev), with full training or LoRA."""

from torch import Tensor

from alignbench.backbones.flux2_layout import Flux2Layout
from alignbench.backbones.guidance import DistilledFolder
from alignbench.backbones.pipelines.embeddings import Conditioning


class Flux2(DistilledFolder, Flux2Layout):
    """A folder of FLUX.2-dev, whose guidance is an input of the transformer."""

    PIPELINE = "Flux2Pipeline"
    MODELS = {  # noqa: RUF012
        "transformer": "diffusers.Flux2Transformer2DModel",
        "vae": "diffusers.AutoencoderKLFlux2",
        "text_encoder": "transformers.Mistral3ForConditionalGeneration",
    }
    TOKENIZERS = frozenset({"PixtralProcessor"})

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, group: Tensor) -> Tensor:
        return self.predict(x, sigma, conditioning.prompts[group], self.guidance_input(sigma))
