"""The tables of a report about curves and the front, from a `CurveReport`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from alignbench.analysis.against_front import front_note
from alignbench.analysis.curves import ROWS
from alignbench.analysis.power import MOST_SEEDS, POWER
from alignbench.figures.metric_names import axis_name
from alignbench.reports.curve_report import CurveReport
from alignbench.reports.formatting import SIGNIFICANT, number, p_value
from alignbench.reports.text_table import Cell, TextTable, bounded, count, name

SHOWN = 4
"""Metrics that a table on the page has as columns, at most; the files of the tables have all."""
LONG = 24
"""Rows of a table above which a page folds it away."""


def tables(report: CurveReport) -> list[TextTable]:
    """Every table that the records allow."""
    every = (_planned, _avoidable, _at_kl, _differences, _rows, _areas, _onsets, _power)
    return [table for make in every if (table := make(report)) is not None and table.rows]


def _planned(report: CurveReport) -> TextTable | None:
    frame = report.planned
    if frame.empty:
        return None
    before = report.results.complete_before_contrasts
    planned = f"Set when {before} run{'s were' if before > 1 else ' was'} complete" if before else "Planned before any run"
    note = (
        f"{planned}: the first method minus the second where every run of both has reached the same {report.reward_name} on "
        f"the validation prompts, paired by seed, with Student's t intervals; p is corrected for all {len(frame)} contrasts "
        "(Holm). Where the interval contains 0, the answer is that there is no difference that matters only if "
        f"{100 * POWER:.0f} % of such comparisons would have found the smallest one that does."
    )
    rows = []
    for row in frame.to_dict("records"):
        level, metric = row["level"], axis_name(str(row["metric"]))
        risen = f"{number(level)}, {number(row['gain'])} above the base model"
        reached = Cell("none that all runs of both reach" if math.isnan(level) else risen, level)
        difference = bounded(row, over=f" in {metric}, p {p_value(row['p_holm'])}")
        found = Cell(f"{number(row['matters'])}; {_detectable(row['detectable']).text}", row["matters"])
        rows.append([name(str(row["first"])), name(str(row["second"])), reached, difference, found, name(str(row["answer"]))])
    head = ["first", "second", report.reward_name, "difference", "what matters; what would be found", "first has"]
    return TextTable("Contrasts of the comparison" if before else "Planned contrasts", note, head, rows)


def _avoidable(report: CurveReport) -> TextTable | None:
    frame = report.avoidable
    if frame.empty or report.front is None:
        return None
    metrics = _shown(frame)
    over = "over seeds" if (frame["over"] == "seeds").any() else "over prompts, for these trained models only"
    note = (
        f"The front's diversity at a model's own {report.reward_name}, minus the model's: above 0, more was lost than the "
        f"reward asks for. {front_note(report.front)} Intervals are {over}. The front is not an upper bound: at a higher KL a "
        "model may lie above it."
    )
    rows = []
    for cell, part in frame.groupby("cell", sort=False):
        entries = {str(row["metric"]): row for row in part.to_dict("records")}
        rows.append([name(str(cell)), *(_loss(entries.get(metric)) for metric in metrics)])
    return TextTable("Avoidable loss of diversity", note, ["model", *map(axis_name, metrics)], rows)


def _loss(row: Mapping[Any, Any] | None) -> Cell:
    if row is None:
        return Cell("-", math.nan)
    missing = "reward above the front's reach"
    some = f" ({row['beyond']} of {row['runs']} runs beyond the front)" if 0 < row["beyond"] < row["runs"] else ""
    return bounded(row, missing=missing, over=some)


def _at_kl(report: CurveReport) -> TextTable | None:
    frame = report.at_kl
    if frame.empty:
        return None
    note = (
        f"The most {report.reward_name} that any distribution has at a model's KL divergence to the base model, minus the "
        "model's own. A KL beyond the front counts as its end."
    )
    rows = []
    for row in frame.to_dict("records"):
        kl = bounded({"value": row["kl"], "lower": row["kl_lower"], "upper": row["kl_upper"]})
        beyond = f"{row['beyond']} of {row['runs']} runs"
        rows.append([name(str(row["cell"])), kl, bounded(row), Cell(beyond if row["beyond"] else "none", row["beyond"])])
    head = ["model", "KL to base (nats)", f"{report.reward_name} left unused", "beyond the front"]
    return TextTable("Reward at equal KL", note, head, rows)


def _differences(report: CurveReport) -> TextTable | None:
    frame = report.differences
    if frame.empty:
        return None
    metrics = [*[m for m in _shown(frame) if m != ROWS][: SHOWN - 2], ROWS]
    tests = int(frame["tests"].max())
    corrected = (
        f"* marks p < {SIGNIFICANT} by Student's t test, Holm-corrected for the {tests} test{'s' * (tests > 1)} of each metric"
        if tests
        else "no test can be made: it needs two seeds whose differences vary"
    )
    note = (
        f"Each curve is read where its {report.reward_name} first reaches a level, between two evaluations on the validation "
        f"prompts. The first method minus the second, paired by seed; {corrected}."
    )
    if any(len(strengths) > 1 for strengths in report.strengths.values()):
        note += " Of a sweep, the strength counts that does best on the other seeds."
    rows = []
    groups: Any = frame.groupby(["level", "first", "second"], sort=False)
    for (level, first, second), part in groups:
        entries = {str(row["metric"]): row for row in part.to_dict("records")}
        missing = _not_reached(next(iter(entries.values())), str(first), str(second))
        values = [
            bounded(_interval(entries[m]), missing="-" if i else missing, over=_of_fewer(entries[m]))
            if m in entries
            else Cell("-", math.nan)
            for i, m in enumerate(metrics)
        ]
        rows.append([Cell(number(level), level), name(str(first)), name(str(second)), *values])
    head = [report.reward_name, "first", "second", *map(axis_name, metrics)]
    return TextTable("Differences at equal reward", note, head, rows, folded=len(rows) > LONG)


def _interval(row: Mapping[Any, Any]) -> dict[Any, Any]:
    return {**row, "value": row["difference"]}


def _of_fewer(row: Mapping[Any, Any]) -> str:
    """The n of a difference that fewer than all seeds have; each metric has its own, since a strength is chosen for each."""
    return "" if row["n"] == row["seeds"] else f" (n = {row['n']})"


def _not_reached(row: Mapping[Any, Any], first: str, second: str) -> str:
    """Which of two methods does not reach a level with which seeds."""
    seeds = row["seeds"]
    short = [
        (m, row[f"reached_{side}"]) for m, side in ((first, "first"), (second, "second")) if row[f"reached_{side}"] < seeds
    ]
    return "; ".join(f"{m} reaches it in {reached} of {seeds} seeds" for m, reached in short) or "-"


def _rows(report: CurveReport) -> TextTable | None:
    if not report.rows_to_reward:
        return None
    note = (
        f"Model evaluations by which half of a method's runs have first reached a level of {report.reward_name}, and how many "
        "have. Runs that never reach it count as slower than all others (Kaplan and Meier 1958)."
    )
    levels = report.levels
    rows = []
    for method in dict.fromkeys(row.method for row in report.rows_to_reward):
        of_method = {row.level: row for row in report.rows_to_reward if row.method == method}
        cells = [_rows_cell(of_method[level].median, of_method[level].reached, of_method[level].seeds) for level in levels]
        rows.append([name(method), *cells, count(of_method[levels[0]].budget)])
    head = ["method", *(f"to {number(level)}" for level in levels), "budget"]
    return TextTable("Model evaluations to reach a reward", note, head, rows)


def _rows_cell(median: float, reached: int, runs: int) -> Cell:
    share = "" if reached == runs else f" ({reached} of {runs} runs)"
    return Cell(f"{'not reached' if math.isinf(median) else number(median)}{share}", median)


def _areas(report: CurveReport) -> TextTable | None:
    frame = report.areas
    if frame.empty:
        return None
    metrics = _shown(frame)
    note = (
        f"The area that a method's evaluations dominate in {report.reward_name} and diversity, over its training and its "
        "strengths, above the base model's reward and the worst diversity of all curves; intervals over seeds. More is better."
    )
    rows = _by_method(frame, metrics)
    return TextTable("Hypervolume of the curves", note, ["method", *map(axis_name, metrics)], rows)


def _onsets(report: CurveReport) -> TextTable | None:
    frame = report.onsets
    if frame.empty:
        return None
    metrics = _shown(frame)
    note = (
        "The iteration at which a metric is best: the median over seeds, with their range. A metric that gets worse from there "
        f"to the end, beyond chance over prompts, while {report.reward_name} rises, shows over-optimisation; the number of "
        "such seeds is given. A metric that is best at 0 is never better than the base model's."
    )
    rows = []
    for (method, strength), part in frame.groupby(["method", "strength"], sort=False):
        entries = {str(row["metric"]): row for row in part.to_dict("records")}
        cells = [_onset_cell(entries.get(metric)) for metric in metrics]
        rows.append([name(f"{method}, {strength}" if strength else str(method)), *cells])
    few = not (frame["over_optimised"] * 2 > frame["seeds"]).any()
    return TextTable("Onset of over-optimisation", note, ["method", *map(axis_name, metrics)], rows, folded=few)


def _onset_cell(row: Mapping[Any, Any] | None) -> Cell:
    if row is None:
        return Cell("-", math.nan)
    spread = f" ({row['earliest']} to {row['latest']})" if row["earliest"] != row["latest"] else ""
    worse = f", worse later in {row['over_optimised']} of {row['seeds']} seeds" if row["over_optimised"] else ""
    return Cell(f"{row['iteration']:g}{spread}{worse}", row["iteration"])


def _power(report: CurveReport) -> TextTable | None:
    frame = report.power
    if frame.empty:
        return None
    seeds = int(frame["seeds"].min())
    if seeds < 2:
        return None
    note = (
        f"The smallest true difference of two trained models that a test at {100 * SIGNIFICANT:.0f} % finds in "
        f"{100 * POWER:.0f} % of comparisons with these seeds, from their spread (noncentral t, uncorrected), paired by seed "
        "or not; and the seeds that the smallest observed difference would need. A smaller difference that is not beyond "
        "chance here may still exist."
    )
    rows = [
        [
            name(axis_name(str(row["metric"]))),
            count(row["seeds"]),
            _detectable(row["paired_detectable"]),
            _detectable(row["detectable"]),
            Cell(_range(row["smallest"], row["largest"]), row["largest"]),
            _needed(row),
        ]
        for row in frame.to_dict("records")
    ]
    head = ["metric", "seeds", "found if paired", "found if unpaired", "observed differences", "seeds for the smallest"]
    return TextTable(f"What {seeds} seeds can and cannot tell", note, head, rows)


def _detectable(value: float) -> Cell:
    if value == 0:
        return Cell("any: seeds do not differ", value)
    return Cell("none" if math.isinf(value) or math.isnan(value) else number(value), value)


def _range(smallest: float, largest: float) -> str:
    low, high = number(smallest), number(largest)
    return low if low == high else f"{low} to {high}"


def _needed(row: Mapping[Any, Any]) -> Cell:
    value = row["seeds_needed"]
    if value is None or pd.isna(value):
        return Cell(f"more than {MOST_SEEDS:,}", math.inf)
    return Cell(f"{value:,.0f}", value)


def _shown(frame: pd.DataFrame) -> list[str]:
    return [str(metric) for metric in dict.fromkeys(frame["metric"])][:SHOWN]


def _by_method(frame: pd.DataFrame, metrics: Sequence[str]) -> list[list[Cell]]:
    rows = []
    for method, part in frame.groupby("method", sort=False):
        entries = {str(row["metric"]): row for row in part.to_dict("records")}
        rows.append([name(str(method)), *(bounded(entries[m]) if m in entries else Cell("-", math.nan) for m in metrics)])
    return rows
