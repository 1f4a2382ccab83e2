"""What a setup's records show in detail, in sentences: of its curves and front, and of the trained models."""

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from alignbench.analysis.curves import ROWS
from alignbench.analysis.power import POWER
from alignbench.comparison.results import BASE, Results
from alignbench.figures.metric_names import axis_name
from alignbench.reports.curve_report import CurveReport
from alignbench.reports.formatting import SIGNIFICANT, SMALLEST_SHOWN, estimate, number, p_value, with_interval
from alignbench.reports.plots.comparison_plots import DISTANCES
from alignbench.reports.style import metric_pairs, seeds_of

LISTED = 4
"""Pairs of methods that are named; the tables have all."""
FEW_SEEDS = 5
"""With fewer seeds, a difference that exists will often not be beyond chance."""


def findings(results: Results, setup: str, curves: CurveReport | None = None) -> list[str]:
    """Everything that a setup's records show: first what its curves say, then the trained models' clear differences.

    Args:
        curves: the setup's curves and front.
    """
    reward, diversity = results.reward(setup), results.diversity(setup)
    cells = results.cells_frame[results.cells_frame["setup"] == setup]
    sentences = curve_sentences(curves) if curves else []
    if diversity:
        points = metric_pairs(cells, diversity, reward)
        front = ", ".join(str(c) for c in points.index[points["front"]]) or "nothing"
        axes = f"{axis_name(reward)} and {axis_name(diversity)}"
        sentences.append(f"No other model has better means in both {axes} than these: {front}.")
        sentences += _dominated(results, setup, [str(c) for c in points.index[~points["front"]]], reward, diversity)
    else:
        sentences.append("No diversity metric was recorded, so there is no trade-off to show.")
    for metric in (reward, *([diversity] if diversity else [])):
        sentences += _differences(results, setup, metric)
    if 1 < cells.loc[cells["cell"] != BASE, "seeds"].min() < FEW_SEEDS:
        few = seeds_of(cells)
        sentences.append(f"{few} per method: a difference that is not beyond chance here may still exist.")
    sentences += _distances(cells)
    return sentences


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
            f"No level of {report.reward_name} is reached by every run: some runs of {', '.join(stuck)} do not rise above "
            f"the base model's {number(base)} on the validation prompts."
        ]
    metric = next((m for m in report.diversities if m in report.metrics), None)
    if metric is None:
        return []
    frame = report.differences
    rows = frame[(frame["level"] == level) & (frame["metric"] == metric)].to_dict("records")
    rows_spent = frame[(frame["level"] == level) & (frame["metric"] == ROWS)].set_index(["first", "second"])
    at = f"At {report.reward_name} {number(level)}, which every run reaches"
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
    """`A has 0.12 [0.08, 0.16] more LGMD than B (n = 3 seeds, p = 0.01) and needs 3,000 [..] fewer model evaluations`."""
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
        needs = f" and needs {_size(cost, '')}{'more' if value >= 0 else 'fewer'} model evaluations{sure}"
    return f"{first} has {size}{axis_name(metric)} than {second} ({test}){needs}"


def _size(row: dict[Any, Any], word: str) -> str:
    value, lower, upper = (float(row[key]) for key in ("difference", "lower", "upper"))
    if value < 0:
        value, lower, upper = -value, -upper, -lower
    return f"{with_interval(value, lower, upper)} {word + ' ' if word else ''}"


def _cost(report: CurveReport) -> list[str]:
    """How many model evaluations each method needs for the highest level, and who never gets there."""
    if not report.rows_to_reward:
        return []
    level = report.levels[-1]
    reached = [row for row in report.rows_to_reward if row.level == level]
    fast = sorted((row for row in reached if not math.isinf(row.median)), key=lambda row: row.median)
    slow = [row for row in reached if math.isinf(row.median)]
    said = []
    if fast:
        listed = ", ".join(f"{row.method} after {number(row.median)} model evaluations" for row in fast[:LISTED])
        said.append(f"Half of the runs reach {report.reward_name} {number(level)} or more: {listed}.")
    if slow:
        listed = ", ".join(f"{row.method} ({row.reached} of {row.seeds} runs)" for row in slow[:LISTED])
        said.append(f"Less than half of the runs reach {number(level)} within their budget: {listed}.")
    return said


