"""The means and intervals of a run's record, computed again from the scores of its images."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from alignbench.evaluation.evaluate import COLUMNS, Evaluation, metric_changes
from alignbench.records.record import Estimate, MetricRecord, Result
from alignbench.records.tables import EVALS

ROUNDING = 1e-9
"""Relative difference of two sums of the same numbers in float64 by different versions of the libraries."""
ROUNDING_OF_P = 1e-6
"""The same of a p value, which depends on the tail of a distribution."""
OVERALL = "_overall"
"""What ends the name of a metric that is the mean of other metrics, its parts."""


def missing_rows(table: pd.DataFrame, result: Result, folder: Path) -> Iterator[str]:
    """A sentence for each metric whose rows in `evals.parquet` are not one for each prompt, or for each image.

    Args:
        table: the table of the run's evaluations.
        result: the run's record.
        folder: the run's folder, for messages.
    """
    prompts, images = result.protocol.prompts, result.protocol.images_per_prompt
    for (phase, metric), part in table.groupby(["phase", "metric"], sort=False):
        of_prompt = bool((part["image"] == -1).all())
        numbers = [-1] if of_prompt else range(images)
        expected = {(p, image) for p in range(prompts) for image in numbers}
        found = set(zip(part["prompt_index"], part["image"], strict=True))
        if found != expected:
            rows = f"{len(found & expected)} of the {len(expected)} rows"
            more = f" and {len(found - expected)} others" if found - expected else ""
            yield f"{folder / EVALS} has {rows}{more} of {metric} ({phase}) that {_sets(prompts, images, of_prompt)} give"


def _sets(prompts: int, images: int, of_prompt: bool) -> str:
    return f"{prompts} prompts" if of_prompt else f"{prompts} prompts with {images} images"


def differing_estimates(table: pd.DataFrame, result: Result, folder: Path) -> Iterator[str]:
    """A sentence for each mean, interval or p value of the record that the scores of the images do not give.

    Args:
        table: the table of the run's evaluations, whose rows are complete.
        result: the run's record.
        folder: the run's folder, for messages.
    """
    recorded = set(table["metric"])
    for metric in result.metrics:
        if metric not in recorded and not parts_of(metric, result, recorded):
            yield f"{folder / EVALS} has no row of {metric}, which is in result.json"
            return
    for metric, computed in recomputed(table, result).items():
        record = result.metrics[metric]
        for name in ("base", "final", "difference"):
            apart = _apart(getattr(record, name), getattr(computed, name))
            if apart is not None:
                key, then, now = apart
                what = f"{metric} {name} {key} {_text(then)}"
                yield f"{folder / 'result.json'} says {what}, but the scores in {EVALS} give {_text(now)}"
        if record.p_rise is not None and not _close(record.p_rise, computed.p_rise, ROUNDING_OF_P):
            what = f"{metric} p_rise {_text(record.p_rise)}"
            yield f"{folder / 'result.json'} says {what}, but the scores in {EVALS} give {_text(computed.p_rise)}"


def recomputed(table: pd.DataFrame, result: Result) -> dict[str, MetricRecord]:
    """The metrics of a record, from the scores of its images.

    Args:
        table: the table of the run's evaluations. Without rows of phase `final`, the trained model is the base model.
        result: the run's record, which says which metrics there are and which of them are parts of others.
    """
    recorded = set(table["metric"])
    phases = {phase: table.loc[table["phase"] == phase, COLUMNS] for phase in ("base", "final")}
    base = _evaluation(phases["base"], result, recorded)
    final = _evaluation(phases["final"], result, recorded) if len(phases["final"]) else base
    return metric_changes(base, final)


def parts_of(metric: str, result: Result, recorded: set[str]) -> tuple[str, ...]:
    """The metrics whose mean a metric is: those of role `part` that share its name up to `_overall`; empty if there are none.

    Args:
        recorded: the metrics that have rows.
    """
    if metric in recorded:
        return ()
    stem = metric.removesuffix(OVERALL)
    return tuple(m for m, r in result.metrics.items() if r.role == "part" and m in recorded and m.startswith(f"{stem}_"))


def _evaluation(table: pd.DataFrame, result: Result, recorded: set[str]) -> Evaluation:
    metrics = result.metrics
    overall = {metric: parts_of(metric, result, recorded) for metric in metrics if metric not in recorded}
    directions = {metric: record.higher_is_better for metric, record in metrics.items()}
    return Evaluation(table, np.empty(0), [], directions, {metric: record.role for metric, record in metrics.items()}, overall)


def _apart(then: Estimate, now: Estimate) -> tuple[str, float | None, float | None] | None:
    """The first key in which two estimates differ beyond rounding, with both values."""
    if then.n != now.n:
        return "n", then.n, now.n
    keys = ("value", "lower", "upper")
    return next(((k, a, b) for k in keys if not _close(a := getattr(then, k), b := getattr(now, k), ROUNDING)), None)


def _close(first: float | None, second: float | None, relative: float) -> bool:
    if first is None or second is None:
        return first is second
    return math.isclose(first, second, rel_tol=relative, abs_tol=1e-12)


def _text(value: float | None) -> str:
    return "null" if value is None else f"{value:.9g}"
