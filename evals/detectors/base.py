"""The base class of object detectors, and detections as plain data that do not depend on the detector."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np

from evals.detectors.grammar import Grammar


class Detection(TypedDict):
    """One object that was found in an image."""

    box: Sequence[float]
    """[x0, y0, x1, y1] in pixels, with x to the right and y down."""
    score: float
    """The detector's confidence, 0 to 1."""
    color: NotRequired[str]
    """One of GenEval's ten colour names; only colour clauses need it."""


Detections = Mapping[str, Sequence[Detection]]
"""Class -> the objects of that class, best first."""


class Detector(ABC):
    """Finds objects in images. The detections of an image do not depend on its batch."""

    classes: frozenset[str]
    """The classes of objects that it can find."""
    colors: frozenset[str]
    """The colours that it can name."""
    grammar: Grammar
    """The grammar of prompts about these objects."""

    @abstractmethod
    def detect(self, images: list[np.ndarray], colored: Sequence[Collection[str]] | None = None) -> list[Detections]:
        """Finds the objects in each image.

        Args:
            images: uint8 [h, w, 3] each.
            colored: for each image the classes whose colours are needed; None for all classes. A detector for which colours
                cost nothing names all of them.
        """

    def considered(self, detections: Detections, metadata: Mapping[str, Any]) -> Detections:
        """Selects the detections that count for a prompt with this metadata; by default all of them."""
        return detections

    @abstractmethod
    def golden(self) -> list[tuple[np.ndarray, dict[str, Any], bool]]:
        """Returns images, metadata, and whether the image fulfils it. A detector that is set up wrongly fails on them."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Describes the detector for the record: model, device, thresholds."""
