"""Finished runs as tidy pandas frames: what plots, tables and the report of a comparison are made of.

A *cell* is an objective with a sampler and their settings; its runs differ in the seed alone. A *setup* is what must be equal
for cells to be compared: task, backbone, evaluation protocol and budget. Nothing is averaged across setups but by
`alignbench.analysis.contrasts`, which takes means over tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from alignbench.comparison.grid import Contrast
from alignbench.comparison.ranges import in_range
from alignbench.comparison.sweeps import point_text, point_value
from alignbench.files.escaping import slugs
from alignbench.records.diversity import default_diversity
from alignbench.records.record import Estimate, Result
from alignbench.statistics import (
    Interval,
    holm,
    interval_over_runs,
    mean_interval,
    mean_of_known,
    paired_interval,
    probability_of_improvement,
    welch,
    welch_interval,
)

BASE = "base model"
SPENT = ("model_rows", "seconds", "reward_calls", "rows_per_image")
"""Columns of `cells_frame` and `runs_frame` that say what a training used, and the model rows of an image at inference."""


@dataclass(frozen=True)
class RecordedRun:
    """A finished run, with every text as `visible` shows it.

    Attributes:
        folder: its folder.
        result: its record.
        setup: the name of its setup.
        cell: the name of its cell.
        part: the name of its part of the comparison; empty without parts.
        metrics: its table of training metrics; None where there is none.
        evals: its table of scores; None where there is none.
        base_method: the name of its cell without the values of sweeps: cells with the same one are the points of a sweep.
        swept: the key of each sweep -> the value at this point; empty for a method without a sweep.
    """

    folder: Path
    result: Result
    setup: str
    cell: str
    part: str
    metrics: pd.DataFrame | None
    evals: pd.DataFrame | None
    base_method: str = ""
    swept: Mapping[str, Any] = field(default_factory=dict)

    @property
    def objective(self) -> str:
        """What legends call its objective: its label or name, behind the part's name where the cell's name has it."""
        return self.cell.partition(" x ")[0]


@dataclass
class Results:
    """All runs below a folder.

    Attributes:
        folder: the folder that was read.
        runs: the runs that can be used.
        description: the title of the comparison; empty where it has none.
        unreadable: a line for each record, table or plot that is left out, with the reason; all else is there.
        unfinished: cells of comparisons that are not complete: id, status, error.
        notes: what a reader must know about how runs were grouped or left out.
        commands: the commands that make all of this again.
        chosen: metrics for `reward` and `diversity` in place of each setup's first.
        metrics: the metrics that tables show; all where it is empty.
        kl_levels: KL divergences to the base model at which methods are compared.
        contrasts: the contrasts that comparisons name.
        complete_before_contrasts: how many runs were complete when these were set; 0 if they were planned before any run.
    """

    folder: Path
    runs: list[RecordedRun]
    description: str = ""
    unreadable: list[str] = field(default_factory=list)
    unfinished: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    chosen: dict[str, str] = field(default_factory=dict)
    metrics: list[str] = field(default_factory=list)
    kl_levels: list[float] = field(default_factory=list)
    contrasts: list[Contrast] = field(default_factory=list)
    complete_before_contrasts: int = 0

    @cached_property
    def _of_setup(self) -> dict[str, list[RecordedRun]]:
        runs: dict[str, list[RecordedRun]] = {}
        for run in self.runs:
            runs.setdefault(run.setup, []).append(run)
        return runs

    @property
    def setups(self) -> list[str]:
        return list(self._of_setup)

    @cached_property
    def file_names(self) -> dict[str, str]:
        """A file name for each setup, unlike any other's."""
        return slugs(self.setups)

    def of(self, setup: str) -> list[RecordedRun]:
        """The runs of a setup."""
        return self._of_setup[setup]

    def reward(self, setup: str) -> str:
        """The chosen one, else the metric that the setup's runs trained on; the first of several."""
        metrics = self.of(setup)[0].result.metrics
        if self.chosen.get("reward") in metrics:
            return self.chosen["reward"]
        return next((name for name, metric in metrics.items() if metric.role == "reward"), next(iter(metrics)))

    def diversity(self, setup: str) -> str | None:
        """The chosen one, else the setup's first diversity metric, or None."""
        metrics = self.of(setup)[0].result.metrics
        chosen = self.chosen.get("diversity")
        return chosen if chosen in metrics else default_diversity(metrics)

    def table_metrics(self, setup: str) -> list[str]:
        """The metrics of a setup that tables show: those that the comparison names, else all."""
        metrics = self.of(setup)[0].result.metrics
        return [name for name in self.metrics if name in metrics] or list(metrics)

    @property
    def environment(self) -> dict[str, Any]:
        """What the runs were made with; where they differ, every value."""
        values: dict[str, list[Any]] = {}
        for run in self.runs:
            for key, value in run.result.environment.items():
                if key != "command" and value not in values.setdefault(key, []):
                    values[key].append(value)
        return {key: each[0] if len(each) == 1 else " | ".join(map(str, each)) for key, each in values.items()}

    @cached_property
    def runs_frame(self) -> pd.DataFrame:
        """A row per run and metric: base, final and difference (each with lower, upper and n prompts), and what was used."""
        rows = []
        for run in self.runs:
            info, budget = run.result.run, run.result.budget
            objective, sampler = run.result.pair
            of_run: dict[str, Any] = keys_of(run) | sweep_of(run)
            of_run |= {"objective": objective, "sampler": sampler, "run": info.id}
            used = {
                "model_rows": budget.model_rows_rollout + budget.model_rows_train,
                "reward_calls": budget.reward_calls,
                "seconds": budget.seconds,
                "rows_per_image": _rows_per_image(run),
                "seconds_evaluation": budget.seconds_evaluation,
                "peak_memory_bytes": budget.peak_memory_bytes,
                "failed_scores": budget.failed_scores,
                "alarms": len(run.result.alarms),
                "iterations": info.iterations,
                "status": info.status,
            }
            for metric, record in run.result.metrics.items():
                row = {**of_run, "metric": metric, "role": record.role, "higher_is_better": record.higher_is_better}
                for name, estimate in (("base", record.base), ("final", record.final), ("difference", record.difference)):
                    row |= columns(name, interval_of(estimate))
                rows.append(row | used)
        return pd.DataFrame(rows)

    @cached_property
    def images_frame(self) -> pd.DataFrame:
        """Every run's evaluation table: a row per image and metric (image -1: of a whole prompt), phase base or final."""
        parts = [run.evals.assign(**keys_of(run)) for run in self.runs if run.evals is not None]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["setup", "cell", "part", "seed"])

    @property
    def images_count(self) -> int:
        """Rows of `images_frame`."""
        return sum(len(run.evals) for run in self.runs if run.evals is not None)

    @cached_property
    def prompts_frame(self) -> pd.DataFrame:
        """A row per run, metric and prompt: means over the prompt's images of base and final, and their difference."""
        runs = [run for run in self.runs if run.evals is not None]
        names = ["setup", "cell", "part", "seed", "metric", "prompt_index", "prompt", "base", "final", "difference"]
        if not runs:
            return pd.DataFrame(columns=names)
        tables = pd.concat([run.evals.assign(run=number) for number, run in enumerate(runs) if run.evals is not None])
        tables = tables[tables["phase"].isin(["base", "final"])]
        by = ["run", "metric", "prompt_index", "prompt", "phase"]
        means = tables.groupby(by, sort=True, observed=True)["value"].mean().unstack("phase")
        wide = means.reindex(columns=["base", "final"]).dropna(how="all").reset_index()
        untrained = wide["run"].map({number: _is_base_model(run) for number, run in enumerate(runs)})
        wide["final"] = wide["final"].where(wide["final"].notna() | ~untrained.astype(bool), wide["base"])
        keys = pd.DataFrame([keys_of(run) for run in runs])
        frame = pd.concat([keys.loc[wide["run"]].reset_index(drop=True), wide.drop(columns="run")], axis=1)
        return frame.assign(difference=frame["final"] - frame["base"])[names]

    @cached_property
    def curves_frame(self) -> pd.DataFrame:
        """Every run's metrics table, a row per iteration; `training_seconds` is the time since the first."""
        parts = []
        for run in self.runs:
            if run.metrics is not None:
                seconds = run.metrics["seconds"].cumsum() if "seconds" in run.metrics else np.nan
                parts.append(run.metrics.assign(**keys_of(run), **sweep_of(run), training_seconds=seconds))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["setup", "cell", "part", "seed"])

    @cached_property
    @np.errstate(over="ignore", invalid="ignore")  # of numbers near the largest there are
    def cells_frame(self) -> pd.DataFrame:
        """A row per setup, cell and metric, the base model as a cell of its own.

        `mean`, `lower`, `upper` and `n`: over seeds by Student's t (`over` is `seeds`); of one seed, and of the base model,
        over prompts likewise (`over` is `prompts`), which does not say what another seed would give. `sd` is over seeds.
        `iqm`: interquartile mean over seeds and prompts, by a jackknife of whole seeds. `difference`: to the base model.
        What was used, `seconds` of training among it: means over seeds, with the lowest and the highest, `_min` and `_max`.
        """
        rows = []
        for setup in self.setups:
            rows += self._base_rows(setup)
            cells: dict[str, list[RecordedRun]] = {}
            for run in self.of(setup):
                cells.setdefault(run.cell, []).append(run)
            for runs in cells.values():
                rows += self._cell_rows(runs)
        return pd.DataFrame(rows)

    @cached_property
    @np.errstate(over="ignore", invalid="ignore")
    def pairs_frame(self) -> pd.DataFrame:
        """A row per setup, metric that tables or axes show, and two cells: how they differ.

        `difference`: first minus second, of means over seeds, with Welch's interval and the smaller number of seeds.
        `p`: Welch's; `p_holm`: corrected for all pairs of the setup and metric.
        `paired_*`: per prompt, seeds averaged, which holds for these trained models only.
        `probability`: that a run of the first is better than one of the second.
        """
        rows = []
        for setup in self.setups:
            axes = [self.reward(setup), *filter(None, [self.diversity(setup)])]
            for metric in dict.fromkeys([*self.table_metrics(setup), *axes]):
                family = self._pair_rows(setup, metric)
                for row, p in zip(family, holm([row["p"] for row in family]), strict=True):
                    rows.append({**row, "p_holm": p, "tests": len(family)})
        return pd.DataFrame(rows)

    def scores(self, setup: str, cell: str, metric: str, column: str = "final") -> np.ndarray:
        """[seeds, prompts] of one cell, with all prompts of the setup in their order, NaN where a prompt has no value; without
        per-prompt records, the seeds' means as [seeds, 1]."""
        key = (setup, cell, metric)
        if (*key, column) not in self._scores:
            table = self._by_metric["prompts"].get(key)
            if table is not None:
                wide = table.pivot(index="seed", columns="prompt_index", values=column).reindex(columns=self._prompts[setup])
                self._scores[*key, column] = np.asarray(wide, dtype=np.float64)
            else:
                self._scores[*key, column] = self._by_metric["runs"][key][column].to_numpy(dtype=np.float64)[:, None]
        return self._scores[*key, column]

    def seeds_of_scores(self, setup: str, cell: str, metric: str) -> list[int]:
        """The seeds of the rows of `scores`: runs without readable records of prompts have none."""
        table = self._by_metric["prompts"].get((setup, cell, metric))
        if table is not None:
            return sorted(int(seed) for seed in table["seed"].unique())
        return [int(seed) for seed in self._by_metric["runs"][setup, cell, metric]["seed"]]

    @cached_property
    def _prompts(self) -> dict[str, list[int]]:
        """The indices of the prompts of each setup."""
        of_setup = self.prompts_frame.groupby("setup", sort=False)["prompt_index"]
        return {str(setup): sorted(int(index) for index in indices.unique()) for setup, indices in of_setup}

    @cached_property
    def _scores(self) -> dict[tuple[str, str, str, str], np.ndarray]:
        """What `scores` has returned, since the frames need it more than once."""
        return {}

    @cached_property
    def _by_metric(self) -> dict[str, dict[Any, pd.DataFrame]]:
        """The rows of one setup, cell and metric, in a table of their own, since they are needed again and again."""
        frames, keys = {"runs": self.runs_frame, "prompts": self.prompts_frame}, ["setup", "cell", "metric"]
        return {name: dict(iter(frame.groupby(keys, sort=False))) for name, frame in frames.items()}

    def _base_rows(self, setup: str) -> list[dict[str, Any]]:
        """The base model is the same for all runs, up to rounding; the first run's record is taken."""
        run = self.of(setup)[0]
        names: dict[str, Any] = {"setup": setup, "cell": BASE, "part": "", "objective": "", "sampler": ""}
        names |= {"base_method": BASE, "sweep": "", "strength": "", "sweep_value": np.nan}
        nothing = {k: v for name in SPENT for k, v in _spent(name, [0.0]).items()}
        nothing |= _spent("rows_per_image", [_rows_per_image(run, base=True)])
        return [
            names
            | {"metric": name, "role": record.role}
            | {"higher_is_better": record.higher_is_better, "seeds": 0, "over": "prompts", "sd": np.nan}
            | columns("mean", in_range(name, interval_of(record.base)))
            | columns("iqm", self._iqm(setup, run.cell, name, "base"))
            | columns("difference", Interval(np.nan, np.nan, np.nan, 0))
            | nothing
            for name, record in run.result.metrics.items()
        ]

    def _cell_rows(self, runs: list[RecordedRun]) -> list[dict[str, Any]]:
        first = runs[0]
        objective, sampler = first.result.pair
        names = {"setup": first.setup, "cell": first.cell, "part": first.part, "objective": objective, "sampler": sampler}
        names |= sweep_of(first)
        rows: list[dict[str, Any]] = []
        budgets = [run.result.budget for run in runs]
        used = (
            _spent("model_rows", [b.model_rows_rollout + b.model_rows_train for b in budgets])
            | _spent("reward_calls", [b.reward_calls for b in budgets])
            | _spent("seconds", [b.seconds for b in budgets])
            | _spent("rows_per_image", [_rows_per_image(run) for run in runs])
        )
        for name, record in first.result.metrics.items():
            records = [run.result.metrics[name] for run in runs if name in run.result.metrics]
            final = np.array([interval_of(r.final).value for r in records])
            difference = np.array([interval_of(r.difference).value for r in records])
            several = int((~np.isnan(final)).sum()) > 1
            rows.append(
                {**names, "metric": name, "role": record.role}
                | {"higher_is_better": record.higher_is_better, "seeds": len(runs), "over": "seeds" if several else "prompts"}
                | {"sd": float(np.nanstd(final, ddof=1)) if several else np.nan}
                | columns("mean", in_range(name, mean_interval(final) if several else interval_of(record.final)))
                | columns("iqm", self._iqm(first.setup, first.cell, name, "final"))
                | columns("difference", mean_interval(difference) if several else interval_of(record.difference))
                | used
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
        prompts = {cell: mean_of_known(self.scores(setup, cell, metric), axis=0) for cell in means}
        means[BASE] = np.full(max(map(len, means.values())), frame["base"].iloc[0], dtype=np.float64)
        prompts[BASE] = mean_of_known(self.scores(setup, next(iter(cells)), metric, "base"), axis=0)
        rows: list[dict[str, Any]] = []
        for first, second in combinations(means, 2):
            a, b = means[first], means[second]
            same_prompts = len(prompts[first]) == len(prompts[second])
            paired = paired_interval(prompts[first], prompts[second]) if same_prompts else mean_interval(np.array([]))
            sign = -1.0 if higher is False else 1.0
            rows.append(
                {"setup": setup, "metric": metric, "first": first, "second": second, "higher_is_better": higher}
                | columns("difference", welch_interval(a, b))
                | {"p": welch(a, b), "probability": probability_of_improvement(sign * a[:, None], sign * b[:, None])}
                | columns("paired", paired)
            )
        return rows


def keys_of(run: RecordedRun) -> dict[str, Any]:
    """The columns that name a run in every frame."""
    return {"setup": run.setup, "cell": run.cell, "part": run.part, "seed": run.result.run.seed}


def sweep_of(run: RecordedRun) -> dict[str, Any]:
    """The columns that say which point of which sweep a run's method is.

    `base_method`: the cell's name without the point; `sweep`: the swept keys; `strength`: the point, such as `beta=0.5`, or
    empty without a sweep; `sweep_value`: its value if that is a single number, else NaN.
    """
    return {
        "base_method": run.base_method or run.cell,
        "sweep": ", ".join(run.swept),
        "strength": point_text(run.swept),
        "sweep_value": point_value(run.swept),
    }


def interval_of(estimate: Estimate) -> Interval:
    """A record's null is NaN, and an interval without ends is unbounded."""
    if estimate.value is None:
        return Interval(np.nan, np.nan, np.nan, estimate.n)
    lower = -np.inf if estimate.lower is None else estimate.lower
    return Interval(estimate.value, lower, np.inf if estimate.upper is None else estimate.upper, estimate.n)


def columns(name: str, interval: Interval) -> dict[str, float]:
    """An interval as four columns: NAME, NAME_lower, NAME_upper, NAME_n."""
    return {name: interval.value, f"{name}_lower": interval.lower, f"{name}_upper": interval.upper, f"{name}_n": interval.n}


def _is_base_model(run: RecordedRun) -> bool:
    """Whether a run's final images are the base model's: it did not train, and drew them from the model as it is."""
    inference = run.result.inference
    return run.result.run.iterations == 0 and (inference is None or inference.method == "ode")


def _rows_per_image(run: RecordedRun, *, base: bool = False) -> float:
    """Model rows of one image of the final evaluation, or of the base model's; older records took one a step."""
    inference = run.result.inference
    if inference is None:
        return float(run.result.protocol.steps)
    return float(inference.base_model_rows_per_image if base else inference.model_rows_per_image)


def _spent(name: str, of_runs: Sequence[float]) -> dict[str, float]:
    return {name: float(np.mean(of_runs)), f"{name}_min": float(min(of_runs)), f"{name}_max": float(max(of_runs))}
