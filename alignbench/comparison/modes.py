"""Masses of the target's modes, for runs whose backbone knows the distribution that it draws from."""

import pandas as pd

from alignbench.backbones.mixture import distributions
from alignbench.comparison.results import BASE, RecordedRun, Results
from alignbench.errors import UserError
from alignbench.statistics import mean_interval

TARGET = "target"
"""The name of the target among the cells."""


def kept_distributions(results: Results, setup: str) -> dict[tuple[str, int], pd.DataFrame]:
    """(cell, seed) -> the run's `distributions.parquet`. A table that cannot be read is a line of `results.unreadable`."""
    tables = ((run, _read(run, results)) for run in results.of(setup))
    return {(run.cell, run.result.run.seed): table for run, table in tables if table is not None}


def modes_frame(kept: dict[tuple[str, int], pd.DataFrame]) -> pd.DataFrame:
    """A row per cell and mode: the mass there of the model's distribution for the first evaluation prompt, mean over seeds.

    The target and the base model come first. Empty where no run knows its distribution.

    Args:
        kept: `kept_distributions` of one setup.
    """
    parts = []
    for (cell, _), table in kept.items():
        masses = distributions.mode_masses(table).reset_index()
        for name, column in ((TARGET, "target"), (BASE, "base"), (cell, "trained")):
            parts.append(masses[["mode", column]].rename(columns={column: "mass"}).assign(cell=name))
    if not parts:
        return pd.DataFrame()
    groups = pd.concat(parts).groupby(["cell", "mode"], sort=False)["mass"]
    rows = [{"cell": cell, "mode": mode} | mean_interval(m.to_numpy())._asdict() for (cell, mode), m in groups]
    return pd.DataFrame(rows)


def _read(run: RecordedRun, results: Results) -> pd.DataFrame | None:
    try:
        return distributions.read_distributions(run.folder)
    except UserError as error:
        if str(error) not in results.unreadable:
            results.unreadable.append(str(error))
        return None
