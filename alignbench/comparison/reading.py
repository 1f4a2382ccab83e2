"""Reading every record below a folder, and naming setups and cells."""

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from alignbench.comparison.grid import repeated_methods
from alignbench.comparison.record import RECORD, RUNS, ComparisonRecord, read_comparison
from alignbench.comparison.results import RecordedRun, Results
from alignbench.config.inference import InferenceConfig
from alignbench.config.run_config import RESULT_NEUTRAL_KEYS, StopConfig, with_present_names
from alignbench.errors import UserError, did_you_mean
from alignbench.files.escaping import visible
from alignbench.load import complete_settings
from alignbench.records.record import CONFIG, RESULT, Result, read_result, visible_record
from alignbench.records.tables import read_evals, read_metrics

KEYS_OUTSIDE_METHOD_IDENTITY = {
    *("seed", "task", "backbone", "preset", "iterations", "evaluation", "budget"),
    *("snapshots", "threads", "device", *RESULT_NEUTRAL_KEYS),
}
"""Keys of a configuration in which two runs of one cell may differ; task, backbone and budget are the setup's."""
UNUSED = {"stop": StopConfig().model_dump(mode="json"), "inference": InferenceConfig().model_dump(mode="json")}
"""Sections of a configuration that change nothing with these values, and that records of older versions lack."""


@dataclass
class _Reading:
    """A finished run as it was read.

    Attributes:
        place: where it comes in the order of its comparison.
        part: its part of the comparison, and whether that is the first one.
        base_method, swept: of its cell's record; empty for a run without a comparison.
    """

    folder: Path
    result: Result
    place: float = float("inf")
    part: str = ""
    in_first_part: bool = True
    base_method: str = ""
    swept: dict[str, Any] = field(default_factory=dict)
    listed: bool = field(default=False)
    """Whether the run belongs to a comparison whose command is known."""

    @property
    def method(self) -> str:
        """Its objective and sampler without the values of sweeps."""
        return self.base_method or " x ".join(self.result.pair)


