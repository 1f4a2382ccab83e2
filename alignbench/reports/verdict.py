"""The verdict of a report: what a reader should know, in five sentences. `findings` has the details."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from alignbench.analysis.curves import ROWS
from alignbench.analysis.planned import Answer
from alignbench.analysis.power import POWER
from alignbench.comparison.results import BASE, Results
from alignbench.figures.metric_names import axis_name, explained
from alignbench.reports.alarms import grouped
from alignbench.reports.curve_report import CurveReport
from alignbench.reports.findings import disagreements
from alignbench.reports.formatting import SIGNIFICANT, number, some_of, with_interval
from alignbench.reports.style import seeds_of

NAMED = 4
"""Methods that a sentence names, at most."""
LIMITS = {"model_rows": "model evaluations", "reward_calls": "scored images", "seconds": "seconds of training"}
"""Limits of a budget in words."""


def verdict(results: Results, setup: str, curves: CurveReport) -> list[str]:
    """Five sentences: what was compared, who wins at equal reward, what was lost needlessly, over-optimisation, and power."""
    return [
        _compared(results, setup, curves),
        _winner(curves),
        _with_disagreements(curves, _needless(curves)),
        _with_alarms(curves, _over_optimised(curves)),
        _untold(curves),
    ]


def _compared(results: Results, setup: str, curves: CurveReport) -> str:
    runs = results.of(setup)
    first = runs[0].result
    methods = list(dict.fromkeys(run.cell for run in runs))
    limits = {name: value for name, value in (first.config.get("budget") or {}).items() if value is not None}
    ends = [f"{number(value)} {LIMITS.get(name, name)}" for name, value in limits.items()]
    budget = " or ".join(ends) or f"{first.run.iterations} iterations"
    seeds = seeds_of(pd.DataFrame({"cell": [r.cell for r in runs], "seed": [r.result.run.seed for r in runs]}))
    count = "One method was trained" if len(methods) == 1 else f"{len(methods)} methods were trained"
    each = "each " if len(methods) > 1 else ""
    measure = explained(curves.diversity).replace(", a measure of diversity", "") if curves.diversity else ""
    diversity = f", and the measure of diversity is {measure}" if measure else ""
    return (
        f"{count} on task {first.run.task} with {first.run.backbone}, {each}within {budget} and with {seeds}: "
        f"{_listed(methods, 'methods')}; the reward is {explained(curves.reward)}{diversity}, on "
        f"{first.protocol.prompts} held-out prompts."
    )


def _winner(report: CurveReport) -> str:
    methods = report.recorded.methods
    several = len({run.cell for run in report.results.of(report.setup)}) > 1
    if not several:
        return _change(report)
    if len(report.planned):
        return _planned(report)
    if not report.comparable or len(methods) < 2:
        why = "since fewer than two were evaluated along the training"
        return f"Methods cannot be compared at equal reward, {why}; {_ends(report)}."
    metric = next((m for m in report.diversities if m in report.metrics), None)
    if metric is None:
        why = "No metric of diversity was recorded along the training"
        return f"{why}, so there is no comparison at equal reward; {_ends(report)}."
    if report.common_level is None:
        return (
            f"There is no comparison at equal reward, since some runs never rise above the base model's "
            f"{report.reward_name}; {_ends(report)}."
        )
    return _at_level(report, metric, report.common_level)


def _planned(report: CurveReport) -> str:
    """The answers to the contrasts that were planned, one after the other."""
    told = []
    for row in report.planned.to_dict("records"):
        first, second, metric = row["first"], row["second"], axis_name(str(row["metric"]))
        at = f"at equal reward ({report.reward_name} {number(row['level'])}, {number(row['gain'])} above the base model)"
        size = {"difference": row["value"], "lower": row["lower"], "upper": row["upper"]}
        match row["answer"]:
            case Answer.MORE | Answer.LESS:
                told.append(f"{at} {first} has {_size(size)} {row['answer']} {metric} than {second}")
            case Answer.NONE:
                told.append(f"{at} {first} and {second} do not differ by {number(row['matters'])} in {metric}")
            case _ if math.isnan(row["level"]):
                told.append(f"{first} and {second} cannot be compared, since a run of them never rises above the base model")
            case _:
                told.append(f"whether {first} has more or less {metric} than {second} {at} is not known")
    before = report.results.complete_before_contrasts
    when = "that the comparison names, set after its first results" if before else "that were planned"
    return f"Of the contrasts {when}: {'; '.join(told)}."


def _at_level(report: CurveReport, metric: str, level: float) -> str:
    at = f"At equal reward ({report.reward_name} {number(level)}, which every run reaches)"
    sign = -1.0 if report.directions.get(metric) is False else 1.0
    frame = report.differences
    rows = frame[(frame["level"] == level) & (frame["metric"] == metric)].to_dict("records")
    best = _most_ahead(rows, sign)
    ahead = [_seen_from(best, row) for row in rows if best in (row["first"], row["second"])]
    clear = [row for row in ahead if row["p_holm"] < SIGNIFICANT and sign * row["difference"] > 0]
    sizes = ", ".join(
        f"{_size(row)} {'less' if row['difference'] < 0 else 'more'} {axis_name(metric)} than {row['second']}"
        for row in (clear or ahead)[:NAMED]
    )
    if not clear:
        untested = all(math.isnan(row["p_holm"]) for row in ahead)
        why = "there are too few seeds for a test" if untested else "this may be chance"
        return f"{at}, no method is clearly the most diverse: {best} has {sizes}, but {why}."
    tied = [row["second"] for row in ahead if not row["p_holm"] < SIGNIFICANT]
    rest = f"; it cannot be told apart from {_listed(tied, 'methods')}" if tied else ""
    return f"{at}, {best} keeps the most diversity: it has {sizes}{_cost(report, best, level)}{rest}."


def _most_ahead(rows: Sequence[dict[Any, Any]], sign: float) -> str:
    """The method whose differences to the others, paired by seed, are the best on average.

    Means over seeds need not have this order where some methods have further seeds.
    """
    methods = dict.fromkeys(str(row[end]) for row in rows for end in ("first", "second"))

    def lead(method: str) -> float:
        own = [_seen_from(method, row)["difference"] for row in rows if method in (row["first"], row["second"])]
        known = [sign * value for value in own if not math.isnan(value)]
        return sum(known) / len(known) if known else -math.inf

    return max(methods, key=lead)


def _seen_from(best: str, row: dict[Any, Any]) -> dict[Any, Any]:
    """A row of differences, turned so that `best` comes first."""
    if row["first"] == best:
        return row
    turned = {"difference": -row["difference"], "lower": -row["upper"], "upper": -row["lower"]}
    return {**row, **turned, "first": best, "second": row["first"]}


def _size(row: dict[Any, Any]) -> str:
    value, lower, upper = (float(row[key]) for key in ("difference", "lower", "upper"))
    sign = -1.0 if value < 0 else 1.0
    ends = sorted((sign * lower, sign * upper))
    return with_interval(abs(value), ends[0], ends[1])


def _cost(report: CurveReport, best: str, level: float) -> str:
    """What the best method needed to get to the level, if it is not the fastest."""
    table = report.at_levels
    rows = table[(table["level"] == level) & (table["metric"] == ROWS)].groupby("method", sort=False)["value"].mean()
    fastest = str(rows.idxmin())
    if fastest == best:
        return ", and it is the fastest to get there"
    return f", after {number(rows[best])} model evaluations, where {fastest} needs {number(rows[fastest])}"


def _ends(report: CurveReport) -> str:
    """Who has most reward and most diversity at the end of the training."""
    said = []
    for metric, what in ((report.reward, "reward"), (report.diversity, "diversity")):
        rows = _trained(report, metric) if metric else pd.DataFrame()
        if len(rows):
            sign = -1.0 if report.directions.get(str(metric)) is False else 1.0
            best = rows.iloc[int((sign * rows["mean"]).argmax())]
            said.append(f"{best['cell']} has the most {what} ({axis_name(str(metric))} {_mean(best)})")
    return "at the end of the training, by the means, " + " and ".join(said) if said else "no run recorded a reward"


def _trained(report: CurveReport, metric: str) -> pd.DataFrame:
    cells = report.results.cells_frame
    rows: pd.DataFrame = cells[(cells["setup"] == report.setup) & (cells["metric"] == metric) & (cells["cell"] != BASE)]
    return rows.dropna(subset=["mean"])


def _mean(row: Any, name: str = "mean") -> str:
    return with_interval(float(row[name]), float(row[f"{name}_lower"]), float(row[f"{name}_upper"]))


def _change(report: CurveReport) -> str:
    """How a single method's reward and diversity changed."""
    said = []
    for metric in filter(None, (report.reward, report.diversity)):
        for row in _trained(report, metric).to_dict("records"):
            if not math.isnan(row["difference"]):
                went = "rose" if row["difference"] > 0 else "fell" if row["difference"] < 0 else "changed"
                size = {"difference": row["difference"], "lower": row["difference_lower"], "upper": row["difference_upper"]}
                chance = "" if size["lower"] > 0 or size["upper"] < 0 else ", which may be chance"
                said.append(f"{axis_name(metric)} {went} by {_size(size)}{chance}")
    changes = "; ".join(said) or "nothing changed"
    return f"A single method can only be compared with the base model: {changes}."


