"""Masses of the target's modes, for runs whose backbone knows the distribution of its samples."""

from typing import Any

import numpy as np
import pandas as pd

from alignbench.comparison.results import BASE, RecordedRun, Results
from alignbench.errors import UserError
from alignbench.records import distributions
from alignbench.statistics import Interval, mean_interval, within

TARGET = "target"
"""The name of the target among the cells."""


def kept_distributions(run: RecordedRun, results: Results) -> pd.DataFrame | None:
    """Reads a run's `distributions.parquet`; None if there is none. If it is damaged, `results.unreadable` says so."""
    try:
        return distributions.read_distributions(run.folder)
    except UserError as error:
        if str(error) not in results.unreadable:
            results.unreadable.append(str(error))
        return None


def first_distributions(results: Results, setup: str) -> dict[str, pd.DataFrame]:
    """Reads the distributions of the first run of each cell that recorded them."""
    first: dict[str, pd.DataFrame] = {}
    for run in results.of(setup):
        table = kept_distributions(run, results) if run.cell not in first else None
        if table is not None:
            first[run.cell] = table
    return first


def modes_frame(results: Results, setup: str) -> pd.DataFrame:
    """Computes the mass of each mode under the models for the first evaluation prompt, averaged over seeds.

    Intervals stay inside [0, 1].

    Returns:
        A row per cell and mode. The target and the base model come first; they are the same for all runs and have no interval
        (`n` is 0). The table is empty if no run recorded its distribution.
    """
    fixed: list[dict[str, Any]] = []
    parts: list[pd.DataFrame] = []
    for run in results.of(setup):
        table = kept_distributions(run, results)
        if table is None:
            continue
        masses = distributions.mode_masses(table).reset_index()
        if not parts:
            fixed = [
                {"cell": name, "mode": mode} | Interval(float(mass), -np.inf, np.inf, 0)._asdict()
                for name, column in ((TARGET, "target"), (BASE, "base"))
                for mode, mass in zip(masses["mode"], masses[column], strict=True)
            ]
        parts.append(masses[["mode", "trained"]].assign(cell=run.cell))
    if not parts:
        return pd.DataFrame()
    groups = pd.concat(parts).groupby(["cell", "mode"], sort=False)["trained"]
    rows = [
        {"cell": cell, "mode": mode} | within(mean_interval(m.to_numpy()), 0.0, 1.0)._asdict() for (cell, mode), m in groups
    ]
    return pd.DataFrame(fixed + rows)