def read_results(folder: Path, *, reward: str | None = None, diversity: str | None = None) -> Results:
    """Every record below the folder, at any depth.

    Args:
        reward: the metric on the reward axis of plots, in place of each setup's first.
        diversity: the metric on the diversity axis, in place of each setup's first.

    Raises:
        UserError: the folder is not there, no record in it can be read, or none has such a metric.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    results = Results(folder, [])
    readings = _read_runs(folder, results)
    if not readings:
        why = f": {results.unreadable[0]}" if results.unreadable else " (no result.json)"
        raise UserError(f"there is no finished run below {folder}{why}")
    axes = {f"--{option}": name for option, name in (("reward", reward), ("diversity", diversity)) if name is not None}
    _read_comparisons(folder, readings, results, axes)
    results.commands += dict.fromkeys(_command(reading) for reading in readings if not reading.listed)
    readings.sort(key=lambda reading: reading.place)
    _name(readings, results)
    recorded = {metric for run in results.runs for metric in run.result.metrics}
    for missing in (metric for metric in results.metrics if metric not in recorded):
        hint = did_you_mean(missing, recorded)
        results.notes.append(f"the comparison's metrics name {missing!r}, which no run recorded{hint}")
    for option, name in (("reward", reward), ("diversity", diversity)):
        if name is not None:
            _choose(option, name, results)
    varying = _differing_environments([run.result.environment for run in results.runs])
    if varying:
        results.notes.append(
            f"the runs differ in {', '.join(varying)}: their numbers, seconds above all, may not be comparable"
        )
    return results


def _read_runs(folder: Path, results: Results) -> list[_Reading]:
    readings = []
    for file in sorted(folder.rglob(RESULT)):
        try:
            result = read_result(file.parent)
            if not result.metrics:
                raise UserError(f"{file} holds no metric")
            readings.append(_Reading(file.parent, visible_record(result)))
        except UserError as error:
            results.unreadable.append(str(error))
    return readings


def _read_comparisons(folder: Path, readings: list[_Reading], results: Results, axes: dict[str, str]) -> None:
    """Adds what the records of comparisons say: commands, cells that are not complete, and the order and parts of the others.

    Args:
        axes: options of this report, which its command needs too.
    """
    by_home: dict[Path, dict[str, _Reading]] = {}
    for reading in readings:
        by_home.setdefault(reading.folder.parent.parent, {})[reading.folder.name] = reading
    place = 0
    for home in sorted({folder, *by_home}):
        if not os.path.lexists(home / RECORD):
            continue
        try:
            comparison = read_comparison(home)
        except UserError as error:
            results.unreadable.append(str(error))
            continue
        _add_settings(comparison, results)
        if comparison.command:
            results.commands.append(" ".join([comparison.command, *map(shlex.quote, chain(*axes.items()))]))
        runs = {name: reading for name, reading in by_home.get(home, {}).items() if reading.folder == home / RUNS / name}
        for reading in by_home.get(home, {}).values():
            reading.listed = bool(comparison.command)
        first_part = next(iter(comparison.grid.parts), "")
        for cell in comparison.cells:
            if cell.id in runs:
                reading = runs[cell.id]
                reading.place, reading.part, reading.in_first_part = place, visible(cell.part), cell.part == first_part
                reading.base_method = visible(cell.base_method)
                reading.swept = {visible(key): _visible_value(value) for key, value in cell.swept.items()}
            place += 1
            if cell.status != "complete":
                texts = {"id": cell.id, "status": cell.status, "error": cell.error or ""}
                results.unfinished.append({key: " ".join(text.split()) for key, text in texts.items()})


def _add_settings(comparison: ComparisonRecord, results: Results) -> None:
    """What a comparison says about its report; of several comparisons, all that they say."""
    grid = comparison.grid
    results.description = results.description or grid.description
    results.metrics += [name for name in map(visible, grid.metrics) if name not in results.metrics]
    results.kl_levels = sorted({*results.kl_levels, *grid.kl_levels})
    for contrast in grid.contrasts:
        shown = contrast.model_copy(update={end: visible(getattr(contrast, end)) for end in ("first", "second")})
        if shown not in results.contrasts:
            results.contrasts.append(shown)
    results.complete_before_contrasts += comparison.complete_before_contrasts


def _command(reading: _Reading) -> str:
    """The command that makes a single run again: from its resolved configuration, or else what was typed."""
    file = reading.folder / CONFIG
    if file.is_file():
        return shlex.join(["alignbench", "run", "--config", str(file)])
    return str(reading.result.environment.get("command"))


def _choose(option: str, name: str, results: Results) -> None:
    names = {metric for run in results.runs for metric in run.result.metrics}
    if name not in names:
        raise UserError(f"--{option}: no run recorded a metric {name!r}{did_you_mean(name, names)}")
    results.chosen[option] = name
    for setup in results.setups:
        if name not in results.of(setup)[0].result.metrics:
            results.notes.append(f"{setup} has no {name}; its own {option} is shown")


def _differing_environments(environments: list[dict[str, Any]]) -> list[str]:
    """Dotted keys in which they are not all alike, but for the command, which differs from seed to seed."""
    first, *others = ({key: value for key, value in e.items() if key != "command"} for e in environments)
    return list(dict.fromkeys(key for other in others if other != first for key, *_ in dotted_differences(first, other)))


def _name(readings: list[_Reading], results: Results) -> None:
    """Sorts the runs into setups and cells, names both, and notes what a reader would not expect."""
    setups = _Names("the numbers are not comparable and stand apart")
    cells = _Names("they count as different methods")
    repeated = repeated_methods((reading.method, reading.part) for reading in readings)
    folders: dict[tuple[str, str, int], Path] = {}
    cells_seen: dict[str, dict[str, Any]] = {}
    for reading in readings:
        result = reading.result
        info = result.run
        setup = setups.of(f"{info.task} on {info.backbone}", setup_settings(result))
        method = {k: v for k, v in with_present_names(result.config).items() if k not in KEYS_OUTSIDE_METHOD_IDENTITY}
        method = {key: value for key, value in method.items() if key not in UNUSED or value != UNUSED[key]}
        pair = " x ".join(result.pair)
        method = _as_former(method, cells_seen.setdefault(pair, method))
        needs_part = not reading.in_first_part and reading.method in repeated
        name = f"{reading.part}: {pair}" if needs_part else pair
        cell = cells.of(name, method, within=setup)
        first = folders.setdefault((setup, cell, info.seed), reading.folder)
        if first != reading.folder:
            results.notes.append(f"{reading.folder} repeats cell and seed of {first} and is left out")
            continue
        metrics, evals = (_table(reading.folder, read, results) for read in (read_metrics, read_evals))
        evals = None if evals is None else _visible(evals)
        base = cell.replace(pair, reading.method, 1)
        results.runs.append(RecordedRun(reading.folder, result, setup, cell, reading.part, metrics, evals, base, reading.swept))
    results.notes += setups.notes + cells.notes


def _as_former(method: dict[str, Any], former: dict[str, Any]) -> dict[str, Any]:
    """The settings of a method as another run of the same name recorded them, if they are equal with every default filled in.

    Records of older versions have only those settings of plug-ins that were given.
    """
    if method == former:
        return method

    def filled(settings: dict[str, Any]) -> dict[str, Any]:
        plugins = {kind: settings[kind] for kind in ("objective", "sampler") if isinstance(settings.get(kind), dict)}
        return settings | {kind: complete_settings(kind, plugin) for kind, plugin in plugins.items()}

    return former if filled(method) == filled(former) else method


def _visible_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_visible_value(each) for each in value]
    return visible(value) if isinstance(value, str) else value


def _visible(evals: pd.DataFrame) -> pd.DataFrame:
    names: Any = {column: {text: visible(text) for text in evals[column].unique()} for column in ("prompt", "metric")}
    changed = {column: texts for column, texts in names.items() if any(text != escaped for text, escaped in texts.items())}
    return evals.assign(**{column: evals[column].map(texts) for column, texts in changed.items()})


def setup_settings(result: Result, *, any_task: bool = False) -> dict[str, Any]:
    """What must be equal for two cells to be compared. The budget is its limits; without any, the iterations.

    Args:
        any_task: leave out what may differ from task to task, the metrics and their settings.
    """
    limits = {k: v for k, v in (result.config.get("budget") or {}).items() if v is not None}
    budget = limits or {"iterations": result.config.get("iterations", result.run.iterations)}
    if any_task:
        return {"protocol": result.protocol.model_dump(mode="json", exclude={"evals"}), "budget": budget}
    return {"protocol": result.protocol.model_dump(mode="json"), "budget": budget, "metrics": sorted(result.metrics)}


class _Names:
    """Names for settings: the same name with a number where settings differ under one name."""

    def __init__(self, meaning: str) -> None:
        self.meaning = meaning
        self.settings: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.notes: list[str] = []

    def of(self, name: str, settings: dict[str, Any], within: str = "") -> str:
        former = self.settings.setdefault((within, name), [])
        if settings not in former:
            former.append(settings)
            if len(former) > 1:
                what = ", ".join(f"{key} ({one} and {other})" for key, one, other in dotted_differences(former[0], settings))
                self.notes.append(f"{name} ({len(former)}) differs from {name} in {what}: {self.meaning}")
        number = former.index(settings) + 1
        return name if number == 1 else f"{name} ({number})"


def dotted_differences(first: Any, second: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both values; None for a key that one of them lacks."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = dict.fromkeys([*first, *second])
        return [d for k in keys for d in dotted_differences(first.get(k), second.get(k), f"{path}.{k}" if path else str(k))]
    return [] if first == second else [(path, first, second)]


def _table(folder: Path, read: Callable[[Path], pd.DataFrame | None], results: Results) -> pd.DataFrame | None:
    try:
        return read(folder)
    except UserError as error:
        results.unreadable.append(str(error))
        return None
