"""Computes the score of each trial from the records of its runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignbench.errors import UserError, did_you_mean
from alignbench.records.diversity import default_diversity
from alignbench.records.record import Result, read_result
from alignbench.records.tables import read_evals
from alignbench.statistics import hypervolume
from alignbench.tuning.planning import HYPERVOLUME, REWARD


class Scores(NamedTuple):
    """The scores of runs.

    Attributes:
        by_run: folder of a run -> its score; NaN if a metric has no value.
        meaning: what a score means, in words.
    """

    by_run: dict[Path, float]
    meaning: str


def score_runs(folders: list[Path], select: str, weights: Mapping[str, float], *, standardise: bool) -> Scores:
    """Scores the finished runs of a tuning; higher is better.

    Args:
        folders: folders of the runs, each with a record.
        select: `reward`, `hypervolume`, or the name of a metric.
        weights: reward -> its weight, for the rewards that the runs train on; `hypervolume` needs a single one.
        standardise: whether several rewards are each measured in units of the base model's deviation within a prompt.

    Raises:
        UserError: a record cannot be read, or there is no such metric.
    """
    results = {folder: read_result(folder) for folder in folders}
    if not results:
        return Scores({}, select)
    if select == REWARD:
        by_run = {folder: _total_reward(folder, result, weights, standardise) for folder, result in results.items()}
        return Scores(by_run, _reward_in_words(list(weights), standardise))
    if select == HYPERVOLUME:
        (reward,) = weights
        return _hypervolumes(results, reward)
    return _of_metric(results, select)


def _reward_in_words(rewards: list[str], standardise: bool) -> str:
    if len(rewards) == 1:
        return f"mean validation reward ({rewards[0]})"
    unit = ", each as its gain in units of the base model's deviation within a prompt" if standardise else ""
    return f"weighted sum of the mean validation rewards {' and '.join(rewards)}{unit}"


def _total_reward(folder: Path, result: Result, weights: Mapping[str, float], standardise: bool) -> float:
    """The mean reward of the trained model; with several rewards, their weighted sum."""
    finals = {name: _number(result.metrics[name].final.value) for name in weights}
    if len(finals) == 1:
        return next(iter(finals.values()))
    if not standardise:
        return sum(weights[name] * value for name, value in finals.items())
    evals = read_evals(folder)
    if evals is None:
        raise UserError(
            f"{folder} has no evals.parquet, which puts its rewards on one scale; remove the folder to run it again"
        )
    base = evals[evals["phase"] == "base"]
    total = 0.0
    for name, value in finals.items():
        spread = base[base["metric"] == name].groupby("prompt_index")["value"].std(ddof=0)
        deviation = float(np.sqrt((spread**2).mean()))
        total += weights[name] * (value - _number(result.metrics[name].base.value)) / deviation
    return total


def _hypervolumes(results: Mapping[Path, Result], reward: str) -> Scores:
    """The area that each run dominates above the base model's reward and the smallest diversity of any run."""
    metrics = next(iter(results.values())).metrics
    diversity = default_diversity(metrics)
    if diversity is None:
        raise UserError(f"--select {HYPERVOLUME} needs a metric of diversity, and the task has none; choose another score")
    sign = -1.0 if metrics[diversity].higher_is_better is False else 1.0
    finals = {f: {name: _number(metric.final.value) for name, metric in r.metrics.items()} for f, r in results.items()}
    points = {folder: (of_run[reward], sign * of_run[diversity]) for folder, of_run in finals.items()}
    base = {f: _number(r.metrics[reward].base.value) for f, r in results.items()}
    least = float(np.nanmin([value for _, value in points.values()]))
    areas = {folder: hypervolume(np.array([point]), (base[folder], least)) for folder, point in points.items()}
    missing = {folder for folder, point in points.items() if np.isnan(point).any()}
    meaning = f"hypervolume: gain in {reward} x {diversity} above the least of any trial, on validation prompts"
    return Scores({folder: np.nan if folder in missing else area for folder, area in areas.items()}, meaning)


def _of_metric(results: Mapping[Path, Result], select: str) -> Scores:
    metrics = next(iter(results.values())).metrics
    if select not in metrics:
        raise UserError(f"--select: no trial has a metric {select!r}{did_you_mean(select, [REWARD, HYPERVOLUME, *metrics])}")
    if metrics[select].higher_is_better is None:
        raise UserError(f"--select {select}: neither a higher nor a lower value of it is better; choose another score")
    sign = 1.0 if metrics[select].higher_is_better else -1.0
    values = {folder: sign * _number(result.metrics[select].final.value) for folder, result in results.items()}
    return Scores(values, f"{'' if sign > 0 else 'minus '}mean of {select} on validation prompts")


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
