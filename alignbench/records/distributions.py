"""The table of 2-D distributions of a run (`distributions.parquet`), for backbones whose distribution is known.

Each row is one point of a distribution: its iteration, x, y, the mass at the point, and the mode of the base model that it
belongs to. Iteration `TARGET` is the target, 0 is the base model, and the last one is the evaluated model. All distributions
are for the first evaluation prompt.
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd

from alignbench.backbone import PointDistribution
from alignbench.errors import UserError
from alignbench.files.reading import Kind, read_table

FILE = "distributions.parquet"
FORMER_FILE = "laws.parquet"
"""Name of the file in runs before version 0.2."""
TABLE: dict[str, Kind] = {"iteration": "whole", "x": "number", "y": "number", "mass": "number", "mode": "whole"}
TARGET = -1
"""The iteration that stands for the target."""


def as_rows(distribution: PointDistribution, iteration: int) -> pd.DataFrame:
    """Converts one distribution to rows of the table."""
    columns = {"x": distribution.points[:, 0], "y": distribution.points[:, 1], "mass": distribution.mass}
    table = pd.DataFrame({name: values.astype(np.float32) for name, values in columns.items()})
    return table.assign(mode=distribution.mode.astype(np.int16), iteration=np.int32(iteration))


def read_distributions(folder: Path) -> pd.DataFrame | None:
    """Reads a run's `distributions.parquet`; None if its backbone does not know its distribution.

    Raises:
        UserError: the file is not such a table.
    """
    file = folder / FILE
    if not os.path.lexists(file):
        file = folder / FORMER_FILE
    if not os.path.lexists(file):
        return None
    table = read_table(file, TABLE)[list(TABLE)]
    numbers = table[["x", "y", "mass"]].to_numpy(dtype=np.float64)
    if not np.isfinite(numbers).all() or (table["mass"] < 0).any():
        raise UserError(f"cannot read {file}: points must be finite, and their masses not negative")
    mass = table.groupby("iteration")["mass"].sum()
    if not {TARGET, 0} <= set(mass.index) or (mass <= 0).any():
        raise UserError(f"cannot read {file}: the target's or the base model's distribution is missing, or one has no mass")
    return table


def mode_masses(distributions: pd.DataFrame) -> pd.DataFrame:
    """Computes the mass of each mode: one row per mode, with the columns `target`, `base` and `trained`, which sum to 1."""
    wide = distributions.groupby(["mode", "iteration"])["mass"].sum().unstack("iteration").fillna(0.0)
    return pd.DataFrame({"target": wide[TARGET], "base": wide[0], "trained": wide[wide.columns.max()]})
