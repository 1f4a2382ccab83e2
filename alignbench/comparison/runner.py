"""Running a comparison: cells with a record are kept, interrupted ones resume, and all others begin."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from alignbench.backbone import device_named
from alignbench.comparison.cells import run_cell
from alignbench.comparison.grid import SETTINGS, Cell, Grid, missing_axis_values, read_grid
from alignbench.comparison.planning import command_of
from alignbench.comparison.pool import run_in_workers
from alignbench.comparison.ray_engine import run_with_ray
from alignbench.comparison.reading import dotted_differences
from alignbench.comparison.record import RECORD, RUNS, CellRecord, ComparisonRecord, read_comparison
from alignbench.config.run_config import RESULT_NEUTRAL_KEYS, load_config
from alignbench.errors import UserError, did_you_mean
from alignbench.files.writing import exclusive, is_free, refuse_links, write_atomically
from alignbench.files.yaml_files import to_yaml
from alignbench.load import every_setting
from alignbench.records.record import CONFIG, RESULT, read_result
from alignbench.runtime import launch
from alignbench.tasks import changed_parts, configured_task, refuse_changed

ENGINES = ("local", "ray")
FORMER_STUDY = "study.yaml"
"""What the folder of a study of alignbench 0.1 holds."""


class Observer(Protocol):
    """Receives the progress of a comparison; see `alignbench.cli.console.GridProgress`."""

    def began(self, cell: str) -> None: ...
    def moved(self, cell: str, row: Mapping[str, Any], progress: float) -> None: ...
    def ended(self, record: CellRecord) -> None: ...


def compare(
    grid: Grid,
    out: Path,
    *,
    command: str | None = None,
    engine: str = "local",
    workers: int = 1,
    processes: int = 1,
    gpus: float = 0.0,
    observer: Observer | None = None,
) -> ComparisonRecord:
    """Runs the cells that have no record yet; a failed one does not stop the others.

    Args:
        out: a new folder, or that of an earlier comparison, which is resumed.
        command: what the record names as the command that makes this comparison again; `command_of(grid, out)` by default.
        workers: cells to run in parallel on this machine; a single one runs in this process.
        processes: processes that share a cell, each with a GPU of its own where there are any.
        gpus: GPUs that each cell requests from Ray.

    Raises:
        UserError: there is no such engine; a cell cannot be shared by this number of processes; the folder holds something
            else, or cells with other settings; or another process is at work in it.
        KeyboardInterrupt: the cells at work have left a checkpoint; the same call resumes them.
    """
    check_execution(grid, engine, processes)
    cells = grid.cells()
    check_folder(cells, out)
    with exclusive(out):
        write_atomically(out / SETTINGS, lambda p: p.write_text(to_yaml(grid.model_dump(mode="json")), encoding="utf-8"))
        progress = Progress(grid, cells, out, command or command_of(grid, out), observer)
        waiting = [cell for cell in cells if progress.records[cell.id].status == "pending"]
        if engine == "ray":
            run_with_ray(waiting, out / RUNS, progress, gpus, processes)
        elif workers == processes == 1:
            _run_here(waiting, out / RUNS, progress)
        else:
            run_in_workers(waiting, out / RUNS, progress, workers, processes)
        return progress.record()


def check_execution(grid: Grid, engine: str, processes: int) -> None:
    """Refuses an engine that does not exist, a device that this machine lacks, or cells that cannot be shared.

    Raises:
        UserError: says which.
    """
    if engine not in ENGINES:
        raise UserError(f"there is no engine {engine!r}{did_you_mean(engine, ENGINES)}")
    for config in (method.config for method in grid.methods()):
        launch.check_share(config.prompts_per_iteration, processes)
        if engine == "local":
            device_named(config.device)


class Progress:
    """The state of all cells, on disk after each change."""

    def __init__(self, grid: Grid, cells: list[Cell], out: Path, command: str, observer: Observer | None) -> None:
        self.grid, self.out, self.command, self.observer = grid, out, command, observer
        self.records = {cell.id: _cell_record(cell, out) for cell in cells}
        self.complete_before_contrasts = self._complete_before_contrasts()
        self._write()

    def record(self) -> ComparisonRecord:
        cells, before = list(self.records.values()), self.complete_before_contrasts
        return ComparisonRecord(command=self.command, grid=self.grid, cells=cells, complete_before_contrasts=before)

    def _complete_before_contrasts(self) -> int:
        """The number in the former record if the contrasts are the same, else that of the cells that are complete now."""
        if not self.grid.contrasts:
            return 0
        with suppress(UserError):  # there is no former record, or none that can be read
            former = read_comparison(self.out)
            if former.grid.contrasts == self.grid.contrasts:
                return former.complete_before_contrasts
        return sum(cell.status == "complete" for cell in self.records.values())

    def began(self, cell: Cell) -> None:
        if self.observer:
            self.observer.began(cell.id)

    def moved(self, cell: Cell, row: Mapping[str, Any], progress: float) -> None:
        if self.observer:
            self.observer.moved(cell.id, row, progress)

    def ended(self, cell: Cell, error: str | None) -> None:
        change = {"status": "failed" if error else "complete", "error": error}
        self.records[cell.id] = self.records[cell.id].model_copy(update=change)
        self._write()
        if self.observer:
            self.observer.ended(self.records[cell.id])

    def _write(self) -> None:
        self.record().write(self.out / RECORD)


def _run_here(cells: Iterable[Cell], runs: Path, progress: Progress) -> None:
    """Runs the cells in this process, one after another."""
    bases: dict[str, Any] = {}
    for cell in cells:
        progress.began(cell)

        def report(row: Mapping[str, Any], share: float, cell: Cell = cell) -> None:
            progress.moved(cell, row, share)

        progress.ended(cell, run_cell(cell.config, runs / cell.id, bases, report))


def _cell_record(cell: Cell, out: Path) -> CellRecord:
    complete = (out / RUNS / cell.id / RESULT).is_file()
    return CellRecord.of(cell, "complete" if complete else "pending")


def done(cells: Iterable[Cell], out: Path) -> list[Cell]:
    """The cells that have a record."""
    return [cell for cell in cells if (out / RUNS / cell.id / RESULT).is_file()]


def check_folder(cells: list[Cell], out: Path) -> None:
    """Refuses a folder in which the cells cannot be run or compared.

    Raises:
        UserError: it holds something else, or finished cells that would be left out, or cells that were run with other settings
            or another content of their task, or a record that cannot be read.
    """
    if not (out / SETTINGS).is_file():
        if (out / FORMER_STUDY).is_file():
            raise UserError(
                f"{out} holds a study of alignbench 0.1, which can be reported on but not resumed; choose another --out"
            )
        if not is_free(out):
            raise UserError(f"{out} exists and holds no comparison; choose another --out")
    refuse_links(out, RUNS)
    if (out / SETTINGS).is_file():
        _refuse_lost_cells(cells, out)
    fingerprints: dict[str, dict[str, str]] = {}
    for cell in cells:
        folder = out / RUNS / cell.id
        if (folder / RESULT).is_file():
            result = read_result(folder)
            _refuse_other_settings(cell, folder, result.config)
            task = cell.config.model_dump_json(include={"task", "reward", "evals"})
            if task not in fingerprints:
                fingerprints[task] = configured_task(cell.config).fingerprint()
            refuse_changed(changed_parts(fingerprints[task], result.task), str(folder))
        elif (folder / CONFIG).is_file():
            _refuse_other_settings(cell, folder, None)


def _refuse_lost_cells(cells: list[Cell], out: Path) -> None:
    ids = {cell.id for cell in cells}
    lost = [cell for cell in done(read_grid(out).cells(), out) if cell.id not in ids]
    if lost:
        listed = ", ".join(cell.id for cell in lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise UserError(f"{out} also compares {listed}: name {missing_axis_values(lost, cells)} too, or choose another --out")


def _refuse_other_settings(cell: Cell, folder: Path, recorded: Mapping[str, Any] | None) -> None:
    """Raises UserError where the cell's settings are not those of its folder.

    Args:
        recorded: the configuration in the folder's record, if it has one. Where it is not equal, the run's file decides:
            in that, a setting that is newer than the run has its default.
    """
    now = every_setting(cell.config).resolved()
    if recorded == now:
        return
    former = every_setting(load_config(file=folder / CONFIG)).resolved()
    changed = [each for each in dotted_differences(former, now) if each[0].partition(".")[0] not in RESULT_NEUTRAL_KEYS]
    if changed:
        differences = ", ".join(f"{key} {then} (now {at_present})" for key, then, at_present in changed)
        raise UserError(f"{folder} was run with other settings: {differences}; choose another --out")
