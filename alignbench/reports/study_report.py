"""What a study shows: `summary.md`, CSV tables and pictures in `report/` below its folder, from the records alone."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from alignbench.backbones.mixture import distributions
from alignbench.comparison.study import (
    FILE,
    KEYS,
    Study,
    at_kl,
    cells_frame,
    equal_kl_frame,
    method_frame,
    modes_frame,
    read_study,
    readable,
    runs_frame,
    sampler_frame,
    shown,
)
from alignbench.figures.plots import COLORS, STYLE, legend_name, write_figure
from alignbench.files.escaping import csv_frame, markdown, markdown_code, slugs, visible
from alignbench.files.writing import PATIENCE, REPORT_LOCK, exclusive, own_folders, write_atomically
from alignbench.records.record import read_result
from alignbench.records.results import BASE
from alignbench.reports.comparison_plots import MARKERS
from alignbench.statistics import Interval

PRICE = ("kl_base", "exact_reward", "best_reward_at_kl")
"""Metrics of the picture of what a divergence buys."""
SMALLEST_KL = 1e-2
"""Where its axis begins."""
FILLINGS = ("full", "none", "left")
"""Of markers whose colour is taken."""
BEYOND_CHANCE = 0.05
"""Of p, corrected."""


def write_study(out: Path, command: str | None) -> list[Path]:
    """Tables and pictures of all runs that have ended; returns the files.

    Args:
        command: what made the study, for its summary; None where no command did.

    Raises:
        UserError: there is no study, or no run of it has ended.
    """
    study, folder = read_study(out / FILE), out / "report"
    with exclusive(out, REPORT_LOCK, PATIENCE):
        own_folders(out, folder.name, known=(folder / "summary.md").is_file())
        return _write_study(study, out, folder, command)


def _write_study(study: Study, out: Path, folder: Path, command: str | None) -> list[Path]:
    left_out: list[str] = []
    runs = runs_frame(study, out, left_out)
    at = at_kl(runs, study.kl_levels, study.metrics, left_out)
    tables = {
        "runs": runs.drop(columns=["folder", "seconds"]),
        "cells": cells_frame(runs, study.metrics),
        "samplers": sampler_frame(runs, study.metrics),
        "methods": method_frame(runs, study.metrics),
        "equal_kl": equal_kl_frame(at),
        "equal_kl_methods": _at_each_level(at, study.metrics),
        "modes": modes_frame(runs, left_out),
    }
    written = []
    for name, table in tables.items():
        if len(table):
            write_atomically(folder / f"{name}.csv", partial(csv_frame(table).to_csv, index=False, float_format="%.5g"))
            written.append(folder / f"{name}.csv")
    text = summary(study, tables, command, read_result(runs["folder"].iloc[-1]).environment, sorted(set(left_out)))
    write_atomically(folder / "summary.md", lambda p: p.write_text(text, encoding="utf-8"))
    written.append(folder / "summary.md")
    if set(PRICE) <= set(runs.columns):
        written.append(write_figure(folder / "price.png", price(study, tables)))
    return written + _write_laws(study, runs, folder)


def _at_each_level(at: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """`method_frame` of each level of `at_kl`, for the seeds in which both methods were seen there."""
    found = [method_frame(table, metrics).assign(kl=kl) for kl, table in (at.groupby("kl", sort=False) if len(at) else ())]
    return pd.concat(found) if found else pd.DataFrame()


def summary(
    study: Study,
    tables: dict[str, pd.DataFrame],
    command: str | None,
    environment: dict[str, Any],
    left_out: Sequence[str] = (),
) -> str:
    """Every table as Markdown; a number is a mean over seeds with its 95 % interval.

    Args:
        left_out: why records are not in the numbers, a line each.
    """
    runs, cells = tables["runs"], tables["cells"]
    trained = runs[runs["objective"] != BASE]
    libraries = environment.get("libraries", {})
    made_by = {"revision": environment.get("git_revision"), "alignbench": environment.get("alignbench")}
    made_by |= {"python": environment.get("python"), "torch": environment.get("torch")}
    made_by |= {"numpy": libraries.get("numpy"), "scipy": libraries.get("scipy")}
    known = ", ".join(f"{name} {version}" for name, version in made_by.items() if version)
    first = markdown_code(method(study, trained[["part", "objective"]].iloc[0].to_dict()))
    lines = [
        f"# {markdown(study.description)}",
        "",
        *([f"    {visible(command)}", ""] if command else []),
        f"{len(trained)} runs, seeds {', '.join(map(str, sorted(set(trained['seed']))))}; {known}.",
        "A number is a mean over seeds with Student's 95 % interval; `part: objective x sampler` names a method.",
        f"`*`: p < {BEYOND_CHANCE} by Student's t test over seeds, corrected by Holm for the rows of the table. Where all",
        "seeds agree there is no test.",
        "",
    ]
    tasks = list(dict.fromkeys(cells["task"]))
    for task in ["all", *tasks[:-1]] if len(tasks) > 2 else tasks[:1]:
        lines += [f"## {'Mean over the tasks' if task == 'all' else markdown(task)}; `*` differs from the base model", ""]
        lines += [*_table(study, cells[cells["task"] == task], KEYS), ""]
    paired = "task means paired by seed"
    if len(tables["samplers"]):
        lines += [f"## Samplers: the second minus the first, {paired}", ""]
        lines += [*_table(study, tables["samplers"], ["part", "objective", "first", "second"]), ""]
    if len(tables["methods"]):
        lines += [f"## Methods: minus {first} with the same sampler, {paired}", ""]
        lines += [*_table(study, tables["methods"], KEYS), ""]
    for (task, kl), table in tables["equal_kl"].groupby(["task", "kl"], sort=False) if len(tables["equal_kl"]) else ():
        lines += [
            f"## {markdown(str(task))}, where the divergence to the base model first reaches {kl:g}",
            "",
            *_table(study, table, KEYS),
            "",
        ]
    apart = tables["equal_kl_methods"]
    for kl in study.kl_levels if len(apart) else ():
        lines += [f"## Methods where the divergence first reaches {kl:g}: minus {first} with the same sampler, {paired}", ""]
        lines += [*_table(study, apart[apart["kl"] == kl], KEYS), ""]
    if left_out:
        lines += ["## Not in the numbers", "", *(f"- {markdown(line)}" for line in left_out), ""]
    return "\n".join(lines)


def method(study: Study, row: Mapping[Any, Any]) -> str:
    """`part: objective x sampler`; the first part goes without its name, and the base model by its own."""
    if row["objective"] == BASE:
        return BASE
    names = " x ".join(row[key] for key in ("objective", "sampler") if key in row)
    return names if row["part"] == next(iter(study.parts)) else f"{row['part']}: {names}"


def price(study: Study, tables: dict[str, pd.DataFrame]) -> Figure:
    """Reward against KL to the base model, a panel a task; above the line no distribution can be.

    A marker is where a method's trainings ended, means over seeds; its trail leads there over the levels of KL at which all
    of them were seen, from the base model on if they were at the first one.
    """
    runs, cells, levels = tables["runs"], tables["cells"], tables["equal_kl"]
    tasks = list(dict.fromkeys(runs["task"]))
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    trained = cells[(cells["objective"] != BASE) & cells["metric"].isin(PRICE)]
    names = list(dict.fromkeys(trained[["part", "objective"]].itertuples(index=False, name=None)))
    samplers = list(dict.fromkeys(trained["sampler"]))
    size = (distributions.WIDTH if columns > 1 else 0.7 * distributions.WIDTH, (2.0 if lines > 1 else 3.0) * lines + 0.6)
    with plt.rc_context({**STYLE, "font.size": 7, "savefig.dpi": 200}):
        figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
        for axis, task in zip(axes.flat, tasks, strict=False):
            reached = levels[levels["task"] == task] if len(levels) else levels
            known = runs[runs["task"] == task].sort_values("kl_base")
            best = known["best_reward_at_kl"].cummax()  # means over prompts, whose KL differ, need not rise
            axis.plot(known["kl_base"].clip(lower=SMALLEST_KL), best, color="black", linewidth=0.7)
            base = runs[(runs["task"] == task) & (runs["objective"] == BASE)].iloc[0]
            start = (max(base["kl_base"], SMALLEST_KL), base["exact_reward"])
            for key, part in trained[trained["task"] == task].groupby(KEYS, sort=False):
                at = part.set_index("metric")["value"]
                look = _look(names.index(key[:2]), samplers.index(key[2]))
                end = (max(at["kl_base"], SMALLEST_KL), at["exact_reward"])
                axis.plot(*end, linestyle="", markersize=3.5, **look)
                if len(reached):
                    way = reached[(reached[KEYS] == key).all(axis=1) & (reached["metric"] == "exact_reward")]
                    way = way[(way["n"] == way["runs"]) & (way["kl"] < end[0])]
                    from_base = [start] if study.kl_levels[0] in set(way["kl"]) else []
                    trail = np.array([*from_base, *way[["kl", "value"]].to_numpy(), end])
                    axis.plot(*trail.T, color=look["color"], linewidth=0.5, alpha=0.7)
            axis.plot(*start, marker="x", color="black", markersize=4)
            axis.set(xscale="log", title=visible(task).replace("_", " "), xlabel="KL to the base model")
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for axis in axes.flat[len(tasks) :]:
            axis.set_visible(False)
        for axis in axes[:, 0]:
            axis.set_ylabel("expected reward")
        handles = [
            Line2D([], [], linestyle="", **_look(i, 0), label=legend_name(method(study, {"part": part, "objective": name})))
            for i, (part, name) in enumerate(names)
        ]
        others = [
            Line2D([], [], linestyle="", color="#555555", marker=MARKERS[j % len(MARKERS)], label=legend_name(s))
            for j, s in enumerate(samplers)
        ]
        others.append(Line2D([], [], linestyle="", color="black", marker="x", label=BASE))
        others.append(Line2D([], [], color="black", linewidth=0.7, label="best reachable"))
        figure.legend(handles=handles, loc="outside lower center", ncols=6 if columns > 1 else 3, fontsize=6)
        figure.legend(handles=others, loc="outside upper center", ncols=len(others), fontsize=6)
    return figure


def _look(objective: int, sampler: int) -> dict[str, Any]:
    """A colour and a filling for the objective, a marker for the sampler."""
    colors = COLORS[:-1]
    filling = FILLINGS[objective // len(colors) % len(FILLINGS)]
    return {"color": colors[objective % len(colors)], "marker": MARKERS[sampler % len(MARKERS)], "fillstyle": filling}


def _table(study: Study, cells: pd.DataFrame, keys: list[str]) -> list[str]:
    """A row for each value of the keys, a column for each metric; of an equal-KL table also how many runs were seen there."""
    metrics = [m for m in study.metrics if m in set(cells["metric"])]
    apart, more = [k for k in keys if k not in KEYS], ["runs"] if "runs" in cells.columns else []
    columns = ["method", *apart, *metrics, *more]
    lines = ["| " + " | ".join(map(markdown, columns)) + " |", "|---" * len(columns) + "|"]
    for key, part in cells.groupby(keys, sort=False):
        names = {name: str(value) for name, value in zip(keys, key, strict=True)}
        by_metric = part.set_index("metric").to_dict("index")
        found = [_cell(by_metric[metric]) if metric in by_metric else "-" for metric in metrics]
        found += [f"{part.iloc[0]['n']:.0f} of {part.iloc[0]['runs']:.0f}" for _ in more]
        lines.append("| " + " | ".join([markdown(method(study, names)), *(markdown(names[k]) for k in apart), *found]) + " |")
    return lines


def _cell(row: Mapping[Any, Any]) -> str:
    star = " *" if row.get("p_holm", np.nan) < BEYOND_CHANCE else ""
    return shown(Interval(row["value"], row["lower"], row["upper"], row["n"])) + star


def _write_laws(study: Study, runs: pd.DataFrame, folder: Path) -> list[Path]:
    """Of each task the trained models of the first seed side by side; of runs with snapshots a strip each."""
    trained = runs[runs["objective"] != BASE]
    seed = trained["seed"].min()
    drawings: dict[str, Callable[[], Figure]] = {}
    for task, of_task in trained[trained["seed"] == seed].groupby("task", sort=False):
        models: dict[tuple[str, str], pd.DataFrame] = {}
        for run in of_task.to_dict("records"):
            kept = readable(distributions.read_distributions, run["folder"], [])  # what cannot be read, `modes_frame` has told
            if kept is None:
                continue
            name = method(study, {"part": run["part"], "objective": run["objective"]})
            models[name, run["sampler"]] = kept
            if kept["iteration"].nunique() > 3:  # more than target, base and trained
                title = f"{name} x {run['sampler']}, {task}, seed {seed}"
                drawings[f"training {title}"] = partial(distributions.over_training, kept, title)
        if models:
            drawings[f"distributions {task}"] = partial(distributions.side_by_side, models, f"{task}, seed {seed}")
    files = slugs(drawings)
    return [write_figure(folder / f"{files[name]}.png", draw()) for name, draw in drawings.items()]
