"""Features of images for diversity: from CLIP models of transformers, CLIP models of open_clip, or DINOv2."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alignbench import UserError
from alignbench.backbone import device_named
from evals.embedders.clip import load_clip, sources
from evals.embedders.open_clip import load_open_clip, tag_on_hub
from evals.embedders.pretrained import open_pretrained
from evals.embedders.processors import middle

Features = Callable[[Sequence[np.ndarray]], Tensor]
"""A function from images, uint8 [h, w, 3] each, to features, float32 [N, D]."""

KINDS = ("clip", "open_clip", "dinov2")
"""What the name of features can begin with."""


@cache
def load_features(source: str, device: str, batch: int) -> Features:
    """Opens the model whose features `source` names.

    Args:
        source: `clip:tiny` for the small CLIP that ships with the package; `clip:NAME` or `dinov2:NAME` (its CLS token) with a
            local folder or a hub id; or `open_clip:MODEL/WEIGHTS` with a tag or a local file.
        device: the device that the model runs on.
        batch: the largest number of images in one call of the model.

    Raises:
        UserError: `source` names no features, or the model cannot be opened.
    """
    kind, name = _kind_and_name(source)
    if kind == "clip":
        return load_clip(name, device, batch).image_features
    torch_device = device_named(device)
    embed = _open_clip(name, torch_device) if kind == "open_clip" else _dinov2(name, torch_device)

    @torch.no_grad()
    def features(images: Sequence[np.ndarray]) -> Tensor:
        pil_images = [Image.fromarray(middle(image)) for image in images]
        return torch.cat([embed(pil_images[i : i + batch]).float().cpu() for i in range(0, len(pil_images), batch)])

    return features


def features_on_hub(source: str) -> list[str]:
    """Names what `load_features` loads from the hub; raises UserError if `source` names no features."""
    kind, name = _kind_and_name(source)
    if kind == "clip":
        return sources(name)
    return tag_on_hub(*_architecture_and_weights(name)) if kind == "open_clip" else [name]


def _kind_and_name(source: str) -> tuple[str, str]:
    kind, _, name = source.partition(":")
    if kind not in KINDS or not name:
        raise UserError(f"features must be one of {', '.join(f'{k}:NAME' for k in KINDS)}, got {source!r}")
    return kind, name


def _architecture_and_weights(name: str) -> tuple[str, str]:
    architecture, _, weights = name.partition("/")
    if not weights:
        raise UserError(f"open_clip:{name} must be open_clip:MODEL/WEIGHTS, for instance open_clip:ViT-L-14/openai")
    return architecture, weights


def _open_clip(name: str, device: torch.device) -> Callable[[list[Image.Image]], Tensor]:
    architecture, weights = _architecture_and_weights(name)
    clip = load_open_clip(architecture, weights, device)
    return lambda images: clip.model.encode_image(torch.stack([clip.preprocess(image) for image in images]).to(device))


def _dinov2(name: str, device: torch.device) -> Callable[[list[Image.Image]], Tensor]:
    model, processor = open_pretrained("Dinov2Model", "AutoImageProcessor", name, "DINOv2")
    model.to(device)
    return lambda images: model(**processor(images=images, return_tensors="pt").to(device)).last_hidden_state[:, 0]
