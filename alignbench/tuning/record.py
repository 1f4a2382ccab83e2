"""The record of a tuning, `tuning.json`: every trial with its settings and its scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from alignbench.records.base import Document, Number, Record
from alignbench.tuning.planning import TuningRequest

RECORD = "tuning.json"


class TrialRecord(Record):
    """One trial of a method."""

    trial: int
    """0 is the trial with the preset's own settings."""
    settings: dict[str, int | float]
    """Dotted key -> value, of every setting that is tuned."""
    place: list[float]
    """Where the trial lies in each setting's range, 0 to 1, in the order of the settings; empty for trial 0."""
    scores: list[Number]
    """The score with each tuning seed; null where that run has not finished."""
    error: str | None = None
    """Why a run of the trial failed."""

    @property
    def score(self) -> float | None:
        """The mean over the tuning seeds; None unless all runs have finished with a score."""
        known = [score for score in self.scores if score is not None]
        return float(np.mean(known)) if known and len(known) == len(self.scores) else None


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
        """The trial with the highest score, the first of equal ones; None where none has a score."""
        return max(self.scored, key=lambda trial: trial.score or 0.0, default=None)

    @property
    def median(self) -> float | None:
        """The median score of the trials that have one."""
        scores = [trial.score for trial in self.scored if trial.score is not None]
        return float(np.median(scores)) if scores else None


class TuningRecord(Document):
    """`tuning.json`."""

    KIND: ClassVar[str] = "record of a tuning"

    request: TuningRequest
    scored_by: str
    """What a score is, in words. Higher is better."""
    prompts: int
    """Validation prompts that each trial was evaluated on."""
    methods: list[MethodRecord]

    @property
    def failed(self) -> list[tuple[MethodRecord, TrialRecord]]:
        """The trials of which a run failed, with their methods."""
        return [(method, trial) for method in self.methods for trial in method.trials if trial.error]


def best_first(methods: Sequence[MethodRecord], trial: int | None = None) -> list[MethodRecord]:
    """The methods in descending order of their best score, or of the score of one trial; those without it are left out."""

    def score(method: MethodRecord) -> float | None:
        chosen = method.best if trial is None else method.trials[trial]
        return chosen.score if chosen else None

    known = [(value, method) for method in methods if (value := score(method)) is not None]
    return [method for _, method in sorted(known, key=lambda pair: -pair[0])]


def read_tuning(folder: Path) -> TuningRecord:
    """The record in a tuning's folder.

    Raises:
        UserError: it cannot be read, or is not such a record.
    """
    return TuningRecord.read(folder / RECORD)
