"""Whether the runs of a folder belong together: the cells of one comparison, each of them once and by one protocol."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alignbench.comparison.grid import SETTINGS, read_grid
from alignbench.comparison.reading import dotted_differences
from alignbench.comparison.record import RECORD, RUNS, CellRecord, ComparisonRecord, read_comparison
from alignbench.config.run_config import PLUGINS, RESULT_NEUTRAL_KEYS, RunConfig
from alignbench.errors import UserError
from alignbench.files.writing import is_file_name
from alignbench.load import complete_settings
from alignbench.records.record import CONFIG, RESULT, Result
from alignbench.verification.run_checks import CheckedRun, check_run

OF_A_SEED = ("seed", *RESULT_NEUTRAL_KEYS)
"""Keys in which the runs of a method may differ."""
VERSIONS = ("alignbench", "python", "torch", "libraries")
"""Parts of the environment that say which code ran, beside the git revision."""
MACHINE = ("device", "processor", "cpu_capability", "fast_bfloat16", "threads", "processes", "platform")
"""Parts of the environment that say on which machine it ran, and how."""


@dataclass
class CheckedFolder:
    """A comparison, or a single run, after its records were compared with each other.

    Attributes:
        folder: the folder.
        runs: the finished runs by the names of their cells; a single run by the name of its folder.
        problems: a sentence for each thing that is wrong.
        notes: what could not be checked, and what a reader should know.
        comparison: the record of the comparison; None for a single run.
    """

    folder: Path
    runs: dict[str, CheckedRun] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    comparison: ComparisonRecord | None = None

    @property
    def results(self) -> dict[str, Result]:
        """The records of the runs that can be read."""
        return {name: run.result for name, run in self.runs.items() if run.result is not None}

    @property
    def revisions(self) -> dict[str, list[str]]:
        """Git revision -> the cells that were run at it; `unknown` for runs outside a checkout."""
        found: dict[str, list[str]] = {}
        for name, result in self.results.items():
            found.setdefault(str(result.environment.get("git_revision") or "unknown"), []).append(name)
        return found


def check_folder(folder: Path, *, allow_revisions: bool = False) -> CheckedFolder:
    """Checks every record of a comparison's or a run's folder without running anything.

    Args:
        folder: the folder of a comparison, or of one run.
        allow_revisions: whether the cells of a comparison may have been run at several git revisions.

    Raises:
        UserError: the folder holds neither.
    """
    if (folder / RECORD).is_file():
        return _check_comparison(folder, allow_revisions)
    if (folder / RESULT).is_file():
        checked = CheckedFolder(folder, {folder.resolve().name: check_run(folder)})
    elif (folder / CONFIG).is_file():
        raise UserError(f"the run in {folder} has not ended, so there is nothing to verify; go on with `run --resume {folder}`")
    else:
        raise UserError(f"{folder} is neither the folder of a comparison ({RECORD}) nor that of a run ({RESULT})")
    _collect(checked)
    return checked


def _check_comparison(folder: Path, allow_revisions: bool) -> CheckedFolder:
    checked = CheckedFolder(folder)
    try:
        checked.comparison = comparison = read_comparison(folder)
        if (folder / SETTINGS).is_file() and read_grid(folder) != comparison.grid:
            checked.problems.append(f"{folder / SETTINGS} and {RECORD} describe different comparisons")
        outside = [cell.id for cell in comparison.cells if not is_file_name(cell.id)]
        if outside:
            raise UserError(f"{folder / RECORD} has a cell {outside[0]!r}, which is not the name of a folder")
    except UserError as error:
        checked.problems.append(str(error))
        return checked
    for cell in comparison.cells:
        place = folder / RUNS / cell.id
        if cell.status == "complete" or (place / RESULT).is_file():
            checked.runs[cell.id] = check_run(place)
    checked.notes += _unfinished(comparison, checked)
    checked.problems += _strangers(folder, comparison)
    _collect(checked)
    cells = {cell.id: cell for cell in comparison.cells if cell.id in checked.runs}
    for problems in (_cell_problems(checked, cells), _mixed(checked, cells, allow_revisions), _copies(checked, cells)):
        if not checked.problems:  # what is wrong in one way is often wrong in a second
            checked.problems += problems
    return checked


def _unfinished(comparison: ComparisonRecord, checked: CheckedFolder) -> Iterator[str]:
    """A note about the cells without a record."""
    missing = [cell for cell in comparison.cells if cell.id not in checked.runs]
    if missing:
        why = missing[0].error or missing[0].status
        yield f"{len(missing)} of {len(comparison.cells)} cells are not finished, such as {missing[0].id}: {why}"


def _collect(checked: CheckedFolder) -> None:
    """Takes over the problems and notes of the runs; several different notes become one line."""
    checked.problems += [run.problem for run in checked.runs.values() if run.problem]
    notes = [note for run in checked.runs.values() for note in run.notes]
    checked.notes += notes[:1] if len(notes) == 1 else [f"{notes[0]}, and {len(notes) - 1} more such notes"] if notes else []


def _strangers(folder: Path, comparison: ComparisonRecord) -> Iterator[str]:
    """Finished runs below the folder that no cell of the comparison names; reports would count them."""
    known = {folder / RUNS / cell.id for cell in comparison.cells}
    for place, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if RESULT in files and Path(place) not in known:
            yield f"{place} holds a run that is not a cell of the comparison in {folder}"


def _cell_problems(checked: CheckedFolder, cells: Mapping[str, CellRecord]) -> Iterator[str]:
    """Cells whose run is another one than the comparison says."""
    comparison = checked.comparison
    assert comparison is not None
    for name, result in checked.results.items():
        cell, file = cells[name], checked.runs[name].folder / RESULT
        if result.run.id != name:
            yield f"{file} is the record of {result.run.id}: the folder was copied or renamed"
            continue
        grid = comparison.grid.part(cell.part)
        config = result.config
        limits = {key: value for key, value in (config.get("budget") or {}).items() if value is not None}
        backbone = config.get("backbone")
        said = {
            "seed": (result.run.seed, cell.seed),
            "objective": (result.pair[0], cell.objective),
            "sampler": (result.pair[1], cell.sampler),
            "task": (config.get("task", cell.task), cell.task),
            "budget": (limits, grid.budget.model_dump(exclude_none=True)),
            "threads": (config.get("threads", grid.threads), grid.threads),
            "preset": (config.get("preset", grid.preset), grid.preset),
            "backbone": (backbone.get("name") if isinstance(backbone, Mapping) else grid.backbone, grid.backbone),
        }
        for key, (recorded, planned) in said.items():
            if recorded != planned:
                yield f"{file} has {key} {recorded}, and the comparison has {planned} for this cell"


def _mixed(checked: CheckedFolder, cells: Mapping[str, CellRecord], allow_revisions: bool) -> Iterator[str]:
    """Cells that were trained or evaluated in ways that must be the same within a comparison."""

    def setup(name: str) -> tuple[str, str]:
        return cells[name].part, cells[name].task

    def method(name: str) -> tuple[str, ...]:
        return *setup(name), cells[name].objective, cells[name].sampler

    yield from _differing(checked, setup, protocol_of_run, "were evaluated differently")
    yield from _differing(checked, setup, lambda result: result.task_content, "have different contents of their task")
    yield from _differing(checked, method, lambda result: {"pairs": result.task.get("pairs")}, "trained on different images")
    yield from _differing(checked, method, _method, "are seeds of one method with different settings")
    yield from _differing(checked, lambda name: "", _versions, "were run by different versions")
    revisions = checked.revisions
    if len(revisions) > 1:
        (first, a), (second, b), *_ = revisions.items()
        sentence = f"{a[0]} was run at git revision {first[:12]} and {b[0]} at {second[:12]}"
        if allow_revisions:
            checked.notes.append(f"{sentence}; a replay of a cell of each shows whether both compute the same")
        else:
            yield f"{sentence}: the code of a comparison must be one; --allow-revisions replays a cell of each instead"
    machines = [{key: result.environment.get(key) for key in MACHINE} for result in checked.results.values()]
    keys = [key for other in machines[1:] for key, *_ in dotted_differences(machines[0], other)]
    if keys:
        checked.notes.append(f"the cells were run on machines that differ in {', '.join(dict.fromkeys(keys))}")


def _differing(
    checked: CheckedFolder, group: Callable[[str], Any], select: Callable[[Result], dict[str, Any]], what: str
) -> Iterator[str]:
    """A sentence for each run whose selected part differs from that of the first run of its group."""
    first: dict[Any, tuple[str, dict[str, Any]]] = {}
    for name, result in checked.results.items():
        selected = select(result)
        other, its = first.setdefault(group(name), (name, selected))
        differences = dotted_differences(its, selected)
        if differences:
            key, there, here = differences[0]
            yield f"{other} and {name} {what}: {key} is {there} and {here}"


def protocol_of_run(result: Result) -> dict[str, Any]:
    """How a run was evaluated; guidance, weights and inference are a method's own."""
    protocol = result.protocol.model_dump(mode="json", exclude={"guidance", "weights"})
    evals = {name: {k: v for k, v in about.items() if k != "device"} for name, about in protocol.pop("evals").items()}
    roles = {name: (metric.role, metric.higher_is_better) for name, metric in result.metrics.items()}
    return protocol | {"evals": evals, "metrics": roles}


