"""Differences between methods and between samplers, paired by seed: means over tasks, and the same at equal KL.

Trainings differ by chance, and runs with the same seed share prompts, plans and noise. Therefore each seed gives one number per
method, which is a metric of one task or its mean over tasks, and differences are taken seed by seed.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from alignbench.comparison.reading import setup_settings
from alignbench.comparison.results import BASE, Results
from alignbench.statistics import Interval, difference, first_reached, holm, mean_interval, one_sample

KL, BEST_REWARD = "kl_base", "best_reward_at_kl"
MEASURED = "measured_"
"""Prefix of the columns of `metrics.parquet` that hold the measurements of snapshots."""
NEAR = 2.0
"""A run counts as measured at a KL level if a measurement is within this factor of it."""
KEYS = ["cell", "part", "objective", "sampler"]
"""The columns that identify a cell."""


@dataclass(frozen=True)
class Family:
    """Setups that differ only in the task.

    Attributes:
        name: its name in reports.
        setups: one setup per task.
        metrics: the metrics of tables that all its setups have.
    """

    name: str
    setups: list[str]
    metrics: list[str]


def families(results: Results) -> list[Family]:
    """Groups the setups into families: everything that must be equal in a setup is equal, except the task."""
    groups: dict[str, list[str]] = {}
    for setup in results.setups:
        result = results.of(setup)[0].result
        key = json.dumps([result.run.backbone, setup_settings(result, any_task=True)], sort_keys=True)
        groups.setdefault(key, []).append(setup)
    return [_family(results, setups) for setups in groups.values()]


def _family(results: Results, setups: list[str]) -> Family:
    metrics = [m for m in results.table_metrics(setups[0]) if all(m in results.table_metrics(setup) for setup in setups)]
    backbone = results.of(setups[0])[0].result.run.backbone
    return Family(setups[0] if len(setups) == 1 else f"{len(setups)} tasks on {backbone}", setups, metrics)


def values_frame(results: Results, family: Family, extra: Sequence[str] = ()) -> pd.DataFrame:
    """Makes a table of the family's runs.

    Args:
        results: the results of the comparison.
        family: the family.
        extra: further metrics; those that are not recorded are left out.

    Returns:
        A row per run, with setup, cell, part, objective, sampler, seed, and a column for each metric of the trained model. The
        base model of each setup comes first, as a cell `BASE` with seed -1.
    """
    runs = results.runs_frame
    runs = runs[runs["setup"].isin(family.setups)]
    metrics = [*family.metrics, *(m for m in extra if m not in family.metrics and m in set(runs["metric"]))]
    runs = runs[runs["metric"].isin(metrics)]
    rows = runs.drop_duplicates(["setup", "cell", "seed"])[["setup", *KEYS, "seed"]]
    final = runs.pivot(index=["setup", "cell", "seed"], columns="metric", values="final").reset_index()
    trained = rows.merge(final, on=["setup", "cell", "seed"])
    base = runs.drop_duplicates(["setup", "metric"]).pivot(index="setup", columns="metric", values="base").reset_index()
    base = base.assign(cell=BASE, part="", objective="", sampler="", seed=-1)
    order = {setup: number for number, setup in enumerate(family.setups)}
    base = base.sort_values("setup", key=lambda column: column.map(order))
    return pd.concat([base, trained], ignore_index=True)[["setup", *KEYS, "seed", *metrics]]


def over_tasks(values: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Averages `values_frame` over setups: a row per cell and seed. Seeds of a cell that lack a setup are left out."""
    by = values.groupby([*KEYS, "seed"], sort=False)
    complete = by["setup"].nunique() == values["setup"].nunique()
    return by[list(metrics)].mean()[complete].reset_index()


