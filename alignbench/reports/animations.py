"""Animations of a comparison: how the distributions of its methods move during training."""

from pathlib import Path

import pandas as pd

from alignbench.analysis.modes import first_distributions
from alignbench.comparison.reading import read_results
from alignbench.errors import UserError
from alignbench.figures.animation import write_animation
from alignbench.reports.plots.comparison_plots import plots_folder

FILE = "distributions.gif"


def write_animations(folder: Path) -> list[Path]:
    """Writes `plots/distributions.gif` for each setup, with the first run of each method that recorded its distributions.

    Args:
        folder: the folder of a run or of a comparison.

    Returns:
        The files.

    Raises:
        UserError: there is no finished run, or none that recorded its distribution at several iterations.
    """
    results = read_results(folder)
    written = []
    for setup in results.setups:
        models = {cell: table for cell, table in first_distributions(results, setup).items() if _moves(table)}
        if models:
            file = plots_folder(results, setup, folder / "plots") / FILE
            write_animation(models, file)
            written.append(file)
    if not written:
        raise UserError(
            f"no run below {folder} recorded its distribution during training; only models with a known distribution do, such "
            "as gaussian_mixture with --set snapshots=20"
        )
    return written


def _moves(distributions: pd.DataFrame) -> bool:
    """Whether a run recorded more than the target and one model."""
    return bool(distributions["iteration"].nunique() > 2)
