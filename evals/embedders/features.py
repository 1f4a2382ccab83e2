"""Features of pictures for diversity: CLIP through transformers, CLIP through open_clip, or DINOv2."""

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
"""Pictures, each uint8 [h, w, 3], to features [N, D]."""

KINDS = ("clip", "open_clip", "dinov2")


@cache
def load_features(source: str, device: str, batch: int) -> Features:
    """The features that `source` names.

    Args:
        source: `clip:tiny` for the small CLIP that ships, `clip:NAME`, `dinov2:NAME` (its CLS token) with a local folder or
            a hub id, or `open_clip:MODEL/WEIGHTS` with a tag or a local file.

    Raises:
        UserError: it names nothing that opens.
    """
    kind, name = _kind_and_name(source)
    if kind == "clip":
        return load_clip(name, device, batch).pictures
    on = device_named(device)
    embed = _open_clip(name, on) if kind == "open_clip" else _dinov2(name, on)

    @torch.no_grad()
    def features(pictures: Sequence[np.ndarray]) -> Tensor:
        images = [Image.fromarray(middle(picture)) for picture in pictures]
        return torch.cat([embed(images[i : i + batch]).float().cpu() for i in range(0, len(images), batch)])

    return features


def features_on_hub(source: str) -> list[str]:
    """What `load_features` loads from the hub; raises UserError where `source` names no features."""
    kind, name = _kind_and_name(source)
    if kind == "clip":
        return sources(name)
    return tag_on_hub(*_architecture_and_weights(name)) if kind == "open_clip" else [name]


def _kind_and_name(source: str) -> tuple[str, str]:
    kind, _, name = source.partition(":")
    if kind not in KINDS or not name:
        raise UserError(f"features {source!r} are none of {', '.join(f'{k}:NAME' for k in KINDS)}")
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
