"""Reads the curves of a setup's runs from their `curve.parquet`, for `analysis.curves`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from alignbench.analysis.curves import RunCurve
from alignbench.comparison.results import RecordedRun, Results
from alignbench.comparison.sweeps import point_text, point_value
from alignbench.errors import UserError
from alignbench.evaluation.curve import means, read_curve
from alignbench.evaluation.onset import LEAST_EVALUATIONS
from alignbench.files.escaping import visible
from alignbench.objective import Objective, Strength
from alignbench.registry import find


@dataclass
class SetupCurves:
    """The curves of a setup.

    Attributes:
        curves: the curve of each run that has at least two evaluations.
        tables: (method, strength, seed) -> the run's `curve.parquet`.
        without: cells with a run that has no curve.
        short: cells with a run that was evaluated only once.
        strengths: method -> its strengths, from the one closest to the base model to the one furthest from it.
    """

    curves: list[RunCurve] = field(default_factory=list)
    tables: dict[tuple[str, str, int], pd.DataFrame] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)
    strengths: dict[str, list[str]] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """The methods that have a curve."""
        return list(dict.fromkeys(curve.method for curve in self.curves))


def setup_curves(results: Results, setup: str) -> SetupCurves:
    """Reads the curves of a setup. If a table is damaged, `results.unreadable` says so."""
    read = SetupCurves()
    for run in results.of(setup):
        table = _read(run, results)
        if table is None:
            read.without.append(run.cell)
            continue
        if table["iteration"].nunique() < LEAST_EVALUATIONS:
            read.short.append(run.cell)
            continue
        method, strength = method_of(run)
        read.curves.append(RunCurve(method, strength, run.result.run.seed, means(table)))
        read.tables[method, strength, run.result.run.seed] = table
    read.without, read.short = (list(dict.fromkeys(cells)) for cells in (read.without, read.short))
    read.strengths = strengths_of(results, setup)
    return read


def method_of(run: RecordedRun) -> tuple[str, str]:
    """Returns the method of a run and the name of its strength; without a sweep, the cell and an empty name."""
    return (run.base_method or run.cell) if run.swept else run.cell, point_text(run.swept)


def strengths_of(results: Results, setup: str) -> dict[str, list[str]]:
    """Lists the strengths of each method, from the one closest to the base model if the objective declares an order."""
    values: dict[str, dict[str, float]] = {}
    signs: dict[str, float] = {}
    for run in results.of(setup):
        method, strength = method_of(run)
        values.setdefault(method, {})[strength] = point_value(run.swept)
        signs.setdefault(method, _direction(run.result.run.objective, run.swept))
    return {
        method: sorted(own, key=lambda strength: signs[method] * (0.0 if np.isnan(own[strength]) else own[strength]))
        for method, own in values.items()
    }


def _direction(objective: str, swept: Mapping[str, Any]) -> float:
    """1, or -1 where the objective says that smaller values of the swept setting let the policy go further."""
    try:
        strength: Strength | None = find("objectives", objective, Objective).strength
    except UserError:
        return 1.0
    if strength is None or not any(key.rpartition(".")[2] == strength.setting for key in swept):
        return 1.0
    return float(np.sign(strength.values[-1] - strength.values[0])) or 1.0


def _read(run: RecordedRun, results: Results) -> pd.DataFrame | None:
    try:
        table = read_curve(run.folder)
    except UserError as error:
        if str(error) not in results.unreadable:
            results.unreadable.append(str(error))
        return None
    if table is None or table.empty:
        return None
    names = {metric: visible(metric) for metric in table["metric"].unique()}
    return table.assign(metric=table["metric"].map(names))
