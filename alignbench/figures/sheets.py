"""Sheets of sample images of a run."""

from math import ceil, sqrt
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from alignbench.figures.metric_names import axis_name
from alignbench.figures.style import STYLE
from alignbench.files.escaping import visible
from alignbench.scorer import CLIPS

if TYPE_CHECKING:
    from alignbench.evaluation.evaluate import Evaluation

SHEET_PIXELS = 2**26
"""Largest number of pixels of a sheet of samples."""
SIDE, ACROSS = 256, 4096
"""Largest side of an image and largest width of a row of images in `before_after`, in pixels."""


def before_after(base: "Evaluation", final: "Evaluation", reward: str, images_per_prompt: int, prompts: int = 10) -> Figure:
    """Draws images of the base (left) and trained model (right) for the same prompts and noise, with their rewards."""
    n, count = images_per_prompt, min(prompts, len(base.prompts))
    scores = [
        e.table[e.table.metric == reward].pivot(index="prompt_index", columns="image", values="value") for e in (base, final)
    ]
    with plt.rc_context(STYLE):
        # One image for all: laying out separate axes for every image takes seconds.
        drawn = [squares(e.images[: count * n]) for e in (base, final)]
        size = drawn[0].shape[1]
        factor = max(ceil(size / SIDE), ceil(2 * n * size / ACROSS))
        before, after = (_shrunk(images, factor) for images in drawn)
        size = before.shape[1]
        gap = size // 3
        width = 2 * n * size + gap
        sheet = np.full((count * (size + gap), width, 3), 255, dtype=np.uint8)
        figure, axis = plt.subplots(figsize=(3 + width / 90, count * (size + gap) / 90 + 0.4))
        figure.subplots_adjust(left=2.8 / (3 + width / 90), right=0.99, top=0.95, bottom=0.01)
        for p in range(count):
            top = p * (size + gap) + gap
            for side, shown in enumerate((before, after)):
                for i in range(n):
                    left = i * size + side * (n * size + gap)
                    sheet[top : top + size, left : left + size] = shown[p * n + i]
                    score = float(scores[side].to_numpy()[p, i])
                    axis.text(left + size / 2, top - 2, f"{score:.2f}", fontsize=6, ha="center", va="bottom")
            at = (-gap / 2, top + size / 2)
            axis.text(*at, visible(base.prompts[p]), fontsize=7, ha="right", va="center")
        axis.imshow(sheet)
        axis.axis("off")
        figure.suptitle(
            f"base model (left), trained model (right), same noise; above each image its {visible(axis_name(reward))}",
            fontsize=8,
        )
    return figure


def grid(images: np.ndarray, columns: int, scale: int = 2) -> Image.Image:
    """Arranges images, uint8 [N, H, W, 3], or clips on one sheet, with a block of columns for each prompt.

    Small images are enlarged without smoothing. Large ones are reduced by an integer factor so that the sheet has at most
    SHEET_PIXELS, which viewers and reports can open.

    Args:
        images: the images.
        columns: number of images per prompt.
        scale: factor by which small images are enlarged.
    """
    wide = columns * max(1, 16 // columns)
    images = squares(images)
    missing = -len(images) % wide
    pixels = (len(images) + missing) * images.shape[1] * images.shape[2]
    images = _shrunk(images, ceil(sqrt(pixels / SHEET_PIXELS)))
    padded = np.concatenate([images, np.full((missing, *images.shape[1:]), 255, dtype=np.uint8)])
    rows = padded.reshape(-1, wide, *images.shape[1:])
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    image = Image.fromarray(sheet)
    return (
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        if images.shape[1] <= 128 and pixels * scale**2 <= SHEET_PIXELS
        else image
    )


def squares(images: np.ndarray) -> np.ndarray:
    """Images as sheets and drawings show them, uint8 [N, S, S, 3]: the frames of a clip side by side in rows, white at the end.

    Args:
        images: uint8 [N, H, W, 3], or clips [N, F, H, W, 3].
    """
    if images.ndim == CLIPS:
        n, frames, height, width = images.shape[:4]
        across = ceil(sqrt(frames * height / width))
        rows = ceil(frames / across)
        tiles = np.full((n, rows * across, height, width, 3), 255, dtype=np.uint8)
        tiles[:, :frames] = images
        images = tiles.reshape(n, rows, across, height, width, 3).swapaxes(2, 3).reshape(n, rows * height, across * width, 3)
    height, width = images.shape[1:3]
    side = max(height, width)
    return (
        images
        if height == width
        else np.pad(images, ((0, 0), (0, side - height), (0, side - width), (0, 0)), constant_values=255)
    )


def _shrunk(images: np.ndarray, factor: int) -> np.ndarray:
    """Images, uint8 [N, H, W, 3], reduced by an integer factor; unchanged if it is at most 1."""
    return images if factor <= 1 else np.stack([np.asarray(Image.fromarray(image).reduce(factor)) for image in images])
