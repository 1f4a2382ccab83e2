"""The files that a run writes into its folder: each whole or not at all, and by rank 0 alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from alignbench.backbone import PointDistribution
from alignbench.config.run_config import RunConfig
from alignbench.evaluation import curve
from alignbench.evaluation.evaluate import Evaluation, joined_phases
from alignbench.figures import plots, sheets
from alignbench.figures.rollout_tree import TREE, RolloutTree
from alignbench.figures.style import left_out, write_figure
from alignbench.files.writing import exclusive, refuse_links, refuse_taken, write_atomically
from alignbench.files.yaml_files import to_yaml
from alignbench.records import distributions
from alignbench.records.digests import remove_digests, write_digests
from alignbench.records.record import CONFIG, RESULT, Result, write_result
from alignbench.runtime.processes import Processes

SUBFOLDERS = ("checkpoints", "plots", "samples", "tensorboard", "wandb")
"""Folders that a run writes below its own."""


def check_free(path: Path) -> None:
    """Raises UserError where the folder of a new run exists and is not empty."""
    refuse_taken(path, f"choose another --out, or continue it with --resume {path}")


class RunFolder:
    """The folder of one run.

    Attributes:
        path: the folder.
        curve: the evaluations along the training so far, as in `evaluation.curve`; None before the first.
    """

    def __init__(self, path: Path, processes: Processes, warn: Callable[[str], None]) -> None:
        """Writes nothing yet.

        Args:
            warn: shows a sentence to the user.
        """
        self.path, self.processes, self.warn = path, processes, warn
        self.curve: pd.DataFrame | None = None
        self._distributions: list[pd.DataFrame] = []

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @contextmanager
    def claimed(self, *, resume: bool) -> Iterator[None]:
        """While entered, no other process writes into the folder.

        Raises:
            UserError: another process does, or the folder of a new run was taken while the models were loaded.
        """
        with ExitStack() as stack:

            def claim() -> None:
                stack.enter_context(exclusive(self.path))
                if not resume:
                    check_free(self.path)
                refuse_links(self.path, *SUBFOLDERS)

            self.processes.on_rank_zero(claim)
            yield

    def read_tables(self, iteration: int) -> None:
        """Takes up the tables of an interrupted run, without rows of later iterations than this one."""
        self.curve = curve.up_to(curve.read_curve(self.path), iteration)
        table = distributions.read_distributions(self.path)
        self._distributions = [] if table is None else [table[table["iteration"] <= iteration]]

    def forget_end(self, iteration: int, every: int | None) -> None:
        """Removes what only the end of a training adds to the tables, before an extension goes on from there.

        Args:
            iteration: the former end.
            every: iterations between two evaluations along the training.
        """
        if self.curve is not None and every is not None and iteration % every:
            self.curve = self.curve[self.curve["iteration"] != iteration].reset_index(drop=True)
            self._write_table(curve.FILE, self.curve)
        if any((table["iteration"] == iteration).any() for table in self._distributions):
            self._distributions = [table[table["iteration"] != iteration] for table in self._distributions]
            self._write_table(distributions.FILE, pd.concat(self._distributions, ignore_index=True))

    def write_config(self, config: RunConfig) -> None:
        """Writes the resolved configuration, from which the run can be repeated; digests of an earlier end are removed."""
        self.processes.on_rank_zero(lambda: remove_digests(self.path))
        text = to_yaml(config.resolved())
        self._write(CONFIG, lambda p: p.write_text(text, encoding="utf-8"))

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes `metrics.parquet`, one row for each iteration; nothing where there is none."""
        if rows:
            self._write_table("metrics.parquet", pd.DataFrame(rows))

    def write_evaluations(self, **phases: Evaluation) -> None:
        """Writes `evals.parquet`, one row for each image and metric of the phases `base` and `final`."""
        self._write_table("evals.parquet", joined_phases(**phases))

    def add_to_curve(self, evaluation: Evaluation, iteration: int, model_rows: int, seconds: float) -> None:
        """Adds an evaluation along the training to `curve.parquet`."""
        self.curve = curve.added(self.curve, curve.curve_rows(evaluation, iteration, model_rows, seconds))
        self._write_table(curve.FILE, self.curve)

    def add_distribution(self, distribution: PointDistribution | None, iteration: int) -> None:
        """Adds the model's distribution at an iteration to `distributions.parquet`; nothing where it is None."""
        if distribution is not None:
            others = [table[table["iteration"] != iteration] for table in self._distributions]
            self._distributions = [*others, distributions.as_rows(distribution, iteration)]
            table = pd.concat(self._distributions).sort_values("iteration", kind="stable", ignore_index=True)
            self._write_table(distributions.FILE, table)

    def add_target_distribution(self, distribution: PointDistribution | None) -> None:
        """Adds the distribution that the model is compared with."""
        self.add_distribution(distribution, distributions.TARGET)

    def write_samples(self, base: Evaluation, final: Evaluation, reward: str, images_per_prompt: int) -> None:
        """Writes sheets of the images of base and trained model, and one that shows both side by side."""
        folder = self.path / "samples"

        def write() -> None:
            for phase, evaluation in (("base", base), ("final", final)):
                write_atomically(folder / f"{phase}.png", _saver(sheets.grid(evaluation.images, images_per_prompt)))
            with left_out("samples/before_after.png", self.warn):
                figure = sheets.before_after(base, final, reward, images_per_prompt)
                write_figure(folder / "before_after.png", figure)

        self.processes.on_rank_zero(write)

    def write_tree(self, draw: Callable[[], RolloutTree]) -> None:
        """Writes the rollout tree that `draw` returns on rank 0, for the plot of it."""
        self.processes.on_rank_zero(lambda: draw().write(self.path / TREE))

    def write_result(self, result: Result) -> None:
        """Writes `result.json`, which says that the run is complete, and the digests of all files of the record."""

        def write() -> None:
            write_result(result, self.path)
            write_digests(self.path)

        self.processes.on_rank_zero(write)

    def keep_record(self, iterations: int) -> None:
        """Gives the record of the run so far another name, so that the run counts as unfinished and the record is not lost."""

        def rename() -> None:
            record = self.path / RESULT
            if record.is_file():
                record.rename(record.with_name(f"result_at_{iterations}_iterations.json"))

        self.processes.on_rank_zero(rename)

    def draw_plots(self) -> None:
        """Draws the plots of the run from its files."""
        self.processes.on_rank_zero(lambda: plots.plot_run(self.path, self.warn))

    def _write_table(self, name: str, table: pd.DataFrame) -> None:
        self._write(name, lambda p: table.to_parquet(p, index=False))

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        self.processes.on_rank_zero(lambda: write_atomically(self.path / name, write))


def _saver(image: Image.Image) -> Callable[[Path], Any]:
    return lambda path: image.save(path)
