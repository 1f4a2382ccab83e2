"""Numbers as reports write them."""

import math
from collections.abc import Mapping
from typing import Any

from alignbench.records.record import MetricRecord

SMALLEST_SHOWN = 1e-15
"""The smallest p value that is written: below it a test's assumptions are worth less than its digits."""
ARROWS = {True: "↑", False: "↓", None: ""}
"""The direction in which a metric is better."""
SIGNIFICANT = 0.05
"""A difference is beyond chance if its corrected p value is below this."""


def heading(name: str, metric: MetricRecord) -> str:
    """A metric's name, with the direction in which it is better, and whether it was trained on."""
    return " ".join([name, *ARROWS[metric.higher_is_better], *(["(trained on)"] if metric.role == "reward" else [])])


def number(value: float | None) -> str:
    """Three digits, those before the point in full, or a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e15 else f"{value:.3g}"


def p_value(p: float) -> str:
    """A p value; none is written as 0, and where there is no test the text says so."""
    if math.isnan(p):
        return "cannot be told"
    return f"{p:.2g}" if p >= SMALLEST_SHOWN else f"< {SMALLEST_SHOWN:.0g}"


def contrast(row: Mapping[Any, Any]) -> str:
    """A row of `analysis.contrasts` as text: mean, interval and n, with `*` if the corrected p value is below `SIGNIFICANT`.

    The base model has no seeds, and so no interval. At a KL level, n is given of all runs.
    """
    runs = row.get("runs", math.nan)
    if math.isnan(row["value"]):
        return "-" if math.isnan(runs) else f"not seen in {runs:.0f} runs"
    if row["n"] == 0:
        return number(row["value"])
    names = {f"mean{end}": row[key] for end, key in (("", "value"), ("_lower", "lower"), ("_upper", "upper"), ("_n", "n"))}
    text = estimate(names) if math.isnan(runs) else estimate(names).replace(" seed", f" of {runs:.0f} seed")
    return text + (" *" if row.get("p_holm", math.nan) < SIGNIFICANT else "")


def estimate(row: Mapping[Any, Any], name: str = "mean") -> str:
    """`0.12 [0.08, 0.16] (n = 5 seeds)`: never a mean without its interval and n."""
    value, lower, upper, n = (row[name + end] for end in ("", "_lower", "_upper", "_n"))
    if math.isnan(value):
        return "-"
    over = row.get("over", "seeds") if name != "iqm" else "seeds"
    interval = f"[{number(lower)}, {number(upper)}]" if math.isfinite(lower) and math.isfinite(upper) else "[no interval]"
    return f"{number(value)} {interval} ({_counted(n, over)})"


def spent(row: Mapping[str, Any], name: str) -> str:
    """`5.3 (4.9 to 6.1, n = 3 seeds)`: what a cell used on average, with the range of its seeds where they differ."""
    lowest, highest = (number(row[name + end]) for end in ("_min", "_max"))
    several = f" ({lowest} to {highest}, {_counted(row['seeds'], 'seeds')})" if lowest != highest else ""
    return number(row[name]) + several


def _counted(n: float, over: str) -> str:
    return f"n = {n:.0f} {over if n != 1 else over.removesuffix('s')}"


def listed(value: Any) -> str:
    """Keys and values in a line, nested ones in brackets."""
    if not isinstance(value, Mapping):
        return str(value) or '""'
    texts = {k: f"({listed(v)})" if isinstance(v, Mapping) else listed(v) for k, v in value.items() if v != {}}
    return ", ".join(f"{k} {v}" for k, v in texts.items())
