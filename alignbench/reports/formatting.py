"""Numbers as reports write them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from alignbench.figures.metric_names import axis_name
from alignbench.records.record import MetricRecord

SMALLEST_SHOWN = 1e-15
"""The smallest p value that is written: below it a test's assumptions are worth less than its digits."""
ARROWS = {True: "↑", False: "↓", None: ""}
"""The direction in which a metric is better."""
SIGNIFICANT = 0.05
"""A difference is beyond chance if its corrected p value is below this."""
MOST_DECIMALS = 5
"""Decimals of a number with an interval, at most; smaller numbers are written as powers of ten."""


def heading(name: str, metric: MetricRecord) -> str:
    """A metric's name, with the direction in which it is better, and whether it was trained on."""
    return " ".join([axis_name(name), *ARROWS[metric.higher_is_better], *(["(trained on)"] if metric.role == "reward" else [])])


def number(value: float | None) -> str:
    """Three digits, those before the point in full, or a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e15 else f"{value:.3g}"


def with_interval(value: float, lower: float, upper: float, missing: str = "") -> str:
    """`0.066 [0.040, 0.092]`: three numbers with the same decimals, as many as the interval's half-width needs for two digits.

    They are fewer where the largest number has three digits already, unless the half-width would be 0 then.

    Args:
        missing: what stands in place of an interval that is unbounded.
    """
    if not (math.isfinite(lower) and math.isfinite(upper)):
        return number(value) + missing
    ends, half_width = (value, lower, upper), (upper - lower) / 2
    most = min(_decimals(half_width, 2), _decimals(max(map(abs, ends)), 3))
    decimals = max(most, _decimals(half_width, 1)) if half_width > 0 else most
    if decimals > MOST_DECIMALS:
        texts = [number(end) for end in ends]
    else:
        places = max(0, int(decimals))
        texts = [f"{round(end, places) + 0.0:,.{places}f}" for end in ends]  # + 0.0: no minus before a zero
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def _decimals(size: float, digits: int) -> float:
    """Decimals with which a positive number has so many digits; infinite for 0."""
    return digits - 1 - math.floor(math.log10(size)) if size > 0 else math.inf


def p_value(p: float) -> str:
    """A p value; none is written as 0, and where there is no test the text says so."""
    if math.isnan(p):
        return "cannot be told"
    return f"{p:.2g}" if p >= SMALLEST_SHOWN else f"< {SMALLEST_SHOWN:.0g}"


def contrast(row: Mapping[Any, Any], usual: str = "") -> str:
    """A row of `analysis.contrasts` as text: mean, interval and n, with `*` if the corrected p value is below `SIGNIFICANT`.

    The base model has no seeds, and so no interval. At a KL level, n is given of all runs.

    Args:
        usual: the n that is not repeated, as `counted` writes it.
    """
    runs = row.get("runs", math.nan)
    if math.isnan(row["value"]):
        return "-" if math.isnan(runs) else f"not seen in {runs:.0f} runs"
    if row["n"] == 0:
        return number(row["value"])
    names = {f"mean{end}": row[key] for end, key in (("", "value"), ("_lower", "lower"), ("_upper", "upper"), ("_n", "n"))}
    text = estimate(names, usual=usual if math.isnan(runs) else "")
    text = text if math.isnan(runs) else text.replace(" seed", f" of {runs:.0f} seed")
    return text + (" *" if row.get("p_holm", math.nan) < SIGNIFICANT else "")


def estimate(row: Mapping[Any, Any], name: str = "mean", usual: str = "") -> str:
    """`0.12 [0.08, 0.16] (n = 5 seeds)`: never a mean without its interval and n.

    Args:
        usual: the n that is told once for all numbers beside it, as `counted` writes it; it is not repeated.
    """
    value, lower, upper, n = (row[name + end] for end in ("", "_lower", "_upper", "_n"))
    if math.isnan(value):
        return "-"
    count = counted(n, row.get("over", "seeds") if name != "iqm" else "seeds")
    return with_interval(value, lower, upper, " [no interval]") + (f" ({count})" if count != usual else "")


def spent(row: Mapping[str, Any], name: str) -> str:
    """`5.3 (4.9 to 6.1, n = 3 seeds)`: what a cell used on average, with the range of its seeds where they differ."""
    lowest, highest = (number(row[name + end]) for end in ("_min", "_max"))
    several = f" ({lowest} to {highest}, {counted(row['seeds'], 'seeds')})" if lowest != highest else ""
    return number(row[name]) + several


def counted(n: float, over: str) -> str:
    """`n = 3 seeds`."""
    return f"n = {n:.0f} {over if n != 1 else over.removesuffix('s')}"


def listed(value: Any) -> str:
    """Keys and values in a line, nested ones in brackets where they say anything."""
    if not isinstance(value, Mapping):
        return str(value) or '""'
    texts = {k: listed(v) for k, v in value.items() if v != {}}
    nested = {k: f" ({text})" if text else "" for k, text in texts.items() if isinstance(value[k], Mapping)}
    return ", ".join(f"{k}{nested.get(k, f' {text}')}" for k, text in texts.items())


def some_of(names: Iterable[Any], most: int, what: str = "") -> str:
    """`a, b and 3 more methods`: the first names, and how many others there are; a single other one is named.

    Args:
        names: at least one.
        most: how many are named if there are more.
        what: what the others are.
    """
    every = list(map(str, names))
    more = [f"{len(every) - most} more {what}".strip()] if len(every) > most + 1 else []
    shown = [*every[:most], *more] if more else every
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1]
