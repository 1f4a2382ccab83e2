"""Generates prompts in GenEval's six task types (arXiv 2310.11513), about COCO's objects or about drawn scenes.

Each prompt comes with the metadata of what its image must show. The format is that of GenEval's own list, which its tools and
the eval `geneval` read: `tag`, `include`, `exclude`, `prompt`.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alignbench.embedded.drawing import scenes
from alignbench.embedded.drawing.palette import COLORS
from alignbench.embedded.drawing.scenes import NUMBERS, RELATIONS, TASK_TYPES
from alignbench.errors import UserError, did_you_mean
from alignbench.files.text import prompt_identity
from alignbench.files.writing import write_new
from alignbench.tasks import coco
from alignbench.tasks.prompts import interleaved

Metadata = dict[str, Any]

OFFICIAL_COUNTS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
"""Number of prompts of each task type in GenEval's own list."""
MAX_MISSES = 1000
"""A task type counts as exhausted after this many draws in a row without a new prompt."""


def sample_coco_metadata(rng: np.random.Generator, tag: str) -> Metadata:
    """Draws a prompt about COCO's objects by GenEval's rules: two classes or colours differ, and no person has a colour.

    Args:
        rng: the generator.
        tag: the task type.

    Returns:
        The prompt with its metadata.
    """
    classes = {"counting": coco.COUNTED, "colors": coco.COLORED, "color_attr": coco.COLORED}.get(tag, coco.CLASSES)
    a, b = (str(name) for name in rng.choice(classes, size=2, replace=False))
    c, d = (str(name) for name in rng.choice(list(COLORS), size=2, replace=False))
    count, relation = int(rng.choice(list(NUMBERS))), str(rng.choice(list(RELATIONS)))
    metadata = scenes.compose(tag, (a, b), (c, d), count, relation, coco.plural)
    return {**metadata, "prompt": f"a photo of {metadata['prompt']}"}


SAMPLERS: dict[str, Callable[[np.random.Generator, str], Metadata]] = {
    "coco": sample_coco_metadata,
    "drawn": scenes.sample_metadata,
}
"""What prompts can be about -> the function that draws one prompt of a task type."""


def generate(objects: str, counts: Mapping[str, int], seed: int, exclude: Collection[str] = ()) -> list[Metadata]:
    """Generates distinct prompts. Task types take turns, so that any first part of the list has some of each.

    Args:
        objects: `coco` or `drawn`.
        counts: task type -> number of prompts; there are fewer if the type does not have that number.
        seed: seed of the generator.
        exclude: prompts that must not be generated.

    Returns:
        The prompts with their metadata.

    Raises:
        UserError: `objects` is unknown.
    """
    if objects not in SAMPLERS:
        raise UserError(f"there are no prompts about {objects!r}{did_you_mean(objects, SAMPLERS)}")
    by_type: list[list[Metadata]] = []
    for number, tag in enumerate(TASK_TYPES):
        rng, taken, misses = np.random.default_rng([seed, number]), set(map(prompt_identity, exclude)), 0
        entries: list[Metadata] = []
        while len(entries) < counts.get(tag, 0) and misses < MAX_MISSES:
            metadata = SAMPLERS[objects](rng, tag)
            identity = prompt_identity(metadata["prompt"])
            misses = misses + 1 if identity in taken else 0
            if not misses:
                taken.add(identity)
                entries.append(metadata)
        by_type.append(entries)
    return interleaved(by_type)


def write(entries: list[Metadata], file: Path) -> None:
    """Writes prompts with their metadata as JSON lines; raises UserError if the file exists."""
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    write_new(file, lambda p: p.write_text(lines, encoding="utf-8"))
