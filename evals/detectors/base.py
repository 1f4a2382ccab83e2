"""What a detector of objects answers: detections as plain data, whichever model or rule found them."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np

from evals.detectors.grammar import Grammar


class Detection(TypedDict):
    """One object that was found."""

    box: Sequence[float]
    """[x0, y0, x1, y1] in pixels, x to the right, y down."""
    score: float
    color: NotRequired[str]
    """One of GenEval's eleven names; only colour clauses need it."""


Detections = Mapping[str, Sequence[Detection]]
"""Class -> what was found of it, best first."""


class Detector(ABC):
    """Finds objects in pictures. The answer for a picture does not depend on what it is batched with."""

    classes: frozenset[str]
    """What it can find."""
    colors: frozenset[str]
    """The colours that it can name."""
    grammar: Grammar
    """Of prompts about what it can find."""

    @abstractmethod
    def detect(self, images: list[np.ndarray], colored: Sequence[Collection[str]] | None = None) -> list[Detections]:
        """What each picture shows.

        Args:
            images: uint8 [h, w, 3] each.
            colored: for each picture the classes whose colours will be asked for; None for all. A detector to which
                colours cost nothing gives them all.
        """

    def considered(self, detections: Detections, metadata: Mapping[str, Any]) -> Detections:
        """Those of the detections that count for this prompt; all of them by default."""
        return detections

    @abstractmethod
    def golden(self) -> list[tuple[np.ndarray, dict[str, Any], bool]]:
        """Pictures with metadata and whether they fulfil it: a detector set up wrongly fails on them."""

    @abstractmethod
    def describe(self) -> dict[str, Any]: ...
