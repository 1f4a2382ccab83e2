"""Reports while runs are at work: a page about runs none of which has finished, and a report that follows a comparison."""

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt

from alignbench.errors import UserError
from alignbench.figures.plots import plot_run
from alignbench.files.writing import PATIENCE, REPORT_LOCK, exclusive, is_in_use, write_atomically
from alignbench.records.record import RESULT
from alignbench.records.run_list import run_folders, run_rows
from alignbench.records.tables import read_metrics
from alignbench.reports.plots.comparison_plots import learning_curves
from alignbench.reports.report import drawn, refuse_foreign_report, render, svg_link, widen, write_report

EVERY = 30
"""Seconds between two reports of `follow`."""


def write_report_so_far(
    folder: Path, *, reward: str | None = None, diversity: str | None = None, refresh: int | None = None
) -> list[Path]:
    """Writes the report of the finished runs below a folder, or, while there is none, a page about unfinished ones.

    Args:
        folder, reward, diversity, refresh: as for `write_report`.

    Returns:
        The files.

    Raises:
        UserError: there is no run, or none that can be reported; see `write_report`.
    """
    if not has_unfinished_only(folder):
        return write_report(folder, reward=reward, diversity=diversity, refresh=refresh)
    with exclusive(folder, REPORT_LOCK, PATIENCE):
        refuse_foreign_report(folder)
        rows = run_rows(folder)
        text = render("unfinished.html.jinja", {"rows": rows, "figures": _curves(folder, rows), "refresh": refresh})
        file = folder / "report.html"
        write_atomically(file, partial(Path.write_text, data=text, encoding="utf-8"))
    return [file]


def plot_unfinished(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """Draws the plots of each run below a folder, which are in its own folder and say that it is unfinished."""
    return [file for run in run_folders(folder) for file in plot_run(run, warn)]


def has_unfinished_only(folder: Path) -> bool:
    """Whether there are runs below a folder, none of which has finished."""
    return next(folder.rglob(RESULT), None) is None and next(run_folders(folder), None) is not None


def is_running(folder: Path) -> bool:
    """Whether a process is at work in a comparison, or in a run below the folder."""
    return any(map(is_in_use, (folder, *run_folders(folder), *(file.parent for file in folder.rglob("comparison.json")))))


def follow(
    folder: Path,
    *,
    every: int = EVERY,
    reward: str | None = None,
    diversity: str | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> list[Path]:
    """Writes the report again and again while runs below a folder are at work; returns the files of the last one.

    The pages until then tell a browser to load them anew. The last one, also after Ctrl-C, does not.

    Args:
        folder, reward, diversity: as for `write_report`.
        every: seconds between two reports.
        wait: waits so many seconds.

    Raises:
        UserError: there is no folder, or no run in it once nothing is at work any more.
    """
    write = partial(write_report_so_far, folder, reward=reward, diversity=diversity)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    try:
        while is_running(folder):
            if next(run_folders(folder), None) is not None:  # a comparison begins with no run
                write(refresh=every)
            wait(every)
    except KeyboardInterrupt:
        if next(run_folders(folder), None) is not None:
            write()
        raise
    return write()


def _curves(folder: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Title -> SVG as a link, of the training so far, for each task and backbone."""
    tables: dict[str, list[pd.DataFrame]] = {}
    seen: Counter[tuple[str, str, int]] = Counter()
    for row in rows:
        table = read_metrics(folder / row["run"]) if "error" not in row else None
        if table is not None and len(table):
            setup, cell = f"{row['task']} on {row['backbone']}", f"{row['objective']} x {row['sampler']}"
            seen[setup, cell, row["seed"]] += 1
            number = seen[setup, cell, row["seed"]]  # runs of one pair and seed may have other settings
            of_run = table.assign(cell=f"{cell} ({number})" if number > 1 else cell, seed=row["seed"])
            tables.setdefault(setup, []).append(of_run)
    figures = {}
    for name, parts in tables.items():
        figure = learning_curves(pd.concat(parts, ignore_index=True), "iteration")
        widen(figure)
        figures[f"{name}: training so far"] = svg_link(drawn(figure, "svg"))
        plt.close(figure)
    return figures
