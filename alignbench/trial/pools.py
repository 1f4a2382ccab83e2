"""Pools of images of one prompt, from which the sets of a trial are drawn.

A *condition* is a way in which a set may differ from a free one. A set of degree d has each image with probability d from the
pool's collapsed images, and else from its others. So all degrees and all numbers of images come from the same few images, which
a metric has to read once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy import ndimage

from alignbench.trial.subjects import Subject

DRAWN = "drawn"
"""The source of images by the drawing program."""
EVERYTHING = "everything"
"""The condition in which all attributes have collapsed to one value each, in the same images."""
EQUAL = "nothing"
"""The condition in which nothing has changed."""
FREE, COLLAPSED, REFERENCE = 32, 16, 16
"""Images of a pool: free ones, collapsed ones for each condition, and those that a metric may compare with."""
GRAIN = 2.0
"""Standard deviation of the noise in every drawn image, out of 255: no two images of a model are equal to the bit."""
BLUR, NOISE, LESS, MORE = 1.0, 12.0, 0.7, 1.3
"""Strengths of the changes that leave all attributes: blur in pixels, noise out of 255, factors of the contrast."""
TREATMENTS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "blur": lambda images, rng: ndimage.gaussian_filter(images, (0, BLUR, BLUR, 0), mode="nearest"),
    "noise": lambda images, rng: images + rng.normal(0, NOISE, images.shape),
    "less contrast": lambda images, rng: _contrast(images, LESS),
    "more contrast": lambda images, rng: _contrast(images, MORE),
}
"""Changes of pixels, float64 [N, H, W, 3], that are no loss of diversity."""
MASKS = ("more contrast", "noise")
"""The treatments behind which a collapse of everything is looked for: models that train lose blur and gain contrast."""

Kind = Literal["planted", "harmless", "equal"]
"""What a condition is to a set: a loss of diversity, a change that is none, or no change."""


@dataclass(frozen=True)
class Condition:
    """A way in which a set may differ from a free one.

    Attributes:
        kind: what it is to a set.
        collapsed: the images that have collapsed, indices into the pool.
        others: the images beside them, likewise.
    """

    kind: Kind
    collapsed: np.ndarray
    others: np.ndarray


@dataclass(frozen=True)
class Pool:
    """Images of one prompt.

    Attributes:
        source: where they come from.
        prompt: their prompt.
        images: uint8 [N, H, W, 3].
        latents: their latents, a tensor [N, *latent].
        free: those of the prompt as it is, indices.
        reference: further ones of these, which no set contains.
        conditions: the conditions that this prompt allows.
        labels: attribute -> the value in each image, int [N]; empty where it is not known.
    """

    source: str
    prompt: str
    images: np.ndarray
    latents: Any
    free: np.ndarray
    reference: np.ndarray
    conditions: Mapping[str, Condition]
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)

    def draw_free(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draws a set of n free images: indices."""
        return rng.choice(self.free, size=n, replace=False)

    def draw_treated(self, condition: str, degree: float, without: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
        """Draws a set of a condition that is as large as a free set and has no image in common with it.

        Args:
            condition: the name of the condition.
            degree: the probability of a collapsed image, 0 to 1.
            without: the free set.
            rng: the generator.

        Returns:
            Its indices; None if the pool has too few images for it.
        """
        treated, n = self.conditions[condition], len(without)
        count = int(rng.binomial(n, degree))
        collapsed = _choice(treated.collapsed, without, count, rng)
        others = None if collapsed is None else _choice(treated.others, np.concatenate([without, collapsed]), n - count, rng)
        return None if collapsed is None or others is None else np.concatenate([collapsed, others])


def drawn_pool(subject: Subject, encode: Callable[[np.ndarray], Any], rng: np.random.Generator) -> Pool:
    """Draws the pool of a subject, with a condition for each of its attributes.

    Args:
        subject: the prompt and its attributes.
        encode: computes latents of images.
        rng: the generator.
    """
    builder = Builder()
    dominant = subject.draw_attributes(rng)
    labels: list[dict[str, int]] = []

    def add(count: int, fixed: Mapping[str, int], treatment: str = "") -> np.ndarray:
        drawn = [{**subject.draw_attributes(rng), **fixed} for _ in range(count)]
        labels.extend(drawn)
        return builder.add(grained(np.stack([subject.paint(each, rng) for each in drawn]), rng, treatment))

    free, reference = add(FREE, {}), add(REFERENCE, {})
    collapses = {attribute: {attribute: dominant[attribute]} for attribute in subject.values} | {EVERYTHING: dominant}
    conditions = {name: Condition("planted", add(COLLAPSED, fixed), free) for name, fixed in collapses.items()}
    for treatment in TREATMENTS:
        treated = add(COLLAPSED, {}, treatment)
        conditions[treatment] = Condition("harmless", treated[:0], treated)
        if treatment in MASKS:
            conditions[behind(treatment)] = Condition("planted", add(COLLAPSED, dominant, treatment), treated)
    conditions[EQUAL] = Condition("equal", free[:0], free)
    images = builder.images()
    known = {attribute: np.array([each[attribute] for each in labels]) for attribute in subject.values}
    return Pool(DRAWN, subject.prompt, images, encode(images), free, reference, conditions, known)


def behind(treatment: str) -> str:
    """The name of the condition in which everything collapses while pixels change by a treatment."""
    return f"{EVERYTHING} + {treatment}"


def grained(images: np.ndarray, rng: np.random.Generator, treatment: str = "") -> np.ndarray:
    """Adds `GRAIN` to images and changes them by a treatment, if one is named: uint8 [N, H, W, 3]."""
    return treated(images.astype(np.float64) + rng.normal(0, GRAIN, images.shape), rng, treatment)


def treated(images: np.ndarray, rng: np.random.Generator, treatment: str) -> np.ndarray:
    """Changes images by a treatment, if one is named: uint8 [N, H, W, 3]."""
    changed = TREATMENTS[treatment](images.astype(np.float64), rng) if treatment else images
    return np.clip(np.round(changed), 0, 255).astype(np.uint8)


class Builder:
    """Collects the images of a pool, and knows where each part of them is."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []

    def add(self, images: np.ndarray) -> np.ndarray:
        """Adds images, [N, H, W, 3], and returns their indices."""
        start = sum(map(len, self.parts))
        self.parts.append(images)
        return np.arange(start, start + len(images))

    def images(self) -> np.ndarray:
        """All images."""
        return np.concatenate(self.parts)


def _choice(pool: np.ndarray, without: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray | None:
    """Some of a pool's images without repetition; None if there are too few."""
    left = np.setdiff1d(pool, without)
    return rng.choice(left, size=count, replace=False) if len(left) >= count else None


def _contrast(images: np.ndarray, factor: float) -> np.ndarray:
    """Moves each image's pixels away from its own mean by a factor."""
    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    return np.asarray(mean + factor * (images - mean))
