"""The command `runs`: the runs below a folder, finished or not."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from alignbench.cli.options import Commands
from alignbench.errors import UserError
from alignbench.runtime.streams import print_json

commands = Commands("Train and compare")
INSIDE = {"checkpoints", "samples", "plots", "tables", "fronts", "tensorboard", "wandb"}
"""Folders in which no run is looked for."""


@commands.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Folder that contains runs, at any depth.")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as one JSON document on stdout.")] = False,
) -> None:
    """Lists the runs below a folder, finished or not: state, pair, reward, diversity and time."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    rows = [_row(run, folder) for run in _folders(folder)]
    if as_json:
        import json

        print_json(json.dumps({"folder": str(folder), "runs": rows}, indent=2))
        return
    from alignbench.cli.views.comparison import show_runs

    show_runs(rows, folder)


def _folders(folder: Path) -> Iterator[Path]:
    """Every folder of a run below the folder, in the order of their names."""
    from alignbench.records.record import CONFIG, RESULT

    for place, below, files in os.walk(folder):
        if {CONFIG, RESULT} & set(files):
            below.clear()
            yield Path(place)
        else:
            below[:] = sorted(name for name in below if name not in INSIDE and not name.startswith("."))


def _row(run: Path, folder: Path) -> dict[str, Any]:
    """What the list says of a run; its `state` says why where it cannot be read."""
    from alignbench.files.writing import is_in_use
    from alignbench.records.record import RESULT, read_result, visible_record
    from alignbench.records.tables import read_metrics
    from alignbench.records.unfinished import unfinished_record

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


def _of_record(result: Any) -> dict[str, Any]:
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


def _measured(result: Any) -> dict[str, Any]:
    """The first metric that was trained on and the default metric of diversity, of base and trained model."""
    from alignbench.records.diversity import default_diversity

    rewards = (name for name, metric in result.metrics.items() if metric.role == "reward")
    axes = {"reward": next(rewards, None), "diversity": default_diversity(result.metrics)}
    return {
        axis: {"metric": name, "base": result.metrics[name].base.value, "trained": result.metrics[name].final.value}
        for axis, name in axes.items()
        if name is not None
    }