def _needless(report: CurveReport) -> str:
    if report.front is None:
        return (
            "Whether a method lost more diversity than its reward asks for is not known, since there is no front of the tilted "
            "target here (alignbench compare makes one unless --no-front is given)."
        )
    if report.front.record.normalised:
        return (
            "Several rewards are standardised within each prompt before they are added, so there is no front of the tilted "
            "target to compare with, and needless losses are not known."
        )
    found = report.needless
    if found is None:
        return "The target's front has no metric of diversity that the runs recorded, so needless losses are not known."
    beyond, metric = found.beyond, axis_name(found.metric)
    rest = f"; {_listed(beyond, 'methods')} went above the reward that the front reaches" if beyond else ""
    if found.lost.empty:
        asked = "than the reward asks for (than the tilted target loses at the same reward)"
        return f"No method clearly lost more {metric} {asked}{rest}."
    sizes = [f"{row['cell']} {_size({**row, 'difference': row['value']})}" for row in found.lost.to_dict("records")]
    what = f"More {metric} was lost than the reward asks for (than the tilted target loses at the same reward) by"
    return f"{what} {_listed(sizes, 'methods')}{rest}."


def _with_disagreements(report: CurveReport, sentence: str) -> str:
    """The sentence about diversity, with the methods about which metrics of diversity disagree, those alike together."""
    found = disagreements(report)
    if not found:
        return sentence
    alike: dict[tuple[str, str], list[str]] = {}
    for cell, rises, falls in found:
        alike.setdefault((rises, falls), []).append(cell)
    trained = len({run.cell for run in report.results.of(report.setup)})
    texts = [
        f"{'every method' if len(cells) == trained > 1 else _listed(cells, 'methods')} ({rises} rose; {falls} fell)"
        for (rises, falls), cells in alike.items()
    ]
    return f"{sentence.removesuffix('.')}; metrics of diversity disagree about {_listed(texts, 'kinds of change')}."


