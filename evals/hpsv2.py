"""hpsv2: how well people would like the image for its prompt, by Human Preference Score v2 (for models of photographs).

The score is the cosine similarity of the embeddings of prompt and image, by an open_clip ViT-H-14 that was tuned on choices; it
is about 0.2 to 0.4. It is computed in float32, where the official package uses half precision. Images that are not square are
padded with black, as is usual in evaluations with it, so that the whole image is scored.

Source: Wu et al. 2023 (arXiv 2306.09341).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from alignbench import Scorer, UserError, settings
from alignbench.backbone import device_named
from alignbench.scorer import Images, as_arrays
from evals.embedders.open_clip import OpenClip, load_open_clip, weights_file, weights_on_hub


class HPSv2(Scorer):
    """Human preference, by an open_clip model."""

    class Settings(settings.Settings):
        weights: str = "xswu/HPSv2/HPS_v2.1_compressed.pt"
        """The checkpoint of HPSv2: a local file, or OWNER/REPOSITORY/FILE on the hub."""
        architecture: str = "ViT-H-14"
        """The architecture in open_clip that the checkpoint belongs to."""
        device: settings.Device = "auto"
        """Device that the model runs on: `auto` (CUDA if there is one, else the CPU), `cpu`, `cuda` or `cuda:N`."""
        batch: int = Field(32, ge=1)
        """The largest number of images in one call of the model. Results do not depend on it."""

    settings: Settings

    @cached_property
    def clip(self) -> OpenClip:
        """The model, which is opened on first use."""
        o, device = self.settings, device_named(self.settings.device)
        return load_open_clip(o.architecture, str(weights_file(o.weights)), device, resize="longest")

    def from_hub(self) -> list[str]:
        return weights_on_hub(self.settings.weights)

    def prepare(self) -> None:
        self.clip  # noqa: B018 - opens it

    @torch.no_grad()
    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        arrays, clip = as_arrays(images), self.clip
        if len(arrays) != len(prompts):
            raise UserError(f"hpsv2 got {len(arrays)} images and {len(prompts)} prompts")
        device = next(clip.model.parameters()).device
        distinct = list(dict.fromkeys(prompts))
        texts: dict[str, Tensor] = {}
        for start in range(0, len(distinct), self.settings.batch):
            batch = distinct[start : start + self.settings.batch]
            features = clip.model.encode_text(clip.tokenizer(batch).to(device))
            texts |= dict(zip(batch, functional.normalize(features, dim=-1), strict=True))
        scores = np.empty(len(arrays))
        for start in range(0, len(arrays), self.settings.batch):
            part = slice(start, start + self.settings.batch)
            pixels = torch.stack([clip.preprocess(Image.fromarray(array)) for array in arrays[part]])
            image = functional.normalize(clip.model.encode_image(pixels.to(device)), dim=-1)
            text = torch.stack([texts[prompt] for prompt in prompts[part]])
            scores[part] = (image * text).sum(dim=1).double().cpu().numpy()
        return scores

    def describe(self) -> dict[str, Any]:
        import open_clip

        return {**super().describe(), "open_clip": open_clip.__version__}
