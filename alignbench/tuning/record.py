"""The record of a tuning, `tuning.json`: every trial with its settings and its scores."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from alignbench.records.base import Document, Number, Record
from alignbench.tuning.planning import TuningRequest

RECORD = "tuning.json"


class TrialRecord(Record):
    """One trial of a method."""

    trial: int
    """Number of the trial; 0 is the one with the preset's own settings."""
    settings: dict[str, int | float]
    """Dotted key -> value for every setting that is tuned."""
    place: list[float]
    """Position in the range of each setting, 0 to 1, in the order of the settings; empty for trial 0."""
    scores: list[Number]
    """The score with each tuning seed; null where that run has not finished."""
    error: str | None = None
    """Why a run of the trial failed."""

    @property
    def score(self) -> float | None:
        """The mean score over the tuning seeds; None unless all runs have finished with a score."""
        present = [score for score in self.scores if score is not None]
        return float(np.mean(present)) if present and len(present) == len(self.scores) else None


class MethodRecord(Record):
    """The trials of an objective with a sampler."""

    objective: str
    """Name or label."""
    sampler: str
    """Name or label."""
    trials: list[TrialRecord]

    def __str__(self) -> str:
        return f"{self.objective} x {self.sampler}"

    @property
    def scored(self) -> list[TrialRecord]:
        """The trials that have a score."""
        return [trial for trial in self.trials if trial.score is not None]

    @property
    def best(self) -> TrialRecord | None:
        """The trial with the highest score, or the first of equal ones; None if no trial has a score."""
        return max(self.scored, key=lambda trial: trial.score or 0.0, default=None)

    @property
    def median(self) -> float | None:
        """The median score of the trials that have one."""
        scores = [trial.score for trial in self.scored if trial.score is not None]
        return float(np.median(scores)) if scores else None


class TuningRecord(Document):
    """The record of a tuning, `tuning.json`."""

    KIND: ClassVar[str] = "record of a tuning"

    request: TuningRequest
    scored_by: str
    """What a score means, in words. A higher score is better."""
    prompts: int
    """Number of validation prompts on which each trial was evaluated."""
    methods: list[MethodRecord]

    @property
    def failed(self) -> list[tuple[MethodRecord, TrialRecord]]:
        """The trials with a failed run, each with its method."""
        return [(method, trial) for method in self.methods for trial in method.trials if trial.error]


def best_first(methods: Sequence[MethodRecord], trial: int | None = None) -> list[MethodRecord]:
    """Sorts methods by score, in descending order; methods without that score are left out.

    Args:
        methods: the methods.
        trial: number of the trial whose score counts; None for the best one of each method.
    """

    def score(method: MethodRecord) -> float | None:
        chosen = method.best if trial is None else method.trials[trial]
        return chosen.score if chosen else None

    scored = [(value, method) for method in methods if (value := score(method)) is not None]
    return [method for _, method in sorted(scored, key=lambda pair: -pair[0])]