def means_frame(table: pd.DataFrame, metrics: Iterable[str]) -> pd.DataFrame:
    """Computes means over seeds, with a test of the difference to the base model.

    Args:
        table: from `over_tasks`.
        metrics: the metrics.

    Returns:
        A row per cell and metric, with the mean and its interval, p of the difference to the base model, and `p_holm`, which is
        corrected for all cells of the metric.
    """
    base = table[table["cell"] == BASE]
    rows: list[dict[str, Any]] = []
    for key, part in table.groupby(KEYS, sort=False):
        for metric in metrics:
            final = part[metric].to_numpy(dtype=np.float64)
            apart = difference(final, base[metric].to_numpy(dtype=np.float64)) if len(base) else np.full(len(final), np.nan)
            names = {**dict(zip(KEYS, key, strict=True)), "metric": metric}
            if names["cell"] == BASE:  # the base model has no seeds
                rows.append({**names, **Interval(float(final[0]), -np.inf, np.inf, 0)._asdict(), "p": np.nan})
            else:
                rows.append({**names, **mean_interval(final)._asdict(), "p": one_sample(apart)})
    return corrected(rows)


def sampler_frame(table: pd.DataFrame, metrics: Iterable[str]) -> pd.DataFrame:
    """Computes differences between samplers of the same objective (second minus first), paired by seed.

    Args:
        table: from `over_tasks`.
        metrics: the metrics.

    Returns:
        A row per objective of a part, pair of its samplers, and metric. `p_holm` is corrected for all rows of the metric.
    """
    metrics, rows = list(metrics), []
    for (part, objective), of_objective in _trained(table).groupby(["part", "objective"], sort=False):
        of_sampler = dict(list(of_objective.groupby("sampler", sort=False)))
        for first, second in combinations(of_sampler, 2):
            names = {"part": part, "objective": objective, "first": first, "second": second}
            names["cell"] = str(of_sampler[first]["cell"].iloc[0]).partition(" x ")[0]
            rows += _paired(of_sampler[first], of_sampler[second], metrics, names)
    return corrected(rows)


def method_frame(table: pd.DataFrame, metrics: Iterable[str]) -> pd.DataFrame:
    """Computes differences of cells to the first part's first objective with the same sampler, paired by seed.

    Args:
        table: from `over_tasks`.
        metrics: the metrics.

    Returns:
        A row per cell and metric. `p_holm` is corrected for all rows of the metric.
    """
    metrics, rows = list(metrics), []
    groups: Any = _trained(table).groupby(KEYS, sort=False)
    tables: dict[tuple[str, str, str, str], pd.DataFrame] = dict(list(groups))
    _, *first_method, _ = next(iter(tables), ("", "", "", ""))
    first_cells: dict[str, str] = {}
    for cell, part, objective, sampler in tables:
        if [part, objective] == first_method:
            first_cells.setdefault(sampler, cell)
    of_cell = {key[0]: of_key for key, of_key in tables.items()}
    for key, of_key in tables.items():
        names = dict(zip(KEYS, key, strict=True))
        first = first_cells.get(names["sampler"])
        if first is not None and first != names["cell"]:
            rows += _paired(of_cell[first], of_key, metrics, {**names, "first": first})
    return corrected(rows)


# ---------------------------------------------------------------------------------------------------- at equal KL