def _with_alarms(report: CurveReport, sentence: str) -> str:
    """The sentence about over-optimisation, with the methods whose runs raised an alarm."""
    groups = grouped(report.alarms)
    if not groups:
        return f"{sentence.removesuffix('.')}; no run raised an alarm."
    raised = [f"{f'{g.raised} of {g.runs} runs' if g.runs > 1 else 'the run'} of {g.cell} ({g.about})" for g in groups]
    return f"{sentence.removesuffix('.')}; alarms were raised by {_listed(raised, 'methods')}."


def _over_optimised(report: CurveReport) -> str:
    frame, judges = report.onsets, report.judges
    if not report.comparable or frame.empty or not frame["metric"].isin(judges).any():
        return (
            "Whether a method over-optimised its reward cannot be told: this needs evaluations along the training of a metric "
            "that was not trained on."
        )
    hacked = report.over_optimised
    if hacked.empty:
        return (
            "No method over-optimised its reward in most of its runs: where the reward rises, no metric that was not trained "
            "on gets clearly worse."
        )
    said = []
    for (method, strength), part in hacked.groupby(["method", "strength"], sort=False):
        first = part.sort_values("iteration", kind="stable").iloc[0]
        name = f"{method}, {strength}" if strength else str(method)
        said.append(f"{name} from iteration {first['iteration']:g} on ({axis_name(str(first['metric']))})")
    what = "Over-optimisation, where the reward goes on rising while a metric that was not trained on gets worse, is seen in"
    return f"{what} {_listed(said, 'methods')}."


def _untold(report: CurveReport) -> str:
    frame = report.power
    seeds = min((len(cell) for cell in _seeds(report).values()), default=0)
    if seeds < 2:
        return "One seed for each method cannot tell any difference between methods from the chance of training."
    known = [row for row in frame.to_dict("records") if 0 < row["paired_detectable"] < math.inf] if len(frame) else []
    if not known:
        return f"What differences {seeds} seeds can show is unknown here, since the values of a method do not vary over seeds."
    sizes = " or ".join(f"{number(row['paired_detectable'])} in {axis_name(str(row['metric']))}" for row in known[:2])
    found = f"is found in {100 * POWER:.0f} % of comparisons, and a smaller one less often"
    return f"With {seeds} seeds, a true difference of {sizes} {found}."


def _seeds(report: CurveReport) -> dict[str, set[int]]:
    seeds: dict[str, set[int]] = {}
    for run in report.results.of(report.setup):
        seeds.setdefault(run.cell, set()).add(run.result.run.seed)
    return seeds


def _listed(names: Iterable[str], what: str) -> str:
    return some_of(names, NAMED, what)
