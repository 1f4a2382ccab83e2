"""Records of finished runs as tidy pandas frames: what plots, tables and the report of a comparison are made of.

A *cell* is an objective with a sampler and their settings; its runs differ in nothing but the seed. A *setup* is what must be
equal for cells to be compared: task, backbone, evaluation protocol and budget. Nothing is averaged across setups.
"""

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ValidationError

from alignbench.config.run_config import WITHOUT_EFFECT, with_present_names
from alignbench.errors import UserError, did_you_mean
from alignbench.files.escaping import slugs, visible
from alignbench.files.reading import read_record
from alignbench.records.record import Estimate, Result, read_evals, read_metrics, read_result, visible_record
from alignbench.settings import first_problem
from alignbench.statistics import (
    Interval,
    holm,
    interval_over_runs,
    mean_interval,
    paired_interval,
    probability_of_improvement,
    welch,
    welch_interval,
)

BASE = "base model"
DIVERSITY = ("lgmd", "cosine_diversity", "vendi", "mode_coverage", "pixel_diversity", "mode_entropy", "modes_covered")
"""Diversity metrics, the one that is plotted first: the first that a setup has."""
SPENT = ("model_rows", "seconds", "reward_calls")
"""Columns of `cells_frame` and `runs_frame` that say what a training took."""

_NOT_OF_THE_METHOD = {
    *("seed", "task", "backbone", "preset", "iterations", "evaluation", "budget"),
    *("snapshots", "threads", "device", *WITHOUT_EFFECT),
}
"""Keys of a configuration in which two runs of one cell may differ; task, backbone and budget are the setup's."""


@dataclass(frozen=True)
class RecordedRun:
    """A finished run: its folder, its record and tables (None where there is none), and the names of its setup and cell.

    Every text in them is as `visible` shows it.
    """

    folder: Path
    result: Result
    setup: str
    cell: str
    metrics: pd.DataFrame | None
    evals: pd.DataFrame | None


