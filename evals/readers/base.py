"""The base class of readers, and what they share: the crop around a line of text, and reading in several threads."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from evals.readers.forms import Score, compared_form

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_ASPECT_RATIO = 48
"""The largest aspect ratio of a page. The readers' detectors scale longer pages to a width of 0 and fail."""
MIN_CONTRAST = 24
"""The smallest difference of text and background in grey levels; with less, nothing is located."""


def locate(image: np.ndarray, margin: int = 3) -> np.ndarray:
    """Cuts out the part of an image that contrasts with its background.

    The background is the median colour of the rim. Pixels that differ from it by more than a third of the largest difference
    are foreground.

    Args:
        image: uint8 [h, w, 3].
        margin: how many pixels around the foreground belong to the part.

    Returns:
        A view of the image; all of it if it has no contrast.
    """
    # Twice a median of integers is an integer, so this is exact, and takes a third of the time of floats.
    twice = np.abs(2 * image.astype(np.int16) - (2 * rim_median(image)).astype(np.int16))
    difference = np.maximum(np.maximum(twice[..., 0], twice[..., 1]), twice[..., 2])
    if difference.max() < 2 * MIN_CONTRAST:
        return image
    foreground = 3 * difference > difference.max()
    ys, xs = np.flatnonzero(foreground.any(axis=1)), np.flatnonzero(foreground.any(axis=0))
    top, left = max(ys[0] - margin, 0), max(xs[0] - margin, 0)
    return image[top : ys[-1] + margin + 1, left : xs[-1] + margin + 1]


def rim_median(image: np.ndarray) -> np.ndarray:
    """Computes the median colour of an image's rim, with each corner counted twice: [h, w, 3] -> float64 [3]."""
    return np.asarray(np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0))


def contrast_image(crop: np.ndarray) -> np.ndarray:
    """Converts a crop to grey by how far each pixel is from its background colour: dark text on light ground.

    Plain grey values cannot distinguish yellow from light blue, but readers of colour images should.

    Args:
        crop: uint8 [h, w, 3].

    Returns:
        uint8 [h, w].
    """
    difference = crop.astype(np.float32) - rim_median(crop)
    distance = np.sqrt((difference**2).sum(axis=2))
    return (255.0 * (1.0 - distance / max(float(distance.max()), 1.0))).astype(np.uint8)


def widened(image: np.ndarray) -> np.ndarray:
    """Pads an image with the colour of its rim until its aspect ratio is at most `MAX_ASPECT_RATIO`; most stay as they are."""
    height, width = image.shape[:2]
    shortest = -(-max(height, width) // MAX_ASPECT_RATIO)
    if min(height, width) >= shortest:
        return image
    page = np.empty((max(height, shortest), max(width, shortest), 3), np.uint8)
    page[:] = rim_median(image).astype(np.uint8)
    top, left = (page.shape[0] - height) // 2, (page.shape[1] - width) // 2
    page[top : top + height, left : left + width] = image
    return page


class Reader(ABC):
    """Reads the text in images. What it reads in an image does not depend on the image's batch."""

    PAGES = 8
    """The largest number of pages at a time. EasyOCR's detector takes 0.6 GiB for a page of 1,024 x 1,024 pixels."""

    @abstractmethod
    def read_lines(self, crops: list[np.ndarray]) -> list[str]:
        """Reads images that contain one line of text each, uint8 [h, w, 3]."""

    @abstractmethod
    def read_page(self, image: np.ndarray) -> str:
        """Reads all text of an image, uint8 [h, w, 3], which the reader's own detector finds, in reading order."""

    @property
    def threads(self) -> int:
        """The number of threads that it may read in: as many as torch may use."""
        return torch.get_num_threads()

    def read_pages(self, images: list[np.ndarray]) -> list[str]:
        """Does what `read_page` does for several images, in threads: a detector can only batch images of one size."""
        pages = [widened(image) for image in images]
        return in_threads(self.read_page, pages, min(self.threads, self.PAGES, len(pages)))

    @abstractmethod
    def alphabet(self) -> Iterable[str]:
        """Lists the characters that its recogniser can return."""

    def unreadable(self, text: str, score: Score) -> list[str]:
        """Lists the characters of a text, in the form that the score compares, that this reader can never return."""
        if score not in self._alphabets:
            self._alphabets[score] = frozenset("".join(compared_form(c, score) for c in self.alphabet()) + " ")
        return sorted(set(compared_form(text, score)) - self._alphabets[score])

    @cached_property
    def _alphabets(self) -> dict[Score, frozenset[str]]:
        return {}

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Describes the reader for the record: version, device, weights."""


def in_threads(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """Calls a function for each item, in several threads.

    If there are enough items for all threads, each computes with its share of the threads that torch may use, because threads
    that share a small item mostly wait for each other. Otherwise the items are computed one after the other.
    """
    if threads <= 1 or len(items) < threads:
        return [function(item) for item in items]
    torch_threads = torch.get_num_threads()
    share = max(torch_threads // threads, 1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(torch_threads)  # or else threads that start later would have only this share


def read_batches(read: Callable[[list[int]], Sequence[str]], batches: Sequence[list[int]], threads: int) -> list[str]:
    """Reads batches of lines, in several threads.

    Args:
        read: takes the indices of one batch and returns its texts.
        batches: the indices of the lines, each in one batch.
        threads: the number of threads.

    Returns:
        The text of each line, in the order of their indices.
    """
    results = in_threads(read, batches, threads)
    texts = {i: text for batch, result in zip(batches, results, strict=True) for i, text in zip(batch, result, strict=True)}
    return [texts[i] for i in range(len(texts))]
