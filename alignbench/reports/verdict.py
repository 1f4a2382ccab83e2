"""The verdict of a report: what a setup's records show, in sentences."""

from typing import Any

import pandas as pd

from alignbench.comparison.results import BASE, Results
from alignbench.reports.comparison_plots import DISTANCES
from alignbench.reports.formatting import SIGNIFICANT, SMALLEST_SHOWN, estimate, number, p_value
from alignbench.reports.style import metric_pairs, seeds_of

FEW_SEEDS = 5
"""With fewer seeds, a difference that exists will often not be beyond chance."""
LISTED = 6
"""Differences between methods that the verdict names; the table of pairs has all."""


def verdict(results: Results, setup: str) -> list[str]:
    """What a setup's records show: the front, which differences are beyond chance, and alarms."""
    reward, diversity = results.reward(setup), results.diversity(setup)
    cells = results.cells_frame[results.cells_frame["setup"] == setup]
    sentences = []
    if diversity:
        points = metric_pairs(cells, diversity, reward)
        front = ", ".join(str(c) for c in points.index[points["front"]]) or "nothing"
        sentences.append(f"On the front of {reward} and {diversity}, by their means: {front}.")
        sentences += _dominated(results, setup, [str(c) for c in points.index[~points["front"]]], reward, diversity)
    else:
        sentences.append("No diversity metric was recorded, so there is no trade-off to show.")
    for metric in (reward, *([diversity] if diversity else [])):
        sentences += _differences(results, setup, metric)
    if 1 < cells.loc[cells["cell"] != BASE, "seeds"].min() < FEW_SEEDS:
        few = seeds_of(cells)
        sentences.append(f"{few} per method: a difference that is not beyond chance here may still exist.")
    sentences += _distances(cells)
    alarms = sum(bool(run.result.alarms) for run in results.of(setup))
    sentences.append(f"{alarms} of {len(results.of(setup))} runs raised an alarm." if alarms else "No run raised an alarm.")
    return sentences


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
    return [f"Beaten in both beyond chance: {beaten or 'none, so what lies behind the front may belong to it'}."]


def _differences(results: Results, setup: str, metric: str) -> list[str]:
    tested = _tested(results, setup, metric)
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
    return f"by {number(size)} [{number(low)}, {number(high)}], {_equals(row['p_holm'])}"


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
            return [f"The distance from the base model, {metric}, ranges from {ends}: {why}."]
    return []
