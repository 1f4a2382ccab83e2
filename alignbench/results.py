"""Records of finished runs as tidy pandas frames: what plots, tables and the report of a comparison are made of.

A *cell* is an objective with a sampler and their settings; its runs differ in nothing but the seed. A *setup* is what must be
equal for cells to be compared: task, backbone, evaluation protocol and budget. Nothing is averaged across setups.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ValidationError

from alignbench.errors import UserError
from alignbench.record import Estimate, Result, read_result
from alignbench.statistics import (
    Interval,
    holm,
    mean_interval,
    paired_interval,
    probability_of_improvement,
    seed_interval,
    stratified_interval,
    welch,
)

BASE = "base model"
DIVERSITY = ("lgmd", "cosine_diversity", "vendi", "mode_coverage", "pixel_diversity", "mode_entropy", "modes_covered")
"""Diversity metrics, the one that is plotted first: the first that a setup has."""

_NOT_OF_THE_METHOD = {
    *("seed", "task", "backbone", "preset", "iterations", "evaluation", "budget"),
    *("pictures", "snapshots", "checkpoint_every", "threads", "device"),
}
"""Keys of a configuration in which two runs of one cell may differ; task, backbone and budget are the setup's."""


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its record and tables (None where there is none), and the names of its setup and cell."""

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
        unreadable: a line for each record that cannot be read; the others are used.
        unfinished: cells of `comparison.json` that are not complete: id, status, error.
        notes: what a reader must know about how runs were grouped or left out.
        command: what made the comparison, where it is known.
    """

    folder: Path
    runs: list[Run]
    unreadable: list[str] = field(default_factory=list)
    unfinished: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    command: str | None = None

    @property
    def setups(self) -> list[str]:
        return list(dict.fromkeys(run.setup for run in self.runs))

    def of(self, setup: str) -> list[Run]:
        return [run for run in self.runs if run.setup == setup]

    def reward(self, setup: str) -> str:
        """The metric that the setup's runs trained on; the first of several."""
        metrics = self.of(setup)[0].result.metrics
        return next((name for name, metric in metrics.items() if metric.role == "reward"), next(iter(metrics)))

    def diversity(self, setup: str) -> str | None:
        """The setup's first diversity metric, or None."""
        return next((name for name in DIVERSITY if name in self.of(setup)[0].result.metrics), None)

    @cached_property
    def runs_frame(self) -> pd.DataFrame:
        """A row a run and metric: base, final and difference (each with lower, upper and n prompts), and what was spent."""
        rows = []
        for run in self.runs:
            info, budget = run.result.run, run.result.budget
            for metric, record in run.result.metrics.items():
                row: dict[str, Any] = {**_keys(run), "objective": info.objective, "sampler": info.sampler, "run": info.id}
                row |= {"metric": metric, "role": record.role, "higher_is_better": record.higher_is_better}
                for name, estimate in (("base", record.base), ("final", record.final), ("difference", record.difference)):
                    row |= _columns(name, _interval(estimate))
                row |= {
                    "model_rows": budget.model_rows_rollout + budget.model_rows_train,
                    "reward_calls": budget.reward_calls,
                    "seconds": budget.seconds,
                    "status": info.status,
                }
                rows.append(row)
        return pd.DataFrame(rows)

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
    def cells_frame(self) -> pd.DataFrame:
        """A row a setup, cell and metric, the base model as a cell of its own.

        `mean`, `lower`, `upper` and `n`: over seeds by Student's t (`over` is `seeds`); of one seed, and of the base model,
        over prompts by bootstrap (`over` is `prompts`), which does not tell what another seed would give. `sd` is over seeds.
        `iqm`: interquartile mean over seeds and prompts, by bootstrap of whole seeds. `difference`: to the base model.
        """
        rows = []
        for setup in self.setups:
            rows += self._base_rows(setup)
            for cell in dict.fromkeys(run.cell for run in self.of(setup)):
                rows += self._cell_rows([run for run in self.of(setup) if run.cell == cell])
        return pd.DataFrame(rows)

    @cached_property
    def pairs_frame(self) -> pd.DataFrame:
        """A row a setup, metric and two cells: what they differ in.

        `difference`: first minus second, of means over seeds. `p`: Welch's, over seeds; `p_holm`: corrected for all pairs of
        the setup and metric. `paired_*`: per prompt, seeds averaged, which holds for these trained models only.
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
        nothing = {"model_rows": 0.0, "reward_calls": 0.0, "seconds": 0.0}
        return [
            {"setup": setup, "cell": BASE, "objective": "", "sampler": "", "metric": name, "role": record.role}
            | {"higher_is_better": record.higher_is_better, "seeds": 0, "over": "prompts", "sd": np.nan}
            | _columns("mean", _interval(record.base))
            | _columns("iqm", self._iqm(setup, run.cell, name, "base"))
            | _columns("difference", Interval(np.nan, np.nan, np.nan, 0))
            | nothing
            for name, record in run.result.metrics.items()
        ]

    def _cell_rows(self, runs: list[Run]) -> list[dict[str, Any]]:
        first = runs[0]
        rows: list[dict[str, Any]] = []
        budgets = [run.result.budget for run in runs]
        spent = {
            "model_rows": float(np.mean([b.model_rows_rollout + b.model_rows_train for b in budgets])),
            "reward_calls": float(np.mean([b.reward_calls for b in budgets])),
            "seconds": float(np.mean([b.seconds for b in budgets])),
        }
        for name, record in first.result.metrics.items():
            records = [run.result.metrics[name] for run in runs if name in run.result.metrics]
            final = np.array([_interval(r.final).value for r in records])
            difference = np.array([_interval(r.difference).value for r in records])
            several = int((~np.isnan(final)).sum()) > 1
            rows.append(
                dict[str, Any](setup=first.setup, cell=first.cell, objective=first.result.run.objective)
                | {"sampler": first.result.run.sampler, "metric": name, "role": record.role}
                | {"higher_is_better": record.higher_is_better, "seeds": len(runs), "over": "seeds" if several else "prompts"}
                | {"sd": float(np.nanstd(final, ddof=1)) if several else np.nan}
                | _columns("mean", seed_interval(final) if several else _interval(record.final))
                | _columns("iqm", self._iqm(first.setup, first.cell, name, "final"))
                | _columns("difference", seed_interval(difference) if several else _interval(record.difference))
                | spent
            )
        return rows

    def _iqm(self, setup: str, cell: str, metric: str, column: str) -> Interval:
        scores = self.scores(setup, cell, metric, column)
        if column == "base":
            scores = scores[:1]
        return stratified_interval(scores, shared_runs=True)

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
                | {"difference": float(np.nanmean(a) - np.nanmean(b)) if _known(a) and _known(b) else np.nan}
                | {"p": welch(a, b), "probability": probability_of_improvement(sign * a[:, None], sign * b[:, None])}
                | _columns("paired", paired)
            )
        return rows


def read_results(folder: Path) -> Results:
    """Every record below the folder, at any depth.

    Raises:
        UserError: the folder is not there, or no record in it can be read.
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
            found.append((file.parent, result))
        except UserError as error:
            results.unreadable.append(str(error))
        except (ValidationError, AttributeError, UnicodeDecodeError) as error:
            results.unreadable.append(f"{file} is no record of a run: {str(error).splitlines()[0]}")
    if not found:
        why = f": {results.unreadable[0]}" if results.unreadable else " (no result.json)"
        raise UserError(f"there is no finished run below {folder}{why}")
    _read_comparison(folder / "comparison.json", results)
    _name(found, results)
    return results


