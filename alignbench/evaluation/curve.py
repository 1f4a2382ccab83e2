"""A run's curve: its evaluations along the training, on validation prompts, as the table `curve.parquet`.

A row is an evaluation, metric and prompt: `iteration`, `model_rows` and `seconds` of training until then, `prompt_index`,
`prompt`, `metric`, and `value`, the mean over the prompt's images. The same prompts and the same noise each time, so that
evaluations are paired. Every run of one base model begins with the same evaluation, at iteration 0.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from alignbench.errors import UserError
from alignbench.evaluation.evaluate import Evaluation
from alignbench.files.reading import Kind, read_table

FILE = "curve.parquet"
KINDS: dict[str, Kind] = {
    "iteration": "whole",
    "model_rows": "whole",
    "seconds": "number",
    "prompt_index": "whole",
    "prompt": "text",
    "metric": "text",
    "value": "number",
}
PATH_KL = "path_kl"
"""The metric that says how far the policy has gone from the base model."""
PATHS = 24
"""Rollouts over all prompts by which `path_kl` is measured at each evaluation, one of each prompt at least."""


def curve_rows(evaluation: Evaluation, iteration: int, model_rows: int, seconds: float) -> pd.DataFrame:
    """The rows of one evaluation; an overall metric has the mean of its parts for each prompt that has any of them."""
    table = evaluation.table
    means = table.groupby(["prompt_index", "prompt", "metric"], sort=False, as_index=False)["value"].mean()
    parts = [means]
    for metric, names in evaluation.overall.items():
        of_parts = means[means["metric"].isin(names)]
        whole = of_parts.groupby(["prompt_index", "prompt"], sort=False, as_index=False)["value"].mean()
        parts.append(whole.assign(metric=metric))
    rows = pd.concat(parts, ignore_index=True)
    rows = rows.assign(iteration=iteration, model_rows=model_rows, seconds=seconds)
    return rows[list(KINDS)].astype({"iteration": np.int64, "model_rows": np.int64, "prompt_index": np.int64})


def read_curve(folder: Path) -> pd.DataFrame | None:
    """A run's curve, or None where it has none.

    Raises:
        UserError: the file is damaged, or holds an evaluation twice.
    """
    file = folder / FILE
    if not os.path.lexists(file):
        return None
    table = read_table(file, KINDS)[list(KINDS)]
    if table.duplicated(["iteration", "prompt_index", "metric"]).any():
        raise UserError(f"cannot read {file}: it holds a metric of one evaluation and prompt twice")
    return table


def up_to(table: pd.DataFrame | None, iteration: int) -> pd.DataFrame | None:
    """Keeps the evaluations up to an iteration; a training that is resumed there makes the later ones again."""
    return None if table is None else table[table["iteration"] <= iteration].reset_index(drop=True)


def added(table: pd.DataFrame | None, rows: pd.DataFrame) -> pd.DataFrame:
    """Adds an evaluation to the table; it replaces one of the same iteration."""
    if table is None:
        return rows
    iteration = rows["iteration"].iloc[0]
    return pd.concat([table[table["iteration"] != iteration], rows], ignore_index=True)


def means(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each evaluation: iteration, model_rows, seconds and the mean over prompts of every metric."""
    wide = table.pivot_table(index="iteration", columns="metric", values="value", aggfunc="mean", dropna=False)
    spent = table.groupby("iteration")[["model_rows", "seconds"]].first()
    joined: pd.DataFrame = spent.join(wide).reset_index().sort_values("iteration", ignore_index=True)
    return joined


def by_prompt(table: pd.DataFrame, metric: str) -> tuple[list[int], np.ndarray]:
    """The iterations of the evaluations, and a metric as float [evaluations, prompts]; NaN where a prompt has none.

    Raises:
        UserError: the curve has no such metric.
    """
    rows = table[table["metric"] == metric]
    if rows.empty:
        raise UserError(f"the curve has no metric {metric!r}")
    wide = rows.pivot(index="iteration", columns="prompt_index", values="value").sort_index()
    iterations: list[Any] = wide.index.tolist()
    return iterations, np.asarray(wide, dtype=np.float64)
