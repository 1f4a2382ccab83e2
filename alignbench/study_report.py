"""What a study shows: `summary.md`, CSV tables and pictures in `report/` below its folder, from the records alone."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from alignbench import laws
from alignbench.comparison_plots import MARKERS, slug
from alignbench.plots import COLORS, STYLE, write_figure
from alignbench.record import read_result, write_atomically
from alignbench.results import BASE
from alignbench.statistics import Interval
from alignbench.study import (
    FILE,
    Study,
    cells_frame,
    equal_kl_frame,
    read_study,
    runs_frame,
    sampler_frame,
    shown,
)

PRICE = ("kl_base", "exact_reward", "best_reward_at_kl")
"""Metrics of the picture of what a divergence buys."""
SMALLEST_KL = 1e-2
"""Where its axis begins."""


def write_study(out: Path, command: str | None) -> list[Path]:
    """Tables and pictures of all runs that have ended; returns the files.

    Args:
        command: what made the study, for its summary; None where no command did.

    Raises:
        UserError: there is no study, or no run of it has ended.
    """
    study, folder = read_study(out / FILE), out / "report"
    runs = runs_frame(study, out)
    tables = {"runs": runs.drop(columns=["folder", "seconds"]), "cells": cells_frame(runs, study.metrics)}
    tables["samplers"] = sampler_frame(runs, study.metrics[0])
    tables["equal_kl"] = equal_kl_frame(runs, study.kl_levels, study.metrics)
    written = []
    for name, table in tables.items():
        if len(table):
            write_atomically(folder / f"{name}.csv", partial(table.to_csv, index=False, float_format="%.5g"))
            written.append(folder / f"{name}.csv")
    text = summary(study, tables, command, read_result(runs["folder"].iloc[-1]).environment)
    write_atomically(folder / "summary.md", lambda p: p.write_text(text, encoding="utf-8"))
    written.append(folder / "summary.md")
    if set(PRICE) <= set(runs.columns):
        written.append(write_figure(folder / "price.png", price(tables["cells"], runs)))
    return written + _write_laws(study, runs, folder)


def summary(study: Study, tables: dict[str, pd.DataFrame], command: str | None, environment: dict[str, Any]) -> str:
    """Every table as Markdown; a number is a mean over seeds with its 95 % interval."""
    runs, cells = tables["runs"], tables["cells"]
    trained = runs[runs["objective"] != BASE]
    libraries = environment.get("libraries", {})
    versions = {"alignbench": environment.get("alignbench"), "python": environment.get("python")}
    versions |= {"torch": environment.get("torch"), "numpy": libraries.get("numpy"), "scipy": libraries.get("scipy")}
    lines = [
        f"# {study.description}",
        "",
        *([f"    {command}", ""] if command else []),
        f"{len(trained)} runs, seeds {', '.join(map(str, sorted(set(trained['seed']))))}; "
        f"revision {environment.get('git_revision')}; {', '.join(f'{k} {v}' for k, v in versions.items())}.",
        "A number is a mean over seeds with Student's 95 % interval; `part: objective x sampler` names a method.",
        "",
    ]
    tasks = list(dict.fromkeys(cells["task"]))
    for task in ["all", *tasks[:-1]] if len(tasks) > 2 else tasks[:1]:
        lines += ["## Mean over the tasks" if task == "all" else f"## {task}", ""]
        lines += [*_table(study, cells[cells["task"] == task]), ""]
    if len(tables["samplers"]):
        lines += [f"## Samplers: {study.metrics[0]}, second minus first, task means paired by seed", ""]
        lines += ["| method | first | second | difference | n | p (Holm) |", "|---|---|---|---|---|---|"]
        for row in tables["samplers"].to_dict("records"):
            found = shown(Interval(row["value"], row["lower"], row["upper"], row["n"]))
            p = "-" if np.isnan(row["p_holm"]) else f"{row['p_holm']:.2g}"
            names = [method(study, row), row["first"], row["second"]]
            lines.append("| " + " | ".join([*names, found, str(row["n"]), p]) + " |")
        lines.append("")
    for (task, kl), table in tables["equal_kl"].groupby(["task", "kl"], sort=False) if len(tables["equal_kl"]) else ():
        lines += [f"## {task}, where the divergence to the base model first reaches {kl:g}", "", *_table(study, table), ""]
    return "\n".join(lines)


def method(study: Study, row: Mapping[Any, Any]) -> str:
    """`part: objective x sampler`; the first part goes without its name, and the base model by its own."""
    if row["objective"] == BASE:
        return BASE
    names = " x ".join(row[key] for key in ("objective", "sampler") if key in row)
    return names if row["part"] == next(iter(study.parts)) else f"{row['part']}: {names}"


def price(cells: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """Reward against KL to the base model, a panel a task; above the line no law can be."""
    tasks = list(dict.fromkeys(runs["task"]))
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    keys = ["part", "objective"]
    trained = cells[(cells["objective"] != BASE) & cells["metric"].isin(PRICE)]
    names = list(dict.fromkeys(trained[keys].itertuples(index=False, name=None)))
    samplers = list(dict.fromkeys(trained["sampler"]))
    with plt.rc_context({**STYLE, "font.size": 7, "savefig.dpi": 200}):
        figure, axes = plt.subplots(
            lines, columns, figsize=(laws.WIDTH, 1.75 * lines + 0.6), layout="constrained", squeeze=False
        )
        for axis, task in zip(axes.flat, tasks, strict=False):
            known = runs[runs["task"] == task].sort_values("kl_base")
            axis.plot(known["kl_base"].clip(lower=SMALLEST_KL), known["best_reward_at_kl"], color="black", linewidth=0.7)
            of_task = trained[trained["task"] == task]
            for key, part in of_task.groupby([*keys, "sampler"], sort=False):
                at = part.set_index("metric")["value"]
                look = _look(names.index(key[:2]), samplers.index(key[2]))
                axis.plot(max(at["kl_base"], SMALLEST_KL), at["exact_reward"], linestyle="", markersize=3.5, **look)
            axis.set(xscale="log", title=task.replace("_", " "), xlabel="KL to the base model")
        for axis in axes.flat[len(tasks) :]:
            axis.set_visible(False)
        for axis in axes[:, 0]:
            axis.set_ylabel("expected reward")
        first = names[0][0]
        handles = [
            Line2D([], [], linestyle="", **_look(i, 0), label=name if part == first else f"{name} ({part})")
            for i, (part, name) in enumerate(names)
        ]
        handles += [
            Line2D([], [], linestyle="", color="#555555", marker=MARKERS[j % len(MARKERS)], label=s)
            for j, s in enumerate(samplers)
        ]
        handles.append(Line2D([], [], color="black", linewidth=0.7, label="best reachable"))
        figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=6)
    return figure


def _look(objective: int, sampler: int) -> dict[str, Any]:
    """A colour and a filling for the objective, a marker for the sampler."""
    colors = COLORS[:-1]
    color = colors[objective % len(colors)]
    filled = objective < len(colors)
    return {"color": color, "marker": MARKERS[sampler % len(MARKERS)], "markerfacecolor": color if filled else "none"}


def _table(study: Study, cells: pd.DataFrame) -> list[str]:
    """Methods by metrics; of an equal-KL table also how many runs came so far."""
    metrics = [m for m in study.metrics if m in set(cells["metric"])]
    more = ["runs"] if "runs" in cells.columns else []
    lines = ["| method | " + " | ".join([*metrics, *more]) + " |", "|---" * (1 + len(metrics) + len(more)) + "|"]
    for _, part in cells.groupby(["part", "objective", "sampler"], sort=False):
        by_metric = part.set_index("metric").to_dict("index")
        found = []
        for metric in metrics:
            row = by_metric.get(metric)
            found.append("-" if row is None else shown(Interval(row["value"], row["lower"], row["upper"], row["n"])))
        first = part.iloc[0].to_dict()
        found += [f"{first['n']:.0f} of {first['runs']:.0f}" for _ in more]
        lines.append("| " + " | ".join([method(study, first), *found]) + " |")
    return lines


def _write_laws(study: Study, runs: pd.DataFrame, folder: Path) -> list[Path]:
    """Of each task the trained models of the first seed side by side; of runs with snapshots a strip each."""
    trained = runs[runs["objective"] != BASE]
    seed, written = trained["seed"].min(), []
    for task, of_task in trained[trained["seed"] == seed].groupby("task", sort=False):
        models: dict[tuple[str, str], pd.DataFrame] = {}
        for run in of_task.to_dict("records"):
            kept = laws.read_laws(run["folder"])
            if kept is None:
                continue
            name = method(study, {"part": run["part"], "objective": run["objective"]})
            models[name, run["sampler"]] = kept
            if kept["iteration"].nunique() > 3:  # more than target, base and trained
                title = f"{name} x {run['sampler']}, {task}, seed {seed}"
                written.append(write_figure(folder / f"training_{slug(title)}.png", laws.over_training(kept, title)))
        if models:
            figure = laws.side_by_side(models, f"{task}, seed {seed}")
            written.append(write_figure(folder / f"laws_{slug(str(task))}.png", figure))
    return written
