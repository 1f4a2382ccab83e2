"""The curves of a setup's runs, as `analysis.curves` takes them, from their `curve.parquet`."""

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
        curves: one of each run that has at least two evaluations.
        tables: method, strength and seed -> the run's `curve.parquet`.
        without: cells of which no run has a curve.
        short: cells of which a run was evaluated once only.
        strengths: method -> its strengths in the order from closest to the base model to furthest.
    """

    curves: list[RunCurve] = field(default_factory=list)
    tables: dict[tuple[str, str, int], pd.DataFrame] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)
    strengths: dict[str, list[str]] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(curve.method for curve in self.curves))


def setup_curves(results: Results, setup: str) -> SetupCurves:
    """Reads the curves of a setup. A table that cannot be read is a line of `results.unreadable`."""
    found = SetupCurves()
    for run in results.of(setup):
        table = _read(run, results)
        if table is None:
            found.without.append(run.cell)
            continue
        if table["iteration"].nunique() < LEAST_EVALUATIONS:
            found.short.append(run.cell)
            continue
        method, strength = method_of(run)
        found.curves.append(RunCurve(method, strength, run.result.run.seed, means(table)))
        found.tables[method, strength, run.result.run.seed] = table
    found.without, found.short = (list(dict.fromkeys(cells)) for cells in (found.without, found.short))
    found.strengths = strengths_of(results, setup)
    return found


def method_of(run: RecordedRun) -> tuple[str, str]:
    """The method that a run is a strength of, and the strength's name; a run without a sweep is its cell alone."""
    return (run.base_method or run.cell) if run.swept else run.cell, point_text(run.swept)


def strengths_of(results: Results, setup: str) -> dict[str, list[str]]:
    """Method -> its strengths, from the one that keeps closest to the base model where the objective declares an order."""
    values: dict[str, dict[str, float]] = {}
    signs: dict[str, float] = {}
    for run in results.of(setup):
        method, strength = method_of(run)
        values.setdefault(method, {})[strength] = point_value(run.swept)
        signs.setdefault(method, _direction(run.result.run.objective, run.swept))
    return {
        method: sorted(known, key=lambda strength: signs[method] * (0.0 if np.isnan(known[strength]) else known[strength]))
        for method, known in values.items()
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