def _against_front(report: CurveReport) -> list[str]:
    """Who lost more diversity than its reward asks for."""
    if report.front is None:
        return [
            "There is no front of the tilted target here (alignbench compare makes one unless --no-front is given), so a "
            "fall of diversity is compared with the base model."
        ]
    if report.front.record.normalised:
        return [
            "Several rewards are standardised within each prompt before they are added, which has no counterpart in the means "
            "of a trained model: methods are not compared with the front."
        ]
    found = report.needless
    if found is None:
        return []
    metric, said = axis_name(found.metric), []
    if len(found.lost):
        listed = ", ".join(f"{row['cell']} {_plain(row)}" for row in found.lost.head(LISTED).to_dict("records"))
        apart = f" (the base model itself is {number(found.own)} below the front)" if found.own > 0 else ""
        said.append(f"{metric} lost needlessly, against the target's front at equal reward: {listed}{apart}.")
    if len(found.unclear):
        listed = ", ".join(found.unclear["cell"].head(LISTED))
        said.append(f"Not clearly more {metric} than the reward asks for was lost by {listed}.")
    if found.beyond:
        said.append(f"Above the reward that the front reaches: {', '.join(found.beyond[:LISTED])}.")
    return said


def _plain(row: dict[Any, Any]) -> str:
    return with_interval(row["value"], row["lower"], row["upper"])


def _over_optimisation(report: CurveReport) -> list[str]:
    """Where hacking sets in by metrics that are independent of the reward."""
    frame = report.onsets
    if not report.comparable:
        return []
    if frame.empty:
        return ["The onset of over-optimisation cannot be told: it needs a metric with a direction on four validation prompts."]
    hacked = report.over_optimised
    if hacked.empty:
        judged = bool(frame["metric"].isin(report.judges).any())
        return (
            ["No over-optimisation: where the reward rises, no independent metric gets worse beyond chance in most seeds."]
            if judged
            else []
        )
    said = []
    for (method, strength), part in list(hacked.groupby(["method", "strength"], sort=False))[:LISTED]:
        metrics = "; ".join(
            f"{axis_name(str(row['metric']))} is best at iteration {row['iteration']:g} and gets worse from there while the "
            f"reward rises ({row['over_optimised']} of {row['seeds']} seed{'s' * (row['seeds'] != 1)})"
            for row in part.sort_values("iteration", kind="stable").head(1).to_dict("records")
        )
        others = len(part) - 1
        more = f"; so do {others} other metrics" if others > 1 else "; so does one other metric" if others else ""
        of = f"{method}, {strength}" if strength else str(method)
        said.append(f"Over-optimisation of {of}: {metrics}{more}.")
    return said


def disagreements(report: CurveReport) -> list[tuple[str, str, str]]:
    """Cells for which some metrics of diversity rise beyond chance while others fall: the cell, and the names of both."""
    cells = report.results.cells_frame
    cells = cells[(cells["setup"] == report.setup) & (cells["cell"] != BASE) & cells["metric"].isin(report.diversities)]
    found = []
    for cell, part in cells.groupby("cell", sort=False):
        better = part["higher_is_better"].map({True: 1.0, False: -1.0}).astype(float)
        low, high = part["difference_lower"] * better, part["difference_upper"] * better
        least, most = low.where(low < high, high), high.where(low < high, low)
        up, down = part.loc[least > 0, "metric"], part.loc[most < 0, "metric"]
        if len(up) and len(down):
            rises, falls = (_and(map(axis_name, names)) for names in (up, down))
            found.append((str(cell), rises, falls))
    return found


def _and(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _disagreement(report: CurveReport) -> list[str]:
    return [
        f"Metrics of diversity disagree about {cell}: {rises} above the base model's, {falls} below."
        for cell, rises, falls in disagreements(report)[:LISTED]
    ]


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
        f"{seeds} seeds show a true difference of {listed} in {100 * POWER:.0f} % of comparisons (paired by seed, a single "
        "test); smaller ones they cannot tell."
    ]


