"""A CLIP through transformers: unit features of pictures and prompts, for scores and for diversity."""

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
from evals.embedders.pretrained import open_pretrained
from evals.embedders.processors import middle

TINY = "tiny"
"""The name of the small CLIP that ships, for the pictures of the `tiny` backbone."""
FOLDERS = {TINY: Path(alignbench.__file__).parent / "backbones" / "weights" / "pickscore"}
PROCESSORS = {"yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
"""Models whose processor is that of another one."""
MAX_TOKENS = 77


def sources(name: str) -> list[str]:
    """Where the model of that name and its processor are loaded from, if not from a folder of this project."""
    return [] if name in FOLDERS else [name, *filter(None, [PROCESSORS.get(name)])]


class Clip:
    """Features in float32; those of a picture or prompt do not depend on what it is batched with, within rounding.

    Attributes:
        scale: exp(logit_scale).
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
    def pictures(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Unit features [N, D] of pictures, each uint8 [h, w, 3]."""
        parts = [torch.empty(0, self.model.config.projection_dim)]
        for start in range(0, len(pictures), self.batch):
            # As PIL images: of an array three pixels high it is not plain which side holds the colours.
            images = [Image.fromarray(middle(picture)) for picture in pictures[start : start + self.batch]]
            pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
            parts.append(_unit(self.model.get_image_features(pixel_values=pixels.to(self.device))))
        return torch.cat(parts)

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit features [N, D]; each distinct prompt is encoded once."""
        distinct = list(dict.fromkeys(prompts))
        parts = [torch.empty(0, self.model.config.projection_dim)]
        for start in range(0, len(distinct), self.batch):
            part = distinct[start : start + self.batch]
            found = self.processor.tokenizer(part, padding=True, truncation=True, max_length=self.tokens, return_tensors="pt")
            ids, mask = found["input_ids"].to(self.device), found["attention_mask"].to(self.device)
            parts.append(_unit(self.model.get_text_features(input_ids=ids, attention_mask=mask)))
        index = {prompt: i for i, prompt in enumerate(distinct)}
        return torch.cat(parts)[[index[prompt] for prompt in prompts]]

    def describe(self) -> dict[str, Any]:
        import transformers

        return {"model": self.name, "device": str(self.device), "transformers": transformers.__version__}


@cache
def load_clip(name: str, device: str, batch: int) -> Clip:
    """The model of that name, once for all evals that use it.

    Raises:
        UserError: it cannot be opened.
    """
    return Clip(name, device, batch)


class ClipScorer(Scorer):
    """What scorers share that look through a CLIP."""

    class Settings(settings.Settings):
        model: str = TINY
        """`tiny`, a local folder that CLIPModel opens, or a hub id."""
        device: settings.Device = "auto"
        """Device that the model runs on; `auto` takes CUDA where there is one."""
        batch: int = Field(64, ge=1)
        """Images in one call of the model; results do not depend on it."""

    settings: Settings

    @property
    def clip(self) -> Clip:
        return load_clip(self.settings.model, self.settings.device, self.settings.batch)

    def from_hub(self) -> list[str]:
        return sources(self.settings.model)

    def prepare(self) -> None:
        self.clip  # noqa: B018  (loads it)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **self.clip.describe()}


def _unit(answer: Any) -> Tensor:
    """The projected features: transformers 4 answers with them, 5 with an object that holds them."""
    features = answer if isinstance(answer, Tensor) else answer.pooler_output
    return functional.normalize(features.float().cpu(), dim=-1)
