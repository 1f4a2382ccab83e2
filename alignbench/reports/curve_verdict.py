"""What the curves and the front say, in sentences: the beginning of a verdict."""

import math
from typing import Any

import pandas as pd

from alignbench.analysis.curves import ROWS
from alignbench.analysis.power import POWER
from alignbench.comparison.results import BASE
from alignbench.reports.curve_report import CurveReport
from alignbench.reports.formatting import SIGNIFICANT, number, p_value
from alignbench.reports.style import axis_name

LISTED = 4
"""Pairs of methods that are named; the tables have all."""


def curve_sentences(report: CurveReport) -> list[str]:
    """What the curves say: equal reward, cost, the front, over-optimisation, metrics that disagree, and power."""
    return [
        *_missing(report),
        *_at_equal_reward(report),
        *_cost(report),
        *_against_front(report),
        *_over_optimisation(report),
        *_disagreement(report),
        *_power(report),
    ]


def _missing(report: CurveReport) -> list[str]:
    """Which cells have no curve, or one of a single evaluation."""
    recorded, said = report.recorded, []
    if recorded.without and not report.runs and not recorded.short:
        said.append(
            "No run was evaluated along its training, so methods cannot be compared at equal reward: evaluation.every=N "
            "records the curves."
        )
    elif recorded.without:
        said.append(f"Without a curve, and so not compared at equal reward: {', '.join(recorded.without)}.")
    if recorded.short:
        said.append(
            f"Evaluated only once along the training, while a curve needs two evaluations: {', '.join(recorded.short)}; lower "
            "evaluation.every."
        )
    return said


def _at_equal_reward(report: CurveReport) -> list[str]:
    if not report.comparable or len(report.recorded.methods) < 2:
        return []
    level = report.common_level
    if level is None:
        base = sum(float(c.points[report.reward].iloc[0]) for c in report.runs) / len(report.runs)
        stuck = [m for m in report.recorded.methods if _lowest_best(report, m) <= base]
        return [
            f"There is no level of {report.reward} that every run reaches: some runs of {', '.join(stuck)} do not rise above "
            f"the base model's {number(base)} on the validation prompts."
        ]
    metric = next((m for m in report.diversities if m in report.metrics), None)
    if metric is None:
        return []
    frame = report.differences
    rows = frame[(frame["level"] == level) & (frame["metric"] == metric)].to_dict("records")
    rows_spent = frame[(frame["level"] == level) & (frame["metric"] == ROWS)].set_index(["first", "second"])
    at = f"At {axis_name(report.reward)} {number(level)}, which every run reaches"
    clear = sorted((r for r in rows if r["p_holm"] < SIGNIFICANT), key=lambda r: r["p_holm"])
    said = [f"{at}: {_pair(row, metric, report, rows_spent)}." for row in clear[:LISTED]]
    if len(clear) > LISTED:
        said.append(f"{len(clear) - LISTED} more pairs differ there; the table of differences at equal reward has them.")
    unclear = [row for row in rows if not row["p_holm"] < SIGNIFICANT]
    if unclear and not clear and len(unclear) <= LISTED:
        said += [f"{at}: {_pair(row, metric, report, rows_spent)}." for row in unclear]
    elif unclear and not clear:
        said.append(f"{at}, none of {len(unclear)} pairs of methods differs in {axis_name(metric)} beyond chance.")
    return said


def _lowest_best(report: CurveReport, method: str) -> float:
    """The lowest over seeds of the best reward over strengths."""
    best: dict[int, float] = {}
    for curve in report.runs:
        if curve.method == method:
            best[curve.seed] = max(best.get(curve.seed, -math.inf), float(curve.points[report.reward].max()))
    return min(best.values())


def _pair(row: dict[Any, Any], metric: str, report: CurveReport, spent: pd.DataFrame) -> str:
    """`A keeps 0.12 [0.08, 0.16] more LGMD than B (n = 3 seeds, p = 0.01) and needs 3,000 [..] fewer model rows`."""
    up = row["difference"] >= 0
    flip = up == (report.directions.get(metric) is False)
    first, second = (row["second"], row["first"]) if flip else (row["first"], row["second"])
    size = _size(row, "more" if (row["difference"] < 0) == flip else "less")
    n = row["n"]
    test = f"n = {n} seed{'s' * (n != 1)}"
    if row["p_holm"] < SIGNIFICANT:
        test += f", p = {p_value(row['p_holm'])}"
    elif math.isnan(row["p_holm"]):
        test += ", too few to test"
    else:
        test += f", p = {p_value(row['p_holm'])}: not beyond chance"
    cost = dict(spent.loc[(row["first"], row["second"])]) if (row["first"], row["second"]) in spent.index else None
    needs = ""
    if cost is not None and not math.isnan(cost["difference"]):
        value = -cost["difference"] if flip else cost["difference"]
        sure = "" if cost["p_holm"] < SIGNIFICANT else ", not beyond chance"
        needs = f" and needs {_size(cost, '')}{'more' if value >= 0 else 'fewer'} model rows{sure}"
    return f"{first} has {size}{axis_name(metric)} than {second} ({test}){needs}"


def _size(row: dict[Any, Any], word: str) -> str:
    value, lower, upper = (float(row[key]) for key in ("difference", "lower", "upper"))
    if value < 0:
        value, lower, upper = -value, -upper, -lower
    ends = f" [{number(lower)}, {number(upper)}]" if math.isfinite(lower) and math.isfinite(upper) else ""
    return f"{number(value)}{ends} {word + ' ' if word else ''}"


