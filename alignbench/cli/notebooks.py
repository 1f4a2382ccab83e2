"""The main commands as Python functions for notebooks: they return pandas frames and matplotlib figures."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from matplotlib.figure import Figure

from alignbench.cli.console import GridProgress
from alignbench.cli.options import results_folder
from alignbench.cli.views.records import EvalView
from alignbench.comparison import runner
from alignbench.comparison.fronts import make_fronts
from alignbench.comparison.grid import former_grid
from alignbench.comparison.planning import Request, plan_grid
from alignbench.comparison.reading import read_results
from alignbench.comparison.results import Results
from alignbench.config.run_config import load_config
from alignbench.errors import RunError, UserError
from alignbench.files.paths import local_path
from alignbench.files.writing import reserved
from alignbench.records.record import CONFIG, EvalRecord
from alignbench.reports.report import report_with_plots
from alignbench.scoring import score

Rows = Literal["runs", "methods", "pairs", "prompts", "images", "curves"]
"""What a row of a frame is; see `load_results`."""


def compare(
    objectives: Sequence[str],
    samplers: Sequence[str],
    *,
    tasks: Sequence[str] | None = None,
    seeds: int | Sequence[int] = 3,
    backbone: str | None = None,
    preset: str | None = None,
    budget: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    sweep: Mapping[str, Sequence[Any] | None] | None = None,
    out: str | Path | None = None,
    workers: int = 1,
    front: bool = True,
    progress: bool = True,
) -> pd.DataFrame:
    """Trains a grid of objectives and samplers under one budget, as the command `compare` does.

    Args:
        objectives, samplers: names, or `label=name`.
        tasks, backbone, preset: names; the preset's task, `tiny` and `quick` by default.
        seeds: the number of seeds, or a list of them.
        budget: `model_rows`, `reward_calls` or `seconds`: where each cell ends.
        settings: other keys of the configuration, nested as in a comparison file: `{"optimizer": {"lr": 1e-4}}`, or
            `{"objectives": {"tmpo": {"objective": {"beta": 4}}}}` for one method.
        sweep: key of a setting -> its values.
        out: folder; that of an earlier comparison is resumed. `results/<time>-comparison` by default.
        workers: cells to run in parallel on this machine.
        front: whether the front of the tilted target is computed as well.
        progress: whether progress is shown on stderr.

    Returns:
        The rows `methods` of `load_results`. `frame.attrs["folder"]` is the folder. A warning names each cell that failed.

    Raises:
        UserError: a name or a setting is wrong, or the folder holds another comparison.
        RunError: every cell failed.
    """
    asked: dict[str, Any] = {
        "objectives": list(objectives),
        "samplers": list(samplers),
        "tasks": None if tasks is None else list(tasks),
        "seeds": list(range(seeds)) if isinstance(seeds, int) else list(seeds),
        "backbone": backbone,
        "preset": preset,
        "budget": None if budget is None else dict(budget),
        "settings": None if settings is None else dict(settings),
        "sweep": None if sweep is None else dict(sweep),
    }
    request = Request().with_options(**asked)
    if out is not None:
        request = request.continuing(former_grid(local_path(out)))
    grid = plan_grid(request, workers)
    place = nullcontext(local_path(out)) if out is not None else reserved(results_folder("comparison"))
    with place as folder:
        cells = grid.cells()
        view = GridProgress(len(cells), len(runner.done(cells, folder))) if progress else None
        with view or nullcontext():
            record = runner.compare(grid, folder, workers=workers, observer=view)
        failed = [cell for cell in record.cells if cell.status == "failed"]
        if len(failed) == len(record.cells):
            raise RunError(f"all {len(failed)} cells failed; the first: {failed[0].error}")
        for cell in failed:
            warnings.warn(f"cell {cell.id} failed: {cell.error}", stacklevel=2)
        if front:
            make_fronts(grid, folder, warn=lambda line: warnings.warn(line, stacklevel=2))
        return load_results(folder, rows="methods")


def evaluate(
    model: str | Path | None = None,
    *,
    images: str | Path | None = None,
    prompts: str | Path | None = None,
    evals: Sequence[str] = (),
    task: str | None = None,
    settings: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Evaluates a model, or images that exist already, with the metrics that a run uses, as the command `eval` does.

    Args:
        model: folder of a run, whose newest checkpoint is evaluated; a local diffusers folder; or the name of a backbone.
        images, prompts: in place of a model, a folder of images and the file of their prompts.
        evals: names of metrics; those of the task by default.
        task: prompts and metrics; the run's, or `ocr`, by default.
        settings: keys of the configuration, nested: `{"evaluation": {"prompts": 16}}`; those of metrics are below `evals`.
        out: a new folder for the record and its tables; nothing is written by default.
        progress: whether progress is shown on stderr.

    Returns:
        A row per metric, with metric, value, lower, upper, n (prompts), higher_is_better, role. `frame.attrs["protocol"]` says
        how the images were drawn.

    Raises:
        UserError: a name or a setting is wrong, or both or neither of a model and images are given.
        RunError: a scorer failed.
    """
    if (model is None) == (images is None) or (images is None) != (prompts is None):
        raise UserError("choose what to evaluate: a model, or images with prompts")
    given = dict(settings or {})
    of_evals = given.pop("evals", {})
    run = local_path(model) if model is not None and (local_path(model) / CONFIG).is_file() else None
    chosen = {"task": task, "backbone": None if run or model is None else str(model)}
    options = {**given, **{key: value for key, value in chosen.items() if value is not None}}
    config = load_config(file=run / CONFIG if run else None, options=options)
    folder = None if out is None else local_path(out)
    with EvalView(silent=not progress) as view:
        how: dict[str, Any] = {"evals": list(evals), "settings": of_evals, "advance": view.advance}
        if images is not None and prompts is not None:
            record = score.score_images(local_path(images), local_path(prompts), config, folder, **how)
        else:
            record = score.score_model(config, folder, run=run, **how)
    return _metrics(record)


