"""aesthetic: how beautiful people would find the image, from 1 to 10, whatever its prompt (for models of photographs).

The predictor consists of linear layers on the unit features of OpenAI's CLIP ViT-L/14, trained on ratings.

Source: LAION's improved aesthetic predictor. Its weights, `sac+logos+ava1-l14-linearMSE.pth`, are in its repository,
github.com/christophschuhmann/improved-aesthetic-predictor.
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
"""The weight [out, in] and the bias [out] of a linear layer."""


class Aesthetic(ClipScorer):
    """Aesthetic rating, by linear layers on CLIP features."""

    class Settings(ClipScorer.Settings):
        weights: str = "sac+logos+ava1-l14-linearMSE.pth"
        """The weights of the predictor: a local file, or OWNER/REPOSITORY/FILE on the hub."""
        model: str = "openai/clip-vit-large-patch14"
        """The CLIP model: a local folder that CLIPModel can open, or a hub id."""

    settings: Settings

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers of the predictor, in float32. Between them is only dropout, which does nothing in evaluation.

        Raises:
            UserError: the weights cannot be read, or are not those of a predictor for this CLIP.
        """
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
        self.layers  # noqa: B018 - opens them and the CLIP model

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        layers, values = self.layers, self.clip.image_features(as_arrays(images))
        for weight, bias in layers:
            values = functional.linear(values, weight, bias)
        return values[:, 0].double().numpy()


def read_layers(name: str) -> list[Layer]:
    """Reads the linear layers `layers.N.weight` and `layers.N.bias` of a predictor, in their order.

    Args:
        name: a local file, or OWNER/REPOSITORY/FILE on the hub.

    Raises:
        UserError: there is no such file, or it does not contain layers that lead from features to one number.
    """
    file = weights_file(name)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        numbers = sorted(int(match[1]) for key in state if (match := re.fullmatch(r"layers\.(\d+)\.weight", key)))
        layers = [(state[f"layers.{n}.weight"].float(), state[f"layers.{n}.bias"].float()) for n in numbers]
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise UserError(f"{file} is not an aesthetic predictor: {type(error).__name__}: {first_line(error)}") from error
    fit = all(after.shape[1] == before.shape[0] for (before, _), (after, _) in pairwise(layers))
    if not layers or not fit or layers[-1][0].shape[0] != 1:
        raise UserError(f"{file} is not an aesthetic predictor: its layers do not lead from features to one number")
    return layers
