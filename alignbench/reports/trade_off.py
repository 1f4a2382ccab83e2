"""The interactive trade-off plot of `report.html`, as numbers for its template."""

import math
from itertools import pairwise, zip_longest
from typing import Any

import pandas as pd
from matplotlib.ticker import MaxNLocator

from alignbench.comparison.results import BASE
from alignbench.reports.style import looks, metric_pairs, sign

FRAME = (86.0, 12.0, 464.0, 300.0)
"""Left, top, width and height of the trade-off plot's axes, in its own units."""
PATHS = {
    "o": "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0 -12 0",
    "s": "M-5.5-5.5h11v11h-11z",
    "^": "M0-7L7 5.5H-7z",
    "D": "M0-7.5L7.5 0 0 7.5-7.5 0z",
    "v": "M0 7L7-5.5H-7z",
    "P": "M-2-7h4v5h5v4h-5v5h-4v-5h-5v-4h5z",
    "X": "M-6-3L-3-6 0-3 3-6 6-3 3 0 6 3 3 6 0 3-3 6-6 3-3 0z",
    "<": "M-7 0L5.5-7V7z",
    ">": "M7 0L-5.5-7V7z",
    "h": "M0-7L6-3.5V3.5L0 7-6 3.5V-3.5z",
    "*": "M0-8L2-2.5 8-2.5 3 1 5 7 0 3.5-5 7-3 1-8-2.5-2-2.5z",
}
"""Matplotlib's markers as SVG paths."""


def scatter(cells: pd.DataFrame, reward: str, diversity: str) -> dict[str, Any]:
    """Positions of the trade-off plot's points, bars, ticks and front, in units of its view box."""
    points = metric_pairs(cells, diversity, reward)
    left, top, width, height = FRAME
    limits = {c: _limits(points, c) for c in ("x", "y")}

    def place(axis: str, value: float) -> float:
        low, high = limits[axis]
        share = (min(max(value, low), high) - low) / (high - low)
        return round(left + share * width if axis == "x" else top + (1 - share) * height, 2)

    look = looks([str(c) for c in points.index])
    marks = [
        {
            "cell": str(cell),
            "color": look[str(cell)].color if cell != BASE else "currentColor",  # black is not seen in the dark
            "path": PATHS[look[str(cell)].marker],
            "front": bool(p["front"]),
            **{f"{c}{end}": place(c, float(p[f"{c}{end}"])) for c in ("x", "y") for end in ("", "_lower", "_upper")},
        }
        for cell, p in points.iterrows()
    ]
    ticks = {
        c: [(place(c, t), f"{t:.4g}") for t in MaxNLocator(5).tick_values(*limits[c]) if _within(t, limits[c])] for c in "xy"
    }
    front = sorted((m["x"], m["y"]) for m in marks if m["front"])
    more_is_better = sign(cells, diversity) > 0
    corners = [(x, below) if more_is_better else (right, y) for (x, y), (right, below) in pairwise(front)]
    line = [point for both in zip_longest(front, corners) for point in both if point]
    return {"marks": marks, "ticks": ticks, "front": " ".join(f"{x},{y}" for x, y in line), "frame": FRAME}


def _limits(points: pd.DataFrame, axis: str) -> tuple[float, float]:
    """Around all bars that end; an unbounded bar runs to the frame."""
    ends = points[[axis, f"{axis}_lower", f"{axis}_upper"]].to_numpy(dtype=float).ravel()
    finite = [v for v in ends if math.isfinite(v)]
    low, high = min(finite), max(finite)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]