@dataclass
class Results:
    """All runs below a folder.

    Attributes:
        folder: where they were looked for.
        runs: those that can be used.
        unreadable: a line for each record, table or plot that is left out, with the reason; all else is there.
        unfinished: cells of comparisons that are not complete: id, status, error.
        notes: what a reader must know about how runs were grouped or left out.
        commands: what makes all of this anew.
        chosen: metrics for `reward` and `diversity` in place of each setup's first.
    """

    folder: Path
    runs: list[RecordedRun]
    unreadable: list[str] = field(default_factory=list)
    unfinished: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    chosen: dict[str, str] = field(default_factory=dict)

    @property
    def setups(self) -> list[str]:
        return list(dict.fromkeys(run.setup for run in self.runs))

    @cached_property
    def file_names(self) -> dict[str, str]:
        """Of each setup, unlike any other's."""
        return slugs(self.setups)

    def of(self, setup: str) -> list[RecordedRun]:
        return [run for run in self.runs if run.setup == setup]

    def reward(self, setup: str) -> str:
        """The chosen one, else the metric that the setup's runs trained on; the first of several."""
        metrics = self.of(setup)[0].result.metrics
        if self.chosen.get("reward") in metrics:
            return self.chosen["reward"]
        return next((name for name, metric in metrics.items() if metric.role == "reward"), next(iter(metrics)))

    def diversity(self, setup: str) -> str | None:
        """The chosen one, else the setup's first diversity metric, or None."""
        metrics = self.of(setup)[0].result.metrics
        return next((name for name in (self.chosen.get("diversity"), *DIVERSITY) if name in metrics), None)

    @property
    def environment(self) -> dict[str, Any]:
        """What the runs were made with; where they differ, every value."""
        found: dict[str, list[Any]] = {}
        for run in self.runs:
            for key, value in run.result.environment.items():
                if key != "command" and value not in found.setdefault(key, []):
                    found[key].append(value)
        return {key: values[0] if len(values) == 1 else " | ".join(map(str, values)) for key, values in found.items()}

    @cached_property
    def runs_frame(self) -> pd.DataFrame:
        """A row a run and metric: base, final and difference (each with lower, upper and n prompts), and what was spent."""
        rows = []
        for run in self.runs:
            info, budget = run.result.run, run.result.budget
            objective, sampler = run.result.pair
            for metric, record in run.result.metrics.items():
                row: dict[str, Any] = {**_keys(run), "objective": objective, "sampler": sampler, "run": info.id}
                row |= {"metric": metric, "role": record.role, "higher_is_better": record.higher_is_better}
                for name, estimate in (("base", record.base), ("final", record.final), ("difference", record.difference)):
                    row |= _columns(name, _interval(estimate))
                row |= {
                    "model_rows": budget.model_rows_rollout + budget.model_rows_train,
                    "reward_calls": budget.reward_calls,
                    "seconds": budget.seconds,
                    "seconds_evaluation": budget.seconds_evaluation,
                    "peak_memory_bytes": budget.peak_memory_bytes,
                    "failed_scores": budget.failed_scores,
                    "alarms": len(run.result.alarms),
                    "iterations": info.iterations,
                    "status": info.status,
                }
                rows.append(row)
        return pd.DataFrame(rows)

    @cached_property
    def images_frame(self) -> pd.DataFrame:
        """Every run's evaluation table: a row an image and metric (image -1: of a whole prompt), phase base or final."""
        parts = [run.evals.assign(**_keys(run)) for run in self.runs if run.evals is not None]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["setup", "cell", "seed"])

    @cached_property
    def prompts_frame(self) -> pd.DataFrame:
        """A row a run, metric and prompt: means over the prompt's pictures of base and final, and their difference."""
        parts = []
        for run in self.runs:
            if run.evals is None:
                continue
            index = ["metric", "prompt_index", "prompt"]
            wide = run.evals.pivot_table(
                index=index, columns="phase", values="value", aggfunc="mean", dropna=False, observed=True
            )
            wide = wide.reindex(columns=["base", "final"]).dropna(how="all").reset_index()
            wide["final"] = wide["final"].fillna(wide["base"]) if run.result.run.iterations == 0 else wide["final"]
            parts.append(wide.assign(**_keys(run)))
        if not parts:
            columns = ["setup", "cell", "seed", "metric", "prompt_index", "prompt", "base", "final", "difference"]
            return pd.DataFrame(columns=columns)
        frame = pd.concat(parts, ignore_index=True)
        return frame.assign(difference=frame["final"] - frame["base"])

    @cached_property
    def curves_frame(self) -> pd.DataFrame:
        """Every run's metrics table, a row an iteration; `training_seconds` is the time since the first."""
        parts = []
        for run in self.runs:
            if run.metrics is not None:
                seconds = run.metrics["seconds"].cumsum() if "seconds" in run.metrics else np.nan
                parts.append(run.metrics.assign(**_keys(run), training_seconds=seconds))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["setup", "cell", "seed"])

    @cached_property
    @np.errstate(over="ignore", invalid="ignore")  # of numbers near the largest there are
    def cells_frame(self) -> pd.DataFrame:
        """A row a setup, cell and metric, the base model as a cell of its own.

        `mean`, `lower`, `upper` and `n`: over seeds by Student's t (`over` is `seeds`); of one seed, and of the base model,
        over prompts likewise (`over` is `prompts`), which does not tell what another seed would give. `sd` is over seeds.
        `iqm`: interquartile mean over seeds and prompts, by a jackknife of whole seeds. `difference`: to the base model.
        What was spent, `seconds` of training among it: means over seeds, with the lowest and the highest, `_min` and `_max`.
        """
        rows = []
        for setup in self.setups:
            rows += self._base_rows(setup)
            for cell in dict.fromkeys(run.cell for run in self.of(setup)):
                rows += self._cell_rows([run for run in self.of(setup) if run.cell == cell])
        return pd.DataFrame(rows)

    @cached_property
    @np.errstate(over="ignore", invalid="ignore")
    def pairs_frame(self) -> pd.DataFrame:
        """A row a setup, metric and two cells: what they differ in.

        `difference`: first minus second, of means over seeds, with Welch's interval and the smaller number of seeds.
        `p`: Welch's; `p_holm`: corrected for all pairs of the setup and metric.
        `paired_*`: per prompt, seeds averaged, which holds for these trained models only.
        `probability`: that a run of the first is better than one of the second.
        """
        rows = []
        for setup in self.setups:
            for metric in self.of(setup)[0].result.metrics:
                family = self._pair_rows(setup, metric)
                for row, p in zip(family, holm([row["p"] for row in family]), strict=True):
                    rows.append({**row, "p_holm": p, "tests": len(family)})
        return pd.DataFrame(rows)

    def scores(self, setup: str, cell: str, metric: str, column: str = "final") -> np.ndarray:
        """[seeds, prompts] of one cell; without per-prompt records, the seeds' means as [seeds, 1]."""
        table = self._by_metric["prompts"].get((setup, cell, metric))
        if table is not None:
            return np.asarray(table.pivot(index="seed", columns="prompt_index", values=column), dtype=np.float64)
        return self._by_metric["runs"][setup, cell, metric][column].to_numpy(dtype=np.float64)[:, None]

    @cached_property
    def _by_metric(self) -> dict[str, dict[Any, pd.DataFrame]]:
        """The rows of one setup, cell and metric; found once, for they are asked for again and again."""
        frames, keys = {"runs": self.runs_frame, "prompts": self.prompts_frame}, ["setup", "cell", "metric"]
        return {name: dict(iter(frame.groupby(keys, sort=False))) for name, frame in frames.items()}

    def _base_rows(self, setup: str) -> list[dict[str, Any]]:
        """The base model is the same for all runs, up to rounding; the first run's record is taken."""
        run = self.of(setup)[0]
        nothing = {k: v for name in SPENT for k, v in _spent(name, [0.0]).items()}
        return [
            {"setup": setup, "cell": BASE, "objective": "", "sampler": "", "metric": name, "role": record.role}
            | {"higher_is_better": record.higher_is_better, "seeds": 0, "over": "prompts", "sd": np.nan}
            | _columns("mean", _interval(record.base))
            | _columns("iqm", self._iqm(setup, run.cell, name, "base"))
            | _columns("difference", Interval(np.nan, np.nan, np.nan, 0))
            | nothing
            for name, record in run.result.metrics.items()
        ]

    def _cell_rows(self, runs: list[RecordedRun]) -> list[dict[str, Any]]:
        first = runs[0]
        rows: list[dict[str, Any]] = []
        budgets = [run.result.budget for run in runs]
        spent = (
            _spent("model_rows", [b.model_rows_rollout + b.model_rows_train for b in budgets])
            | _spent("reward_calls", [b.reward_calls for b in budgets])
            | _spent("seconds", [b.seconds for b in budgets])
        )
        for name, record in first.result.metrics.items():
            records = [run.result.metrics[name] for run in runs if name in run.result.metrics]
            final = np.array([_interval(r.final).value for r in records])
            difference = np.array([_interval(r.difference).value for r in records])
            several = int((~np.isnan(final)).sum()) > 1
            rows.append(
                dict[str, Any](setup=first.setup, cell=first.cell, objective=first.result.pair[0])
                | {"sampler": first.result.pair[1], "metric": name, "role": record.role}
                | {"higher_is_better": record.higher_is_better, "seeds": len(runs), "over": "seeds" if several else "prompts"}
                | {"sd": float(np.nanstd(final, ddof=1)) if several else np.nan}
                | _columns("mean", mean_interval(final) if several else _interval(record.final))
                | _columns("iqm", self._iqm(first.setup, first.cell, name, "final"))
                | _columns("difference", mean_interval(difference) if several else _interval(record.difference))
                | spent
            )
        return rows

    def _iqm(self, setup: str, cell: str, metric: str, column: str) -> Interval:
        scores = self.scores(setup, cell, metric, column)
        if column == "base":
            scores = scores[:1]
        return interval_over_runs(scores)

    def _pair_rows(self, setup: str, metric: str) -> list[dict[str, Any]]:
        of_runs = self._by_metric["runs"]
        cells = dict.fromkeys(run.cell for run in self.of(setup))
        frame = of_runs[setup, next(iter(cells)), metric]
        higher = frame["higher_is_better"].iloc[0]
        means = {cell: of_runs[setup, cell, metric]["final"].to_numpy(dtype=np.float64) for cell in cells}
        prompts = {cell: _mean_over_seeds(self.scores(setup, cell, metric)) for cell in means}
        means[BASE] = np.full(max(map(len, means.values())), frame["base"].iloc[0], dtype=np.float64)
        prompts[BASE] = _mean_over_seeds(self.scores(setup, next(iter(cells)), metric, "base"))
        rows: list[dict[str, Any]] = []
        for first, second in combinations(means, 2):
            a, b = means[first], means[second]
            same_prompts = len(prompts[first]) == len(prompts[second])
            paired = paired_interval(prompts[first], prompts[second]) if same_prompts else mean_interval(np.array([]))
            sign = -1.0 if higher is False else 1.0
            rows.append(
                {"setup": setup, "metric": metric, "first": first, "second": second, "higher_is_better": higher}
                | _columns("difference", welch_interval(a, b))
                | {"p": welch(a, b), "probability": probability_of_improvement(sign * a[:, None], sign * b[:, None])}
                | _columns("paired", paired)
            )
        return rows


