"""A study: several comparisons that answer one question, with tables and pictures over all of them.

`study.yaml` holds a grid, as `comparison.yaml` does, and parts: the same grid with some keys changed. Each part is compared
task by task and seed by seed, in processes that take one after the other, since a cell on `gaussian_mixture` takes less time
than a process takes to start. A study goes on where it was, as a comparison does.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from pydantic import Field

from alignbench.backbones.mixture import distributions
from alignbench.comparison.compare import Grid, check_grid, compare
from alignbench.config.run_config import WITHOUT_EFFECT, merged_layers, read_settings
from alignbench.errors import UserError
from alignbench.files.reading import read_table
from alignbench.files.writing import exclusive, is_file_name, is_free, refuse_links, write_atomically
from alignbench.files.yaml_files import to_yaml
from alignbench.records.record import METRICS, read_result
from alignbench.records.results import BASE
from alignbench.registry import file_name
from alignbench.runtime.import_path import begin_child, safe_children
from alignbench.settings import Settings, validate
from alignbench.statistics import Interval, difference, holm, mean_interval, welch

T = TypeVar("T")
FILE, RUNS = "study.yaml", "runs"
KEYS = ["part", "objective", "sampler"]
MEASURED = "measured_"
NEAR = 2.0
TARGET = "target"
"""By which name the target goes in `modes_frame`."""


class Study(Settings):
    """The content of a study's file."""

    description: str
    grid: dict[str, Any]
    """Keys of `comparison.Grid`."""
    parts: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name -> keys of the grid that differ in this part; `settings` are merged, other keys replaced."""
    metrics: list[str] = Field(min_length=1)
    """Shown in tables."""
    kl_levels: list[float] = Field(default_factory=list)
    """KL divergences to the base model at which methods are compared; needs `snapshots`."""

    def part(self, name: str) -> Grid:
        """The grid of one part."""
        changed = self.parts[name]
        settings = merged_layers(self.grid.get("settings", {}), changed.get("settings", {}))
        return validate(Grid, {**self.grid, **changed, "settings": settings}, where=f"part {name!r} of the study")


class Job(NamedTuple):
    """A part's cells of one task and seed."""

    name: str
    grid: Grid
    folder: Path


def read_study(file: Path) -> Study:
    """The study of that file, with all grids checked.

    Raises:
        UserError: a key, name or setting is wrong.
    """
    study = validate(Study, read_settings(file, "study"), where=str(file))
    for name in study.parts:
        if not is_file_name(name):
            raise UserError(f"{file}: a part's runs are in a folder of its name, which {name!r} cannot be")
        check_grid(study.part(name))
    return study


def jobs(study: Study, out: Path, seeds: Iterable[int] | None = None) -> list[Job]:
    """Seed by seed, so that a study that is stopped early has few seeds of everything.

    Args:
        seeds: in place of the study's own.
    """
    grids = {name: study.part(name) for name in study.parts}
    wanted = list(seeds) if seeds is not None else list(dict.fromkeys(s for grid in grids.values() for s in grid.seeds))
    return [
        Job(
            f"{name}, {task}, seed {seed}",
            grid.model_copy(update={"tasks": [task], "seeds": [seed]}),
            out / RUNS / name / _task_folder(task) / f"s{seed}",
        )
        for seed in wanted
        for name, grid in grids.items()
        for task in grid.tasks
    ]


def _task_folder(task: str) -> str:
    """A task's name, or that of its file; `..` and its like as text."""
    stem = Path(task).stem
    return stem if is_file_name(stem) else file_name(task).replace(".", "_")


