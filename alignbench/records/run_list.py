"""The runs below a folder, finished or not: what `runs` lists and what a report of unfinished runs shows."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignbench.errors import UserError
from alignbench.files.writing import is_in_use
from alignbench.records.diversity import default_diversity
from alignbench.records.record import CONFIG, RESULT, Result, read_result, visible_record
from alignbench.records.tables import read_metrics
from alignbench.records.unfinished import unfinished_record

INSIDE = {"checkpoints", "samples", "plots", "tables", "fronts", "tensorboard", "wandb"}
"""Folders in which no run is looked for."""


def run_rows(folder: Path) -> list[dict[str, Any]]:
    """What is known of each run below a folder; its `state` says why where it cannot be read."""
    return [_row(run, folder) for run in run_folders(folder)]


def run_folders(folder: Path) -> Iterator[Path]:
    """Every folder of a run below the folder, in the order of their names."""
    for place, below, files in os.walk(folder):
        if {CONFIG, RESULT} & set(files):
            below.clear()
            yield Path(place)
        else:
            below[:] = sorted(name for name in below if name not in INSIDE and not name.startswith("."))


def _row(run: Path, folder: Path) -> dict[str, Any]:
    """What the list says of a run; its `state` says why where it cannot be read."""
    row: dict[str, Any] = {"run": os.path.relpath(run, folder)}
    in_use = is_in_use(run)
    try:
        if os.path.lexists(run / RESULT) and not in_use:
            result = visible_record(read_result(run))
            row |= _of_record(result) | {"state": result.run.status} | _measured(result)
        else:
            result = visible_record(unfinished_record(run))
            row |= _of_record(result) | {"state": "running" if in_use else "interrupted"}
            table = read_metrics(run)
            if table is not None and len(table):
                row["training_reward"] = float(table["reward"].iloc[-1])
    except UserError as error:
        row |= {"state": "unreadable", "error": str(error)}
    return row


def _of_record(result: Result) -> dict[str, Any]:
    objective, sampler = result.pair
    info, budget = result.run, result.budget
    planned = result.config.get("iterations")
    return {
        "objective": objective,
        "sampler": sampler,
        "backbone": info.backbone,
        "task": info.task,
        "seed": info.seed,
        "iterations": info.iterations,
        "planned": planned if isinstance(planned, int) else None,
        "seconds": budget.seconds + budget.seconds_evaluation,
        "alarms": len(result.alarms),
    }


def _measured(result: Result) -> dict[str, Any]:
    """The first metric that was trained on and the default metric of diversity, of base and trained model."""
    rewards = (name for name, metric in result.metrics.items() if metric.role == "reward")
    axes = {"reward": next(rewards, None), "diversity": default_diversity(result.metrics)}
    return {
        axis: {"metric": name, "base": result.metrics[name].base.value, "trained": result.metrics[name].final.value}
        for axis, name in axes.items()
        if name is not None
    }
