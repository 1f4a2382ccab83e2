"""aesthetic: how beautiful people would find the picture, from 1 to 10, whatever its prompt (for models of photographs).

LAION's improved aesthetic predictor: linear layers on the unit features of OpenAI's CLIP ViT-L/14, trained on ratings. Its
weights, `sac+logos+ava1-l14-linearMSE.pth`, lie in its repository, github.com/christophschuhmann/improved-aesthetic-predictor.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from alignbench import UserError
from alignbench.errors import first_line
from alignbench.scorer import Images, as_arrays
from evals.embedders.clip import ClipScorer
from evals.embedders.open_clip import weights_file, weights_on_hub

Layer = tuple[Tensor, Tensor]
"""Weight [out, in] and bias [out]."""


class Aesthetic(ClipScorer):
    class Settings(ClipScorer.Settings):
        weights: str = "sac+logos+ava1-l14-linearMSE.pth"
        """The predictor's: a local file, or OWNER/REPOSITORY/FILE on the hub."""
        model: str = "openai/clip-vit-large-patch14"
        """A local folder that CLIPModel opens, or a hub id."""

    settings: Settings

    @cached_property
    def layers(self) -> list[Layer]:
        """Of the predictor, in float32; nothing stands between them but dropout, which a trained model does without."""
        layers, width = read_layers(self.settings.weights), self.clip.model.config.projection_dim
        if layers[0][0].shape[1] != width:
            raise UserError(
                f"the aesthetic predictor {self.settings.weights!r} takes {layers[0][0].shape[1]} features, "
                f"but {self.settings.model!r} gives {width}"
            )
        return layers

    def from_hub(self) -> list[str]:
        return [*super().from_hub(), *weights_on_hub(self.settings.weights)]

    def prepare(self) -> None:
        self.layers  # noqa: B018  (loads them and the CLIP)

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        layers, found = self.layers, self.clip.pictures(as_arrays(images))
        for weight, bias in layers:
            found = functional.linear(found, weight, bias)
        return found[:, 0].double().numpy()


def read_layers(name: str) -> list[Layer]:
    """The linear layers of a predictor's file, in their order: `layers.N.weight` and `layers.N.bias`, to one number.

    Raises:
        UserError: the file is not there, or holds something else.
    """
    file = weights_file(name)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        numbers = sorted(int(found[1]) for key in state if (found := re.fullmatch(r"layers\.(\d+)\.weight", key)))
        layers = [(state[f"layers.{n}.weight"].float(), state[f"layers.{n}.bias"].float()) for n in numbers]
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise UserError(f"{file} is no aesthetic predictor: {type(error).__name__}: {first_line(error)}") from error
    fit = all(after.shape[1] == before.shape[0] for (before, _), (after, _) in pairwise(layers))
    if not layers or not fit or layers[-1][0].shape[0] != 1:
        raise UserError(f"{file} is no aesthetic predictor: its layers do not lead from features to one number")
    return layers
