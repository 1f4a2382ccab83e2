"""Drawn images with prompts as training data, and what is kept from the training."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignbench.embedded.drawing import lettering, scenes


@dataclass(frozen=True)
class Example:
    """A prompt and a drawn image of it, uint8 [64, 64, 3]."""

    prompt: str
    image: np.ndarray


@cache
def held_out_words() -> frozenset[str]:
    """Words of the OCR task's prompts (training, validation, evaluation): the base model is never trained on one of them."""
    folder = Path(__file__).parent.parent / "tasks" / "ocr"
    lines = [line for name in ("train.txt", "validation.txt", "eval.txt") for line in (folder / name).read_text().splitlines()]
    return frozenset(line.split('"')[1] for line in lines if '"' in line)


def is_held_out(metadata: dict[str, Any]) -> bool:
    """Whether a scene is kept from the training of the base model. One prompt in ten is, by a hash of its content."""
    key = json.dumps([metadata["tag"], metadata["include"], metadata["prompt"]], sort_keys=True)
    return hashlib.sha256(key.encode()).digest()[0] % 10 == 0


def draw_examples(
    seed: int,
    shard: int,
    count: int,
    words_share: float,
    single_sizes: tuple[int, ...] = scenes.SIZES[1],
    types: Mapping[str, float] | None = None,
) -> list[Example]:
    """Draws prompts with their images, as a pure function of the arguments; `train_tiny.Phase` explains them."""
    rng = np.random.default_rng([seed, shard])
    exclude = held_out_words()
    frequencies = np.array([(types or {}).get(name, 1.0) for name in scenes.TASK_TYPES])
    chances = frequencies / frequencies.sum() if types else None
    examples: list[Example] = []
    while len(examples) < count:
        if rng.random() < words_share:
            text = lettering.sample_text(rng, exclude)
            prompt, color = lettering.sample_prompt(rng, text)
            examples.append(Example(prompt, lettering.sample_lettering(rng, text, color).draw()))
        else:
            metadata = scenes.sample_metadata(rng, str(rng.choice(scenes.TASK_TYPES, p=chances)))
            if not is_held_out(metadata):
                examples.append(Example(metadata["prompt"], scenes.sample_scene(rng, metadata, single_sizes).draw()))
    return examples


def to_pixels(images: list[np.ndarray]) -> Tensor:
    """Converts uint8 images [H, W, 3] to a batch, float32 [N, 3, H, W], with values from -1 to 1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
