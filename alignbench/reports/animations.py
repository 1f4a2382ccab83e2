"""Animations of a run or a comparison: how distributions move during training, and how rollout trees grow."""

import os
from pathlib import Path

import pandas as pd

from alignbench.analysis.modes import first_distributions
from alignbench.comparison.reading import read_results
from alignbench.comparison.results import Results
from alignbench.errors import UserError
from alignbench.figures.animation import write_animation, write_growing_tree
from alignbench.figures.rollout_tree import TREE, RolloutTree
from alignbench.figures.style import left_out
from alignbench.files.escaping import slugs
from alignbench.files.writing import refuse_links
from alignbench.reports.plots.comparison_plots import plots_folder

FILE = "distributions.gif"


def write_animations(folder: Path) -> tuple[list[Path], list[str]]:
    """Writes GIFs into `plots/`, from the first run of each method that has something to show.

    - `distributions.gif` for each setup whose runs recorded their distributions at several iterations.
    - `tree.gif` of each method that kept a rollout tree; in a comparison of several, `tree_METHOD.gif`.

    Args:
        folder: the folder of a run or of a comparison.

    Returns:
        The files, and a line for each one that cannot be read or drawn.

    Raises:
        UserError: there is no finished run, none with anything to animate, or nothing that can be drawn.
    """
    results = read_results(folder)
    refuse_links(folder, "plots")
    written: list[Path] = []
    failed = results.unreadable
    for setup in results.setups:
        models = {cell: table for cell, table in first_distributions(results, setup).items() if _moves(table)}
        below = plots_folder(results, setup, folder / "plots")
        if models:
            with left_out(f"animation {FILE} of {setup}", failed.append):
                write_animation(models, below / FILE)
                written.append(below / FILE)
        written += _write_trees(results, setup, below, failed)
    if not written:
        if failed:
            raise UserError(failed[0])
        raise UserError(
            f"no run below {folder} kept a rollout tree or recorded its distribution during training; a tree needs a model of "
            "images and save_images=true, the other a known distribution, such as gaussian_mixture with --set snapshots=20"
        )
    return written, failed


def _moves(distributions: pd.DataFrame) -> bool:
    """Whether a run recorded more than the target and one model."""
    return bool(distributions["iteration"].nunique() > 2)


def _write_trees(results: Results, setup: str, below: Path, failed: list[str]) -> list[Path]:
    """Writes the growing tree of the first run of each cell that kept one; what fails is a line of `failed`."""
    kept: dict[str, Path] = {}
    for run in results.of(setup):
        if os.path.lexists(run.folder / TREE):
            kept.setdefault(run.cell, run.folder / TREE)
    written = []
    for cell, slug in slugs(kept).items():
        file = below / ("tree.gif" if len(kept) == 1 else f"tree_{slug}.gif")
        with left_out(f"animation {file.name} of {setup}", failed.append):
            write_growing_tree(RolloutTree.read(kept[cell]), file)
            written.append(file)
    return written
