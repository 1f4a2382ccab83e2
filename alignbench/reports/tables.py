"""The tables beside a report: CSV, Parquet and LaTeX."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from alignbench.comparison.results import SPENT, Results
from alignbench.files.escaping import csv_frame, latex, visible
from alignbench.files.writing import write_atomically
from alignbench.reports.formatting import counted, estimate, heading, listed
from alignbench.reports.plots.comparison_plots import setup_hypervolumes

MOST_ROWS = 500_000
"""Rows of the table of single images, at most; beyond it, the runs' own tables have them."""


def protocol_of(results: Results, setup: str) -> dict[str, Any]:
    """How the models of a setup were evaluated, and the seeds they were trained with."""
    runs = results.of(setup)
    seeds = sorted({run.result.run.seed for run in runs})
    return {**runs[0].result.protocol.model_dump(mode="json"), "training seeds": ", ".join(map(str, seeds))}


def method_row(cells: pd.DataFrame, cell: str) -> dict[str, Any]:
    """What tables show of a cell: its metrics, the n of the first of them in words, its number of seeds, and what it used.

    Args:
        cells: rows of `Results.cells_frame` of one setup.
    """
    part = cells[cells["cell"] == cell].set_index("metric")
    return {
        "cell": cell,
        "metrics": part.to_dict("index"),
        "n": counted(float(part["mean_n"].iloc[0]), str(part["over"].iloc[0])),
        "seeds": int(part["seeds"].iloc[0]),
        **{name + end: float(part[name + end].iloc[0]) for name in SPENT for end in ("", "_min", "_max")},
    }


def latex_table(rows: Sequence[dict[str, Any]], metrics: Mapping[str, str], about: str) -> str:
    """A booktabs table of means with intervals and n; every name is escaped.

    Args:
        metrics: metric -> heading of its column.
        about: the line of its first comment.
    """
    head = " & ".join(["Method", *map(latex, metrics.values())])
    lines = [f"% {visible(' '.join(about.split()))}", r"% Mean [95 % interval] (n); needs \usepackage{booktabs}."]
    lines += [rf"\begin{{tabular}}{{l{'l' * len(metrics)}}}", r"\toprule", head + r" \\", r"\midrule"]
    for row in rows:
        texts = [latex(estimate(row["metrics"][m])) if m in row["metrics"] else "-" for m in metrics]
        lines.append(" & ".join([latex(row["cell"]), *texts]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def write_tables(results: Results, contrasts: Mapping[str, pd.DataFrame], folder: Path) -> list[Path]:
    """Writes every frame as CSV and Parquet, and a LaTeX table per setup; returns the files.

    Args:
        contrasts: frames of `analysis.contrasts`, by the names of their files.
    """
    written = []
    for name, frame in {**_frames(results), **contrasts}.items():
        if len(frame.columns):
            write_atomically(folder / f"{name}.csv", partial(csv_frame(frame).to_csv, index=False))
            write_atomically(folder / f"{name}.parquet", partial(frame.to_parquet, index=False))
            written += [folder / f"{name}.csv", folder / f"{name}.parquet"]
    for setup in results.setups:
        cells = results.cells_frame[results.cells_frame["setup"] == setup]
        rows = [method_row(cells, str(cell)) for cell in dict.fromkeys(cells["cell"])]
        metrics = results.of(setup)[0].result.metrics
        headings = {m: heading(m, metrics[m]) for m in (results.reward(setup), results.diversity(setup)) if m}
        text = latex_table(rows, headings, f"{setup}: {listed(protocol_of(results, setup))}")
        file = folder / f"{results.file_names[setup]}.tex"
        write_atomically(file, partial(Path.write_text, data=text, encoding="utf-8"))
        written.append(file)
    return written


def _frames(results: Results) -> dict[str, pd.DataFrame]:
    frames = {"runs": results.runs_frame, "cells": results.cells_frame, "pairs": results.pairs_frame}
    frames |= {"prompts": results.prompts_frame, "curves": results.curves_frame}
    if results.images_count <= MOST_ROWS:
        frames["images"] = results.images_frame
    volumes = {setup: setup_hypervolumes(results, setup) for setup in results.setups if results.diversity(setup)}
    if volumes:
        frames["hypervolumes"] = pd.concat(volumes, names=["setup"]).reset_index("setup")
    return frames