def read_results(folder: Path, *, reward: str | None = None, diversity: str | None = None) -> Results:
    """Every record below the folder, at any depth.

    Args:
        reward, diversity: metrics that are shown against one another, in place of each setup's first.

    Raises:
        UserError: the folder is not there, no record in it can be read, or none has such a metric.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    found: list[tuple[Path, Result]] = []
    results = Results(folder, [])
    for file in sorted(folder.rglob("result.json")):
        try:
            result = read_result(file.parent)
            if not result.metrics:
                raise UserError(f"{file} holds no metric")
            found.append((file.parent, visible_record(result)))
        except UserError as error:
            results.unreadable.append(str(error))
    if not found:
        why = f": {results.unreadable[0]}" if results.unreadable else " (no result.json)"
        raise UserError(f"there is no finished run below {folder}{why}")
    axes = {f"--{option}": name for option, name in (("reward", reward), ("diversity", diversity)) if name is not None}
    alone = _read_comparisons(folder, found, results, axes)
    results.commands += dict.fromkeys(_command(*run) for run in found if run[0] in alone)
    _name(found, results)
    for option, name in (("reward", reward), ("diversity", diversity)):
        if name is not None:
            _choose(option, name, results)
    varying = _differing_environments([run.result.environment for run in results.runs])
    if varying:
        results.notes.append(
            f"the runs differ in {', '.join(varying)}: their numbers, seconds above all, may not be comparable"
        )
    return results


def _read_comparisons(folder: Path, found: list[tuple[Path, Result]], results: Results, axes: dict[str, str]) -> set[Path]:
    """What the files of comparisons add: their commands, cells that are not complete, and the order of the others.

    Args:
        axes: options of this report, which its command needs too.

    Returns:
        The runs that belong to none.
    """
    runs = [run for run, _ in found]
    alone = set(runs)
    order: dict[Path, int] = {}
    for home in sorted({folder, *(run.parent.parent for run in runs)}):
        file = home / "comparison.json"
        if not os.path.lexists(file):
            continue
        try:
            comparison = _read_comparison(file)
        except UserError as error:
            results.unreadable.append(str(error))
            continue
        if comparison.command:
            results.commands.append(" ".join([comparison.command, *map(shlex.quote, chain(*axes.items()))]))
            alone -= {run for run in runs if run.parent.parent == home}
        for cell in comparison.cells:
            order[home / "runs" / cell.id] = len(order)
            if cell.status != "complete":
                results.unfinished.append({k: " ".join((v or "").split()) for k, v in cell.model_dump().items()})
    found.sort(key=lambda run: order.get(run[0], len(order)))
    return alone


class _Cell(BaseModel):
    id: str
    status: str
    error: str | None = None


class _Comparison(BaseModel):
    """What is read of `comparison.json`."""

    command: str | None = None
    cells: list[_Cell] = []


def _read_comparison(file: Path) -> _Comparison:
    try:
        return _Comparison.model_validate(read_record(file))
    except ValidationError as error:
        raise UserError(f"{file} is not a record of a comparison: {first_problem(error, 'the record')}") from None


def _command(folder: Path, result: Result) -> str:
    """What makes a single run anew: its resolved configuration, or else what was typed."""
    file = folder / "config.yaml"
    return (
        shlex.join(["alignbench", "run", "--config", str(file)]) if file.is_file() else str(result.environment.get("command"))
    )


def _choose(option: str, name: str, results: Results) -> None:
    known = {metric for run in results.runs for metric in run.result.metrics}
    if name not in known:
        raise UserError(f"--{option}: no run recorded a metric {name!r}{did_you_mean(name, known)}")
    results.chosen[option] = name
    for setup in results.setups:
        if name not in results.of(setup)[0].result.metrics:
            results.notes.append(f"{setup} has no {name}; its own {option} is shown")


def _differing_environments(environments: list[dict[str, Any]]) -> list[str]:
    """Dotted keys in which they are not all alike; the command, which differs from seed to seed, is none."""
    first, *others = ({key: value for key, value in e.items() if key != "command"} for e in environments)
    return list(dict.fromkeys(line.partition(" ")[0] for other in others for line in _differences(first, other)))


def _name(found: list[tuple[Path, Result]], results: Results) -> None:
    """Sorts the runs into setups and cells, names both, and notes what a reader would not expect."""
    setups = _Names("the numbers are not comparable and stand apart")
    cells = _Names("they count as different methods")
    seen: dict[tuple[str, str, int], Path] = {}
    for folder, result in found:
        info = result.run
        setup = setups.of(f"{info.task} on {info.backbone}", _setup_settings(result))
        method = {k: v for k, v in with_present_names(result.config).items() if k not in _NOT_OF_THE_METHOD}
        cell = cells.of(" x ".join(result.pair), method, within=setup)
        first = seen.setdefault((setup, cell, info.seed), folder)
        if first != folder:
            results.notes.append(f"{folder} repeats cell and seed of {first} and is left out")
            continue
        metrics, evals = (_table(folder, read, results) for read in (read_metrics, read_evals))
        if evals is not None:
            names: Any = {column: {text: visible(text) for text in evals[column].unique()} for column in ("prompt", "metric")}
            evals = evals.assign(**{column: evals[column].map(shown) for column, shown in names.items()})
        results.runs.append(RecordedRun(folder, result, setup, cell, metrics, evals))
    results.notes += setups.notes + cells.notes


def _setup_settings(result: Result) -> dict[str, Any]:
    """What must be equal for two cells to be compared. The budget is its limits; without any, the iterations."""
    limits = {k: v for k, v in (result.config.get("budget") or {}).items() if v is not None}
    budget = limits or {"iterations": result.config.get("iterations", result.run.iterations)}
    return {"protocol": result.protocol.model_dump(mode="json"), "budget": budget, "metrics": sorted(result.metrics)}


class _Names:
    """Names for settings: the same name with a number where settings differ under one name."""

    def __init__(self, meaning: str) -> None:
        self.meaning = meaning
        self.known: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.notes: list[str] = []

    def of(self, name: str, settings: dict[str, Any], within: str = "") -> str:
        known = self.known.setdefault((within, name), [])
        if settings not in known:
            known.append(settings)
            if len(known) > 1:
                what = ", ".join(_differences(known[0], settings))
                self.notes.append(f"{name} ({len(known)}) differs from {name} in {what}: {self.meaning}")
        number = known.index(settings) + 1
        return name if number == 1 else f"{name} ({number})"


def _differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Dotted keys whose values differ, with both values."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = dict.fromkeys([*first, *second])
        return [d for k in keys for d in _differences(first.get(k), second.get(k), f"{path}.{k}" if path else str(k))]
    return [] if first == second else [f"{path} ({first} and {second})"]


def _keys(run: RecordedRun) -> dict[str, Any]:
    return {"setup": run.setup, "cell": run.cell, "seed": run.result.run.seed}


def _table(folder: Path, read: Callable[[Path], pd.DataFrame | None], results: Results) -> pd.DataFrame | None:
    try:
        return read(folder)
    except UserError as error:
        results.unreadable.append(str(error))
        return None


def _interval(estimate: Estimate) -> Interval:
    """A record's null is NaN, and an interval without ends is unbounded."""
    if estimate.value is None:
        return Interval(np.nan, np.nan, np.nan, estimate.n)
    lower = -np.inf if estimate.lower is None else estimate.lower
    return Interval(estimate.value, lower, np.inf if estimate.upper is None else estimate.upper, estimate.n)


def _columns(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_lower": interval.lower, f"{name}_upper": interval.upper, f"{name}_n": interval.n}


def _spent(name: str, of_runs: Sequence[float]) -> dict[str, float]:
    return {name: float(np.mean(of_runs)), f"{name}_min": float(min(of_runs)), f"{name}_max": float(max(of_runs))}


def _mean_over_seeds(scores: np.ndarray) -> np.ndarray:
    """[seeds, prompts] -> [prompts]; NaN where no seed has a score."""
    known = ~np.isnan(scores)
    total, count = np.where(known, scores, 0.0).sum(0), known.sum(0)
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