def _cost(report: CurveReport) -> list[str]:
    """How many model rows each method needs for the highest level, and who never gets there."""
    if not report.rows_to_reward:
        return []
    level = report.levels[-1]
    reached = [row for row in report.rows_to_reward if row.level == level]
    fast = sorted((row for row in reached if not math.isinf(row.median)), key=lambda row: row.median)
    slow = [row for row in reached if math.isinf(row.median)]
    said = []
    if fast:
        listed = ", ".join(f"{row.method} after {number(row.median)} model rows" for row in fast[:LISTED])
        said.append(f"Half of the runs reach {axis_name(report.reward)} {number(level)} or more: {listed}.")
    if slow:
        listed = ", ".join(f"{row.method} ({row.reached} of {row.seeds} runs)" for row in slow[:LISTED])
        said.append(f"Less than half of the runs reach {number(level)} within their budget: {listed}.")
    return said


def _against_front(report: CurveReport) -> list[str]:
    """Who lost more diversity than its reward asks for."""
    if report.front is None:
        return [
            "There is no front of the tilted target here (`alignbench compare` makes one unless --no-front is given), so a "
            "fall of diversity is compared with the base model."
        ]
    if report.front.record.normalised:
        return [
            "Several rewards are standardised within each prompt before they are added, which has no counterpart in the means "
            "of a trained model: methods are not compared with the front."
        ]
    frame = report.avoidable
    if frame.empty:
        return []
    metric = str(frame["metric"].iloc[0])
    rows = frame[(frame["metric"] == metric) & (frame["cell"] != BASE)]
    base = frame.loc[(frame["metric"] == metric) & (frame["cell"] == BASE), "value"]
    own = max(0.0, float(base.iloc[0])) if len(base) and not math.isnan(base.iloc[0]) else 0.0
    lost = rows[rows["lower"] > own].sort_values("value", ascending=False)
    none = rows[(rows["lower"] <= own) & (rows["lower"] > -math.inf)]
    unknown = rows[rows["value"].isna()]
    said = []
    if len(lost):
        listed = ", ".join(f"{row['cell']} {_plain(row)}" for row in lost.head(LISTED).to_dict("records"))
        apart = f" (the base model itself is {number(own)} below the front)" if own > 0 else ""
        said.append(f"{axis_name(metric)} lost needlessly, against the target's front at equal reward: {listed}{apart}.")
    if len(none):
        listed = ", ".join(none["cell"].head(LISTED))
        said.append(f"No needless loss of {axis_name(metric)} is beyond chance for {listed}.")
    if len(unknown):
        said.append(f"Above the reward that the front reaches: {', '.join(unknown['cell'].head(LISTED))}.")
    return said


def _plain(row: dict[Any, Any]) -> str:
    return f"{number(row['value'])} [{number(row['lower'])}, {number(row['upper'])}]"


def _over_optimisation(report: CurveReport) -> list[str]:
    """Where hacking sets in by metrics that are independent of the reward."""
    frame = report.onsets
    if not report.comparable:
        return []
    if frame.empty:
        return ["The onset of over-optimisation cannot be told: it needs a metric with a direction on four validation prompts."]
    hacked = frame[(frame["over_optimised"] * 2 > frame["seeds"]) & frame["metric"].isin(report.judges)]
    if hacked.empty:
        judged = bool(frame["metric"].isin(report.judges).any())
        return (
            ["No over-optimisation is seen: where the reward rises, no judge falls beyond chance in most seeds."]
            if judged
            else []
        )
    said = []
    for (method, strength), part in list(hacked.groupby(["method", "strength"], sort=False))[:LISTED]:
        metrics = "; ".join(
            f"{axis_name(str(row['metric']))} is best at iteration {row['iteration']:g} and gets worse from there while the "
            f"reward rises ({row['over_optimised']} of {row['seeds']} seeds)"
            for row in part.sort_values("iteration", kind="stable").head(1).to_dict("records")
        )
        others = len(part) - 1
        more = f"; so do {others} other metrics" if others > 1 else "; so does one other metric" if others else ""
        of = f"{method}, {strength}" if strength else str(method)
        said.append(f"Over-optimisation of {of}: {metrics}{more}.")
    return said


def _disagreement(report: CurveReport) -> list[str]:
    """Cells for which some metrics of diversity rise beyond chance while others fall."""
    cells = report.results.cells_frame
    cells = cells[(cells["setup"] == report.setup) & (cells["cell"] != BASE) & cells["metric"].isin(report.diversities)]
    said = []
    for cell, part in cells.groupby("cell", sort=False):
        better = part["higher_is_better"].map({True: 1.0, False: -1.0}).astype(float)
        low, high = part["difference_lower"] * better, part["difference_upper"] * better
        least, most = low.where(low < high, high), high.where(low < high, low)
        up, down = part.loc[least > 0, "metric"], part.loc[most < 0, "metric"]
        if len(up) and len(down):
            rises, falls = (", ".join(map(axis_name, names)) for names in (up, down))
            said.append(f"Metrics of diversity disagree about {cell}: {rises} above the base model's, {falls} below.")
    return said[:LISTED]


def _power(report: CurveReport) -> list[str]:
    frame = report.power
    if frame.empty:
        return []
    seeds = int(frame["seeds"].min())
    if seeds < 2:
        return ["One seed for each method cannot tell any difference between methods from the chance of training."]
    known = [
        row for row in frame.to_dict("records") if math.isfinite(row["paired_detectable"]) and row["paired_detectable"] > 0
    ]
    if not known:
        return []
    listed = " and ".join(f"{number(row['paired_detectable'])} in {axis_name(str(row['metric']))}" for row in known[:2])
    return [
        f"{seeds} seeds show a true difference of {listed} in {POWER:.0%} of comparisons (paired by seed, a single test); "
        "smaller ones they cannot tell."
    ]