def _read_comparison(file: Path, results: Results) -> None:
    """What a comparison's own file adds: the command, and cells that are not complete."""
    if not file.is_file():
        return
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        results.command = data.get("command")
        for cell in data.get("cells", []):
            if cell.get("status") != "complete":
                line = {key: str(cell.get(key) or "") for key in ("id", "status", "error")}
                results.unfinished.append(line)
    except (OSError, ValueError, AttributeError) as error:
        results.unreadable.append(f"cannot read {file}: {error}")


def _name(found: list[tuple[Path, Result]], results: Results) -> None:
    """Sorts the runs into setups and cells, names both, and notes what a reader would not expect."""
    setups = _Names("the numbers are not comparable and stand apart")
    cells = _Names("they count as different methods")
    seen: dict[tuple[str, str, int], Path] = {}
    for folder, result in found:
        info = result.run
        setup = setups.of(f"{info.task} on {info.backbone}", _setup_settings(result))
        method = {k: v for k, v in result.config.items() if k not in _NOT_OF_THE_METHOD}
        cell = cells.of(f"{info.objective} x {info.sampler}", method, within=setup)
        first = seen.setdefault((setup, cell, info.seed), folder)
        if first != folder:
            results.notes.append(f"{folder} repeats cell and seed of {first} and is left out")
            continue
        tables = [_table(folder / f"{name}.parquet", results) for name in ("metrics", "evals")]
        results.runs.append(Run(folder, result, setup, cell, *tables))
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


def _keys(run: Run) -> dict[str, Any]:
    return {"setup": run.setup, "cell": run.cell, "seed": run.result.run.seed}


def _table(file: Path, results: Results) -> pd.DataFrame | None:
    if not file.is_file():
        return None
    try:
        return pd.read_parquet(file)
    except (OSError, ValueError) as error:
        results.unreadable.append(f"cannot read {file}: {str(error).splitlines()[0]}")
        return None


def _interval(estimate: Estimate) -> Interval:
    """A record's null is NaN, and an interval without ends is unbounded."""
    if estimate.value is None:
        return Interval(np.nan, np.nan, np.nan, estimate.n)
    lower = -np.inf if estimate.lower is None else estimate.lower
    return Interval(estimate.value, lower, np.inf if estimate.upper is None else estimate.upper, estimate.n)


def _columns(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_lower": interval.lower, f"{name}_upper": interval.upper, f"{name}_n": interval.n}


def _mean_over_seeds(scores: np.ndarray) -> np.ndarray:
    """[seeds, prompts] -> [prompts]; NaN where no seed has a score."""
    known = ~np.isnan(scores)
    total, count = np.where(known, scores, 0.0).sum(0), known.sum(0)
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


def _known(values: np.ndarray) -> bool:
    return bool((~np.isnan(values)).any())
