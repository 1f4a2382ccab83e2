"""What a person sees of many runs: the list of `runs`, and the summary at the end of `compare`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from alignbench.cli.console import format_duration, new_console, print_table

if TYPE_CHECKING:
    from alignbench.comparison.results import Results

STYLES = {"running": "cyan", "interrupted": "yellow", "unreadable": "bold red"}
"""Colours of states; finished runs have none."""


def show_runs(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Prints the list of runs on stdout."""
    rich = new_console(160)
    if not rows:
        rich.print(f"there is no run below {escape(str(folder))}")
        return
    table = Table()
    for column in ("run", "state", "objective x sampler", "task", "seed", "iterations", "reward", "diversity", "time"):
        table.add_column(column, justify="right" if column in ("seed", "iterations", "time") else "left")
    for row in rows:
        state, style = str(row["state"]), STYLES.get(str(row["state"]), "")
        shown = f"[{style}]{state}[/{style}]" if style else escape(state)
        if "error" in row:
            table.add_row(escape(row["run"]), shown, escape(row["error"]))
            continue
        pair = f"{row['objective']} x {row['sampler']}"
        table.add_row(
            *(escape(row["run"]), shown, escape(pair), escape(str(row["task"])), str(row["seed"]), _iterations(row)),
            *(_reward(row), _change(row.get("diversity")), format_duration(row["seconds"])),
        )
    print_table(rich, table)
    unfinished = sum(row["state"] in ("running", "interrupted") for row in rows)
    rich.print(f"{len(rows)} run{'s' * (len(rows) != 1)}, {unfinished} unfinished; base model to trained model")


def _iterations(row: Mapping[str, Any]) -> str:
    return f"{row['iterations']}" if row["planned"] is None else f"{row['iterations']} of {row['planned']}"


def _reward(row: Mapping[str, Any]) -> str:
    if "training_reward" in row:
        return f"{row['training_reward']:.3g} in training"
    return _change(row.get("reward"))


def _change(values: Mapping[str, Any] | None) -> str:
    if values is None:
        return "-"
    base, trained = ("-" if values[key] is None else f"{values[key]:.3g}" for key in ("base", "trained"))
    return escape(f"{values['metric']} {base} to {trained}")


def show_summary(results: "Results") -> None:
    """Prints on stderr a line for each method of each setup: reward and diversity with their intervals, cost, alarms."""
    from alignbench.comparison.results import BASE
    from alignbench.figures.metric_names import axis_name

    rich = new_console(140, stderr=True)
    for setup in results.setups:
        metrics = list(filter(None, [results.reward(setup), results.diversity(setup)]))
        table = Table(title=escape(setup), title_justify="left")
        for column in ("method", *map(axis_name, metrics), "model evaluations", "training", "alarms"):
            table.add_column(escape(column), justify="left" if column == "method" else "right")
        cells = results.cells_frame[results.cells_frame["setup"] == setup]
        for cell, part in cells.groupby("cell", sort=False):
            of_metric = part.set_index("metric").to_dict("index")
            spent = part.iloc[0]
            runs = [run for run in results.of(setup) if run.cell == cell]
            alarmed = f"{sum(bool(run.result.alarms) for run in runs)} of {len(runs)} run{'s' * (len(runs) != 1)}"
            used = ("", "", "") if cell == BASE else (f"{spent['model_rows']:,.0f}", format_duration(spent["seconds"]), alarmed)
            table.add_row(escape(str(cell)), *(_mean(of_metric.get(metric)) for metric in metrics), *used)
        print_table(rich, table)
    rich.print("means with 95 % intervals, over seeds; over prompts for the base model and where there is one seed")


def _mean(row: Mapping[Any, Any] | None) -> str:
    import math

    if row is None or math.isnan(row["mean"]):
        return "-"
    ends = (row["mean_lower"], row["mean_upper"])
    interval = f" ({ends[0]:.3g} to {ends[1]:.3g})" if all(map(math.isfinite, ends)) else ""
    return f"{row['mean']:.3g}{interval}"