def run(
    study: Study,
    out: Path,
    *,
    seeds: Iterable[int] | None = None,
    workers: int = 1,
    advance: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[str]:
    """Runs what has no record yet; returns a line for each cell that failed.

    Args:
        workers: processes; 1 runs everything in this one.
        advance: told the name of each job that ended, how many have, and of how many.

    Raises:
        UserError: the folder holds something else, or cells that were run with other settings.
    """
    _refuse_other_study(study, out)
    waiting = jobs(study, out, seeds)
    failed: list[str] = []
    with exclusive(out):
        _refuse_other_study(study, out)
        refuse_links(out, RUNS)
        text = to_yaml(study.model_dump(mode="json"))
        write_atomically(out / FILE, lambda p: p.write_text(text, encoding="utf-8"))
        if workers == 1:
            for done, job in enumerate(waiting, start=1):
                failed += _run_job(job)
                advance(job.name, done, len(waiting))
            return failed
        with ProcessPoolExecutor(min(workers, len(waiting)), get_context("spawn"), initializer=begin_child) as pool:
            with safe_children():
                at_work = {pool.submit(_run_job, job): job for job in waiting}
            try:
                for done, ended in enumerate(as_completed(at_work), start=1):
                    failed += ended.result()
                    advance(at_work[ended].name, done, len(waiting))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return failed


def _refuse_other_study(study: Study, out: Path) -> None:
    """Raises UserError where the folder holds something else, or a study whose runs this one would leave out or contradict."""
    if not (out / FILE).is_file():
        if not is_free(out):
            raise UserError(f"{out} exists and holds no study; choose another --out")
        return
    former = read_study(out / FILE)
    for name in former.parts:
        if name not in study.parts:
            raise UserError(f"{out} holds another study, with a part {name!r}; choose another --out")
        kept = _method(former.part(name), former.part(name))
        wanted = _method(study.part(name), former.part(name))
        changed = sorted(key for key in {*kept, *wanted} if kept.get(key) != wanted.get(key))
        if changed:
            raise UserError(f"{out} holds part {name!r} with other settings ({', '.join(changed)}); choose another --out")


def _method(grid: Grid, former: Grid) -> dict[str, Any]:
    """What must not change when a study goes on: everything but settings without effect and what is added to the comparison."""
    kept = grid.model_dump(mode="json", exclude={"objectives", "samplers", "tasks", "seeds", "settings"})
    for key, value in grid.settings.items():
        if key in ("objectives", "samplers"):
            kept |= {f"{key}.{name}": of_one for name, of_one in value.items() if name in former.settings.get(key, {})}
        elif key not in WITHOUT_EFFECT:
            kept[key] = value
    return kept


def _run_job(job: Job) -> list[str]:
    record = compare(job.grid, job.folder)
    return [f"{job.name}: {cell.id}: {cell.error}" for cell in record.cells if cell.status == "failed"]


# ---------------------------------------------------------------------------------------------------- tables


def runs_frame(study: Study, out: Path, left_out: list[str] | None = None) -> pd.DataFrame:
    """A row a run, in the study's order: part, task, objective, sampler, seed, what it spent, every metric of the trained
    model, and its `folder`; and before them one for the base model of each task, of no part.

    Args:
        left_out: gets a line for each record that is not used, because it cannot be read or is of no cell of the study.

    Raises:
        UserError: no run has ended.
    """
    left_out = [] if left_out is None else left_out
    rows: list[dict[str, Any]] = []
    bases: dict[str, dict[str, Any]] = {}
    for part in study.parts:
        grid = study.part(part)
        found = []
        named = {"task": [Path(t).stem for t in grid.tasks], "objective": grid.objectives, "sampler": grid.samplers}
        for file in sorted((out / RUNS / part).glob("*/s*/runs/*/result.json")):
            result = readable(read_result, file.parent, left_out)
            if result is None:
                continue
            info, budget = result.run, result.budget
            objective, sampler = result.pair
            row: dict[str, Any] = {"part": part, "task": info.task, "objective": objective, "sampler": sampler}
            row |= {"seed": info.seed, "iterations": info.iterations}
            row |= {"model_rows": budget.model_rows_rollout + budget.model_rows_train, "reward_calls": budget.reward_calls}
            row |= {"seconds": budget.seconds, "folder": file.parent}
            foreign = [key for key, names in named.items() if row[key] not in names]
            if foreign:
                left_out.append(f"{file} is of no cell of the study: its {foreign[0]} is {row[foreign[0]]!r}")
                continue
            found.append(row | {name: metric.final.value for name, metric in result.metrics.items()})
            base: dict[str, Any] = {"part": "", "task": info.task, "objective": BASE, "sampler": "", "seed": 0}
            base |= {"iterations": 0, "model_rows": 0, "reward_calls": 0, "seconds": 0.0}
            bases.setdefault(info.task, base | {name: metric.base.value for name, metric in result.metrics.items()})
        rows += sorted(found, key=lambda row: [*(names.index(row[key]) for key, names in named.items()), row["seed"]])
    if not rows:
        raise UserError(f"there is no finished run below {out / RUNS}")
    return pd.DataFrame([*(bases[task] for task in dict.fromkeys(row["task"] for row in rows)), *rows])


def cells_frame(runs: pd.DataFrame, metrics: Iterable[str]) -> pd.DataFrame:
    """A row a part, task, objective, sampler and metric: the mean over seeds with Student's interval, and the p of the t
    test that it is the base model's.

    `p_holm` is corrected for all methods of the task. Rows of task `all` are over the tasks' means; seeds that lack a task
    are left out there.
    """
    wanted = _known(runs, metrics)
    rows = []
    for task, table in [*runs.groupby("task", sort=False), ("all", _over_tasks(runs, wanted))]:
        base = table[table["objective"] == BASE]
        for key, part in table.groupby(KEYS, sort=False):
            for metric in wanted:
                values = part[metric].to_numpy(dtype=np.float64)
                p = welch(values, np.repeat(base[metric].to_numpy(dtype=np.float64), 2))  # known, so without spread
                names = {"task": task, **dict(zip(KEYS, key, strict=True)), "metric": metric}
                rows.append({**names, **mean_interval(values)._asdict(), "p": p})
    return _corrected(rows, ["task", "metric"])


def sampler_frame(runs: pd.DataFrame, metrics: Iterable[str]) -> pd.DataFrame:
    """A row a part, objective, two samplers and metric: the second's minus the first's, task means, paired by seed.

    `p_holm` is corrected for all rows of the metric.
    """
    wanted = _known(runs, metrics)
    rows = []
    for (part, objective), table in _over_tasks(runs, wanted).groupby(["part", "objective"], sort=False):
        of_sampler = dict(list(table.groupby("sampler", sort=False)))
        for first, second in combinations(of_sampler, 2):
            names = {"part": part, "objective": objective, "first": first, "second": second}
            rows += _differences(of_sampler[first], of_sampler[second], wanted, names)
    return _corrected(rows, ["metric"])


def method_frame(runs: pd.DataFrame, metrics: Iterable[str]) -> pd.DataFrame:
    """A row a part, objective, sampler and metric: minus what the study's first part and objective has with that sampler,
    task means, paired by seed.

    `p_holm` is corrected for all rows of the metric.
    """
    wanted = _known(runs, metrics)
    table = _over_tasks(runs[runs["objective"] != BASE], wanted)
    of_method = dict(list(table.groupby(KEYS, sort=False)))
    rows = []
    for part, objective, sampler in of_method:
        first = (*next(iter(of_method))[:2], sampler)
        if first in of_method and (part, objective) != first[:2]:
            names = {"part": part, "objective": objective, "sampler": sampler}
            rows += _differences(of_method[first], of_method[part, objective, sampler], wanted, names)
    return _corrected(rows, ["metric"])


def at_kl(
    runs: pd.DataFrame, levels: Iterable[float], metrics: Iterable[str], left_out: list[str] | None = None
) -> pd.DataFrame:
    """A row a run and level: its metrics where the training first reaches a KL divergence to the base model, by linear
    interpolation between the base model, the snapshots and the trained model. NaN where it does not, and where it was not
    measured within a factor of `NEAR` of that level: a training that leaps over it was never seen there.

    Runs without snapshots are left out, and so are those whose table cannot be read, of which `left_out` gets a line. The KL is
    `kl_base`; the best reward at it is no metric of the run.
    """
    names = [m for m in _known(runs, metrics) if m not in ("kl_base", "best_reward_at_kl")]
    bases = runs[runs["objective"] == BASE].set_index("task")
    rows = []
    for run in runs[runs["objective"] != BASE].to_dict("records") if levels and "kl_base" in runs.columns else ():
        table = readable(read_table, run["folder"] / METRICS, left_out)
        columns = [f"{MEASURED}{name}" for name in ("kl_base", *names)]
        if table is not None and set(columns) <= set(table.columns):
            ends = [[of[name] for name in ("kl_base", *names)] for of in (bases.loc[run["task"]], run)]
            path = np.vstack([ends[0], table[columns].dropna().to_numpy(), ends[1]]).astype(np.float64)
            of_run = {key: run[key] for key in ("task", *KEYS, "seed")}
            for level in levels:
                found = first_crossing(path, level)[1:]
                rows.append({**of_run, "kl": level, **dict(zip(names, found, strict=True))})
    return pd.DataFrame(rows)


def equal_kl_frame(at: pd.DataFrame) -> pd.DataFrame:
    """A row a method, task, level and metric of `at_kl`: mean over the seeds that were seen there (`n`) of all (`runs`)."""
    by = ["task", "kl", *KEYS]
    return pd.DataFrame(
        dict(zip(by, key, strict=True))
        | {"metric": metric}
        | mean_interval(part[metric].to_numpy())._asdict()
        | {"runs": len(part)}
        for key, part in (at.groupby(by, sort=False) if len(at) else ())
        for metric in part.columns.difference([*by, "seed"], sort=False)
    )


def modes_frame(runs: pd.DataFrame, left_out: list[str] | None = None) -> pd.DataFrame:
    """A row a task, part, objective, sampler and mode: the mass there of what is drawn for the first evaluation prompt, mean
    over seeds; the target's and the base model's go by no part. Empty where no run knows its distribution. `left_out` gets
    a line for
    each that cannot be read."""
    by = ["task", *KEYS, "mode"]
    found = []
    for run in runs[runs["objective"] != BASE].to_dict("records"):
        kept = readable(distributions.read_distributions, run["folder"], left_out)
        if kept is not None:
            table = distributions.mode_masses(kept).reset_index()
            of_run = {key: run[key] for key in ("task", *KEYS)}
            found.append(table[["mode", "trained"]].rename(columns={"trained": "mass"}).assign(**of_run))
            for name, column in ((TARGET, "target"), (BASE, "base")):
                names = {"task": run["task"], "part": "", "objective": name, "sampler": ""}
                found.append(table[["mode", column]].rename(columns={column: "mass"}).assign(**names))
    return pd.DataFrame(
        dict(zip(by, key, strict=True)) | mean_interval(masses.to_numpy())._asdict()
        for key, masses in (pd.concat(found).groupby(by, sort=False)["mass"] if found else ())
    )


def readable(read: Callable[[Path], T], path: Path, left_out: list[str] | None) -> T | None:
    """What `read` finds there; None, and a line that says why, where it cannot be read."""
    try:
        return read(path)
    except UserError as error:
        if left_out is not None:
            left_out.append(str(error))
        return None


def first_crossing(path: np.ndarray, level: float) -> np.ndarray:
    """The row of `path` [N, M], between two of its rows, at which the first column first reaches the level.

    NaN if it never does, and if neither of the two is within a factor of `NEAR` of the level.
    """
    above = np.flatnonzero(path[:, 0] >= level)
    if not len(above):
        return np.full(path.shape[1], np.nan)
    i = int(above[0])
    before, after = path[max(i - 1, 0)], path[i]
    if not (before[0] * NEAR >= level or after[0] <= level * NEAR):
        return np.full(path.shape[1], np.nan)
    if i == 0:
        return after
    share = (level - before[0]) / (after[0] - before[0])
    return np.asarray(before + share * (after - before))


def _known(runs: pd.DataFrame, metrics: Iterable[str]) -> list[str]:
    return [m for m in metrics if m in runs.columns]


def _over_tasks(runs: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """Means over all tasks, for the seeds of a method that have them all."""
    by = runs.groupby([*KEYS, "seed"], sort=False)
    complete = by["task"].nunique() == runs["task"].nunique()
    return by[metrics].mean()[complete].reset_index()


def _differences(first: pd.DataFrame, second: pd.DataFrame, metrics: list[str], names: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each metric: second minus first over the seeds that both have, and p of the t test that there is none."""
    paired = second.merge(first, on="seed", suffixes=("", "_first"))
    found = {metric: difference(paired[metric].to_numpy(), paired[f"{metric}_first"].to_numpy()) for metric in metrics}
    return [
        {**names, "metric": metric, **mean_interval(values)._asdict(), "p": welch(values, np.zeros(2))}
        for metric, values in found.items()
    ]


def _corrected(rows: list[dict[str, Any]], family: list[str]) -> pd.DataFrame:
    """The rows with `p_holm`, corrected for the rows that are equal in `family`."""
    found = pd.DataFrame(rows)
    if found.empty:
        return found
    families = found.groupby(family, sort=False)["p"]
    return found.assign(p_holm=families.transform(lambda p: pd.Series(holm(p.to_numpy(dtype=np.float64)), index=p.index)))


def shown(interval: Interval) -> str:
    """`0.12 [0.08, 0.16]`, or the value alone where one seed says nothing of the next."""
    if np.isnan(interval.value):
        return "-"
    bounded = np.isfinite([interval.lower, interval.upper]).all()
    return f"{interval.value:z.2f}" + (f" [{interval.lower:z.2f}, {interval.upper:z.2f}]" if bounded else "")