def report(folder: str | Path, *, reward: str | None = None, diversity: str | None = None) -> dict[str, Figure]:
    """Writes report.html, report.md, tables and plots of the finished runs below a folder, as the command `report` does.

    Args:
        folder: the folder of a comparison or of a run, or any folder that contains runs.
        reward, diversity: metrics on the axes, in place of the default ones.

    Returns:
        Name -> figure of each plot of the comparison; with several setups, the setup's name and a colon precede it.

    Raises:
        UserError: there is no finished run, or none with such a metric.
    """
    place = local_path(folder)
    _, plots = report_with_plots(place, reward=reward, diversity=diversity)
    several = len({setup for setup, _ in plots.figures if not setup.startswith("family ")}) > 1
    return {f"{setup}: {name}" if several else name: figure for (setup, name), figure in plots.figures.items()}


def load_results(folder: str | Path, *, rows: Rows = "runs") -> pd.DataFrame:
    """Reads every finished run below a folder.

    Args:
        folder: the folder of a comparison or of a run, or any folder that contains runs.
        rows: what a row is. runs: a run and metric, with `base`, `final` and `difference` and their intervals over prompts.
            methods: a method and metric, with the mean over seeds and its interval, the base model as a method of its own.
            pairs: two methods and a metric, with tests over seeds. prompts: a run, metric and prompt. images: a run, metric and
            image. curves: a run and iteration.

    Returns:
        The frame. `frame.attrs["folder"]` is the folder, and `frame.attrs["notes"]` says what was left out and why.

    Raises:
        UserError: there is no finished run below the folder, or no such kind of rows.
    """
    frames = {
        "runs": "runs_frame",
        "methods": "cells_frame",
        "pairs": "pairs_frame",
        "prompts": "prompts_frame",
        "images": "images_frame",
        "curves": "curves_frame",
    }
    if rows not in frames:
        raise UserError(f"there are no rows {rows!r}; known: {', '.join(frames)}")
    results: Results = read_results(local_path(folder))
    frame: pd.DataFrame = getattr(results, frames[rows]).copy()
    frame.attrs |= {"folder": str(results.folder), "notes": [*results.notes, *results.unreadable]}
    return frame


def _metrics(record: EvalRecord) -> pd.DataFrame:
    """A row per metric of an evaluation."""
    columns = ["value", "lower", "upper", "n", "higher_is_better", "role"]
    rows = [{"metric": name, **{key: getattr(found, key) for key in columns}} for name, found in record.metrics.items()]
    frame = pd.DataFrame(rows, columns=["metric", *columns])
    frame.attrs["protocol"] = record.protocol.model_dump(mode="json")
    return frame