def _tested(results: Results, setup: str, metric: str) -> pd.DataFrame:
    """The pairs whose difference in a metric could be tested, with the names of the higher one and of the better one."""
    pairs = results.pairs_frame
    tested = pairs[(pairs["setup"] == setup) & (pairs["metric"] == metric)].dropna(subset=["p"])
    up = tested["difference"] > 0
    high, low = tested["first"].where(up, tested["second"]), tested["second"].where(up, tested["first"])
    reverse = bool((tested["higher_is_better"] == False).any())  # noqa: E712
    better, worse = (low, high) if reverse else (high, low)
    return tested.assign(high=high, low=low, better=better, worse=worse, clear=tested["p_holm"] < SIGNIFICANT)


def _dominated(results: Results, setup: str, behind: list[str], reward: str, diversity: str) -> list[str]:
    """Which cells behind the front another one beats beyond chance in both metrics; empty where nothing can be tested."""
    tests = [_tested(results, setup, metric) for metric in (reward, diversity)]
    if not behind or any(tested.empty for tested in tests):
        return []
    clear = [{(row["better"], row["worse"]) for row in tested[tested["clear"]].to_dict("records")} for tested in tests]
    by = {worse: better for better, worse in sorted(clear[0] & clear[1])}
    beaten = ", ".join(f"{cell} (by {by[cell]})" for cell in behind if cell in by)
    nothing = "No model is worse in both beyond chance, so those that look worse may be as good."
    return [f"Worse in both beyond chance: {beaten}." if beaten else nothing]


def _differences(results: Results, setup: str, metric: str) -> list[str]:
    tested, metric = _tested(results, setup, metric), axis_name(metric)
    if tested.empty:
        why = "a test needs two seeds of a cell whose values differ; intervals over prompts hold for these trained models alone"
        return [f"{metric}: the variation from training to training is unknown ({why})."]
    clear, count = int(tested["clear"].sum()), f"{len(tested)} tested differences"
    how = f"Welch's test over {seeds_of(results.runs_frame.query('setup == @setup'))} per method, Holm-corrected"
    if not clear:
        return [f"{metric}: none of {count} is beyond chance ({how})."]
    sentences = [f"{metric}: {clear} of {count} are beyond chance ({how})."]
    to_base = tested[(tested["first"] == BASE) | (tested["second"] == BASE)]
    for side, other, word in (("high", "low", "above"), ("low", "high", "below")):
        rows = to_base[to_base["clear"] & (to_base[other] == BASE)]
        if len(rows):
            listed = ", ".join(f"{row[side]} ({_by(row)})" for row in rows.to_dict("records"))
            sentences.append(f"{metric} is {word} the base model's for {listed}.")
    between = tested.drop(to_base.index)
    surest = between[between["clear"]].sort_values("p_holm", kind="stable").to_dict("records")
    if surest:
        listed = "; ".join(f"{row['high']} above {row['low']} ({_by(row)})" for row in surest[:LISTED])
        more = f"; {len(surest) - LISTED} more in the table of pairs" if len(surest) > LISTED else ""
        sentences.append(f"{metric} between methods: {listed}{more}.")
    elif len(between):
        sentences.append(f"{metric} between methods: no difference is beyond chance.")
    return sentences


def _by(row: dict[Any, Any]) -> str:
    size, ends = abs(row["difference"]), sorted(row[f"difference_{end}"] for end in ("lower", "upper"))
    low, high = ends if row["difference"] > 0 else (-ends[1], -ends[0])
    return f"by {with_interval(size, low, high)}, {_equals(row['p_holm'])}"


def _equals(p: float) -> str:
    return f"p {'' if p < SMALLEST_SHOWN else '= '}{p_value(p)}"


def _distances(cells: pd.DataFrame) -> list[str]:
    """How far the methods moved from the base model: at unequal distances, diversity alone says little."""
    for metric in DISTANCES:
        rows = cells[(cells["metric"] == metric) & (cells["cell"] != BASE)].dropna(subset=["mean"])
        if len(rows) > 1:
            near, *_, far = rows.sort_values("mean").to_dict("records")
            ends = " to ".join(f"{estimate(row)} for {row['cell']}" for row in (near, far))
            why = "a model that moved less keeps more diversity for that reason alone, so compare at equal distance"
            return [f"The distance from the base model, {axis_name(metric)}, ranges from {ends}: {why}."]
    return []