def _method(result: Result) -> dict[str, Any]:
    """The settings of a method; a setting that is newer than the run has its default."""
    config = RunConfig().resolved() | result.config
    plugins = {kind: config[kind] for kind in PLUGINS if isinstance(config[kind], Mapping)}
    config |= {kind: complete_settings(kind, plugin) for kind, plugin in plugins.items()}
    return {key: value for key, value in config.items() if key not in OF_A_SEED}


def _versions(result: Result) -> dict[str, Any]:
    return {key: result.environment.get(key) for key in VERSIONS}


def _copies(checked: CheckedFolder, cells: Mapping[str, CellRecord]) -> Iterator[str]:
    """Seeds of one method whose runs have the same training rewards and the same scores: one is a copy of the other."""
    seen: dict[Any, str] = {}
    for name, run in checked.runs.items():
        cell, identity = cells[name], content(run)
        if identity is not None:
            key = (cell.part, cell.task, cell.objective, cell.sampler, identity)
            other = seen.setdefault(key, name)
            if other != name:
                yield copied(other, name)


def copied(first: str, second: str) -> str:
    """The sentence about two runs with the same content."""
    return f"{first} and {second} have the same training rewards and the same scores of every image: one is a copy of the other"


def content(run: CheckedRun) -> bytes | None:
    """The training rewards and the scores of the trained model as bytes; None for a run that did not train.

    Runs without training may have equal scores for every seed, because the noise of an evaluation has a seed of its own.
    """
    if run.metrics is None or run.evals is None or not len(run.metrics):
        return None
    final = run.evals[run.evals["phase"] == "final"].sort_values(["metric", "prompt_index", "image"])
    return b"".join(np.asarray(part, dtype=np.float64).tobytes() for part in (run.metrics["reward"], final["value"]))
