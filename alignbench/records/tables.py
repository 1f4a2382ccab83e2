"""The tables beside a run's record: `metrics.parquet`, a row per iteration; `evals.parquet`, a row per image and metric."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from alignbench.errors import UserError
from alignbench.files.reading import Kind, read_table

if TYPE_CHECKING:
    import pandas as pd

METRICS, EVALS = "metrics.parquet", "evals.parquet"
METRICS_COLUMNS: dict[str, Kind] = {"iteration": "whole", "model_rows": "number", "reward": "number", "seconds": "number"}
"""The columns that every table of metrics has. Its other columns, except `splits`, are numbers too."""
EVALS_COLUMNS: dict[str, Kind] = {
    "prompt_index": "whole",
    "prompt": "text",
    "image": "whole",
    "metric": "text",
    "value": "number",
    "phase": "text",
}
"""The columns of a table of evaluations."""


def read_metrics(folder: Path) -> "pd.DataFrame | None":
    """Reads a run's `metrics.parquet`: numbers, and where its trees split, with one row per iteration; None without a table.

    Raises:
        UserError: the file is not such a table.
    """
    import numpy as np
    import pandas as pd

    file = folder / METRICS
    if not os.path.lexists(file):
        return None
    table = read_table(file, METRICS_COLUMNS, {"splits": "text"})
    table = table[[c for c in table.columns if c == "splits" or pd.api.types.is_numeric_dtype(table[c])]]
    if table["iteration"].duplicated().any():
        raise UserError(f"cannot read {file}: two rows have the same iteration")
    if not np.isfinite(table[["model_rows", "seconds"]].to_numpy(dtype=np.float64)).all():
        raise UserError(f"cannot read {file}: model_rows and seconds must be finite")
    return table


def read_evals(folder: Path) -> "pd.DataFrame | None":
    """Reads a run's `evals.parquet`, with one row per image, metric and phase (`base` or `final`); None without a table.

    Raises:
        UserError: the file is not such a table.
    """
    import numpy as np

    file = folder / EVALS
    if not os.path.lexists(file):
        return None
    table = read_table(file, EVALS_COLUMNS)[list(EVALS_COLUMNS)]
    if table.duplicated(["phase", "metric", "prompt_index", "image"]).any():
        raise UserError(f"cannot read {file}: two rows have the same phase, metric, prompt_index and image")
    if table.drop_duplicates(["prompt_index", "prompt"])["prompt_index"].duplicated().any():
        raise UserError(f"cannot read {file}: two prompts have the same prompt_index")
    if np.isinf(table["value"].to_numpy(dtype=np.float64)).any():
        raise UserError(f"cannot read {file}: a value is infinite")
    return table