def at_kl(results: Results, family: Family, values: pd.DataFrame) -> pd.DataFrame:
    """Computes each run's metrics where its training first reaches a KL divergence to the base model.

    They are interpolated between the base model, the snapshots and the trained model. They are NaN if the training does not
    reach the level, or was not measured within a factor of `NEAR` of it, because it then passed the level unobserved. Runs
    without snapshots are left out, and so are metrics that snapshots do not measure. The KL divergence is `kl_base`; the best
    reward at it is not a metric of the run.

    Args:
        results: the results of the comparison.
        family: the family.
        values: `values_frame` of the family, with `kl_base`.

    Returns:
        A row per run and KL level.
    """
    if KL not in values or not results.kl_levels:
        return pd.DataFrame()
    tables = [run.metrics for setup in family.setups for run in results.of(setup) if run.metrics is not None]
    measured = {column for table in tables for column in table.columns}
    names_of_run = ("setup", *KEYS, "seed", KL, BEST_REWARD)
    metrics = [m for m in values.columns if m not in names_of_run and f"{MEASURED}{m}" in measured]
    columns = [f"{MEASURED}{name}" for name in (KL, *metrics)]
    base = values[values["cell"] == BASE].set_index("setup")
    ends: Any = values.set_index(["setup", "cell", "seed"])
    rows = []
    for run in (run for setup in family.setups for run in results.of(setup)):
        if run.metrics is None or not set(columns) <= set(run.metrics.columns):
            continue
        key = (run.setup, run.cell, run.result.run.seed)
        names = {"setup": run.setup, **{k: ends.loc[key, k] for k in KEYS if k != "cell"}, "cell": run.cell, "seed": key[2]}
        start, end = (at[[KL, *metrics]].to_numpy(dtype=np.float64) for at in (base.loc[run.setup], ends.loc[key]))
        path = np.vstack([start, run.metrics[columns].dropna().to_numpy(dtype=np.float64), end])
        for level in results.kl_levels:
            at_level = first_crossing(path, level)[1:]
            rows.append({**names, "kl": level, **dict(zip(metrics, at_level, strict=True))})
    return pd.DataFrame(rows)


def equal_kl_frame(at: pd.DataFrame) -> pd.DataFrame:
    """Averages `at_kl` over seeds: a row per setup, KL level, cell and metric, over the `n` of all `runs` measured there."""
    by = ["setup", "kl", *KEYS]
    return pd.DataFrame(
        dict(zip(by, key, strict=True))
        | {"metric": metric}
        | mean_interval(part[metric].to_numpy())._asdict()
        | {"runs": len(part)}
        for key, part in (at.groupby(by, sort=False) if len(at) else ())
        for metric in part.columns.difference([*by, "seed"], sort=False)
    )


def equal_kl_method_frame(at: pd.DataFrame, metrics: Iterable[str]) -> pd.DataFrame:
    """Computes `method_frame` at each KL level, on means over tasks, for the seeds with both methods measured there."""
    recorded = [metric for metric in metrics if metric in at]
    levels = at.groupby("kl", sort=False) if len(at) else ()
    tables = [method_frame(over_tasks(of_level, recorded), recorded).assign(kl=kl) for kl, of_level in levels]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def first_crossing(path: np.ndarray, level: float) -> np.ndarray:
    """Interpolates a path where its first column first reaches a level.

    Args:
        path: float [N, M].
        level: the level.

    Returns:
        float [M]; NaN if the column never reaches the level, or if neither of the two rows there is within a factor of `NEAR`
        of the level.
    """
    place = first_reached(path[:, 0], level)
    if place is None:
        return np.full(path.shape[1], np.nan)
    before, after, share = path[place[0]], path[place[1]], place[2]
    if not (before[0] * NEAR >= level or after[0] <= level * NEAR):
        return np.full(path.shape[1], np.nan)
    return np.asarray(before + share * (after - before)) if share else before


# ---------------------------------------------------------------------------------------------------- parts


def _trained(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["cell"] != BASE]


def _paired(first: pd.DataFrame, second: pd.DataFrame, metrics: list[str], names: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of each metric's difference, second minus first, over the seeds that both have, with p of the t test."""
    both = second.merge(first, on="seed", suffixes=("", "_first"))
    rows = []
    for metric in metrics:
        apart = difference(both[metric].to_numpy(), both[f"{metric}_first"].to_numpy())
        rows.append({**names, "metric": metric, **mean_interval(apart)._asdict(), "p": one_sample(apart)})
    return rows


def corrected(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Makes a table of the rows and adds `p_holm`, which is corrected for all rows of the same metric."""
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    by_metric = frame.groupby("metric", sort=False)["p"]
    return frame.assign(p_holm=by_metric.transform(lambda p: pd.Series(holm(p.to_numpy(dtype=np.float64)), index=p.index)))
