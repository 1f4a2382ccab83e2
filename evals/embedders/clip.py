"""CLIP models of transformers: unit features of images and prompts, for scores and for diversity."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn import functional

import alignbench
from alignbench import Scorer, settings
from alignbench.backbone import device_named
from alignbench.scorer import Images, as_arrays
from evals.embedders.pretrained import open_pretrained
from evals.embedders.processors import middle

TINY = "tiny"
"""The name of the small CLIP that ships with the package, for the images of the `tiny` backbone."""
FOLDERS = {TINY: Path(alignbench.__file__).parent / "backbones" / "weights" / "pickscore"}
"""Name -> folder of the models that ship with the package."""
PROCESSORS = {"yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
"""Models that are used with the processor of another model -> that model."""
MAX_TOKENS = 77
"""The number of tokens at which a prompt is cut, unless the model's own limit is lower."""


def sources(name: str) -> list[str]:
    """Names the sources of a model and its processor (folders or hub ids); none for a model that ships with the package."""
    return [] if name in FOLDERS else [name, *filter(None, [PROCESSORS.get(name)])]


class Clip:
    """A CLIP model in float32. The features of an image or prompt do not depend on its batch, except for rounding.

    Attributes:
        scale: exp(logit_scale), by which similarities are multiplied in training.
        tokens: the number of tokens at which a prompt is cut.

    Raises:
        UserError: the model cannot be opened.
    """

    def __init__(self, name: str, device: str, batch: int) -> None:
        self.name, self.batch = name, batch
        self.device = device_named(device)
        self.model, self.processor = open_pretrained(
            "CLIPModel", "CLIPProcessor", str(FOLDERS.get(name, name)), "CLIP model", processor_from=PROCESSORS.get(name)
        )
        self.model.to(self.device)
        self.scale = float(self.model.logit_scale.exp())
        self.tokens = min(MAX_TOKENS, self.model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def image_features(self, images: Sequence[np.ndarray]) -> Tensor:
        """Computes unit features of images: uint8 [h, w, 3] each -> float32 [N, D]."""
        parts = [torch.empty(0, self.model.config.projection_dim)]
        for start in range(0, len(images), self.batch):
            # They are passed as PIL images because in an array three pixels high the colour axis would be ambiguous.
            batch = [Image.fromarray(middle(image)) for image in images[start : start + self.batch]]
            pixels = self.processor.image_processor(images=batch, return_tensors="pt")["pixel_values"]
            parts.append(_unit(self.model.get_image_features(pixel_values=pixels.to(self.device))))
        return torch.cat(parts)

    @torch.no_grad()
    def prompt_features(self, prompts: Sequence[str]) -> Tensor:
        """Computes unit features of prompts: float32 [N, D]. Each distinct prompt is encoded once."""
        distinct = list(dict.fromkeys(prompts))
        parts = [torch.empty(0, self.model.config.projection_dim)]
        for start in range(0, len(distinct), self.batch):
            batch = distinct[start : start + self.batch]
            tokens = self.processor.tokenizer(batch, padding=True, truncation=True, max_length=self.tokens, return_tensors="pt")
            ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
            parts.append(_unit(self.model.get_text_features(input_ids=ids, attention_mask=mask)))
        index = {prompt: i for i, prompt in enumerate(distinct)}
        return torch.cat(parts)[[index[prompt] for prompt in prompts]]

    def describe(self) -> dict[str, Any]:
        """Describes the model, its device and the version of transformers."""
        import transformers

        return {"model": self.name, "device": str(self.device), "transformers": transformers.__version__}


@cache
def load_clip(name: str, device: str, batch: int) -> Clip:
    """Opens a CLIP model once for all evals that use it.

    Args:
        name: `tiny`, a local folder, or a hub id.
        device: the device that it runs on.
        batch: the largest number of images or prompts in one call.

    Raises:
        UserError: it cannot be opened.
    """
    return Clip(name, device, batch)


class ClipScorer(Scorer):
    """The base class of scorers that use a CLIP model."""

    class Settings(settings.Settings):
        model: str = TINY
        """The CLIP model: `tiny`, a local folder that CLIPModel can open, or a hub id."""
        device: settings.Device = "auto"
        """Device that the model runs on: `auto` (CUDA if there is one, else the CPU), `cpu`, `cuda` or `cuda:N`."""
        batch: int = Field(64, ge=1)
        """The largest number of images in one call of the model. Results do not depend on it."""

    settings: Settings

    @property
    def clip(self) -> Clip:
        """The model, which is opened on first use."""
        return load_clip(self.settings.model, self.settings.device, self.settings.batch)

    def similarity(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Computes the cosine similarity of each image with its prompt: float32 [N], on the CPU."""
        arrays = as_arrays(images)
        return (self.clip.prompt_features(prompts) * self.clip.image_features(arrays)).sum(dim=1)

    def from_hub(self) -> list[str]:
        return sources(self.settings.model)

    def prepare(self) -> None:
        self.clip  # noqa: B018 - opens it

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **self.clip.describe()}


def _unit(output: Any) -> Tensor:
    """The projected features, normalised: transformers 4 returns them, transformers 5 an object that contains them."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return functional.normalize(features.float().cpu(), dim=-1)
