"""hpsv2: how well people would like the picture for its prompt, by Human Preference Score v2 (for models of photographs).

Wu et al. 2023 (arXiv 2306.09341): the cosine of the embeddings of prompt and picture by an open_clip ViT-H-14 that was tuned
on choices, about 0.2 to 0.4. In float32, where the official package computes in half precision. Pictures that are not square
are padded with black, as those who evaluate with it do, so that all of the picture is judged.
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
    class Settings(settings.Settings):
        weights: str = "xswu/HPSv2/HPS_v2.1_compressed.pt"
        """A checkpoint of HPSv2: a local file, or OWNER/REPOSITORY/FILE on the hub."""
        architecture: str = "ViT-H-14"
        """Of open_clip."""
        device: settings.Device = "auto"
        """Device that the model runs on; `auto` takes CUDA where there is one."""
        batch: int = Field(32, ge=1)
        """Images in one call of the model; results do not depend on it."""

    settings: Settings

    @cached_property
    def clip(self) -> OpenClip:
        o, device = self.settings, device_named(self.settings.device)
        return load_open_clip(o.architecture, str(weights_file(o.weights)), device, resize="longest")

    def from_hub(self) -> list[str]:
        return weights_on_hub(self.settings.weights)

    def prepare(self) -> None:
        self.clip  # noqa: B018  (loads it)

    @torch.no_grad()
    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        pictures, clip = as_arrays(images), self.clip
        if len(pictures) != len(prompts):
            raise UserError(f"hpsv2 got {len(pictures)} pictures and {len(prompts)} prompts")
        device = next(clip.model.parameters()).device
        distinct = list(dict.fromkeys(prompts))
        texts: dict[str, Tensor] = {}
        for start in range(0, len(distinct), self.settings.batch):
            some = distinct[start : start + self.settings.batch]
            embedded = clip.model.encode_text(clip.tokenizer(some).to(device))
            texts |= dict(zip(some, functional.normalize(embedded, dim=-1), strict=True))
        scores = np.empty(len(pictures))
        for start in range(0, len(pictures), self.settings.batch):
            part = slice(start, start + self.settings.batch)
            pixels = torch.stack([clip.preprocess(Image.fromarray(picture)) for picture in pictures[part]])
            image = functional.normalize(clip.model.encode_image(pixels.to(device)), dim=-1)
            text = torch.stack([texts[prompt] for prompt in prompts[part]])
            scores[part] = (image * text).sum(dim=1).double().cpu().numpy()
        return scores

    def describe(self) -> dict[str, Any]:
        import open_clip

        return {**super().describe(), "open_clip": open_clip.__version__}
