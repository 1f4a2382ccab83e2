"""The report of a comparison: one self-contained HTML page, Markdown, tables; all from records alone."""

import base64
import io
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alignbench import comparison_plots as drawing
from alignbench.record import write_atomically
from alignbench.results import BASE, Results, read_results

LEVEL = 0.05
TEMPLATES = Path(__file__).parent / "templates"
PUBLISHED = Path(__file__).parent / "published.yaml"
FRAME = (70.0, 12.0, 480.0, 300.0)
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


def write_report(folder: Path) -> list[Path]:
    """Reads every record below `folder` and writes report.html, report.md, tables/ and plots/ into it; returns the files.

    Raises:
        UserError: there is no finished run.
        RunError: a file cannot be written.
    """
    results = read_results(folder)
    setups = [_setup(results, setup) for setup in results.setups]
    values = {
        "setups": setups,
        "results": results,
        "published": yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")),
        "environment": results.runs[0].result.environment,
        "commands": [results.command] if results.command else [r.result.environment.get("command", "") for r in results.runs],
        "failed": results.unfinished,
    }
    written = []
    for name in ("report.html", "report.md"):
        text = render(f"{name}.jinja", values)
        _write(folder / name, text)
        written.append(folder / name)
    return written + _write_tables(results, folder / "tables") + drawing.plot_comparison(results, folder / "plots")


def render(template: str, values: dict[str, Any]) -> str:
    """Fills a template; HTML is escaped, so that a prompt or a name stays text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: bool(name) and ".html" in str(name),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "estimate": estimate, "plain": plain}
    return environment.get_template(template).render(values)


def plain(text: Any) -> str:
    """A name or a sentence as one line of Markdown text, which can open no tag, link or column of a table."""
    return re.sub(r"([\\`\[\]<>|])", r"\\\1", " ".join(str(text).split()))


def verdict(results: Results, setup: str) -> list[str]:
    """What the setup's records show, in sentences: the front, what is beyond chance, alarms."""
    reward, diversity = results.reward(setup), results.diversity(setup)
    cells = results.cells_frame[results.cells_frame["setup"] == setup]
    sentences = []
    if diversity:
        points = drawing.metric_pairs(cells, diversity, reward)
        front = ", ".join(str(c) for c in points.index[points["front"]]) or "nothing"
        sentences.append(f"On the front of {reward} and {diversity}, by their means: {front}.")
    else:
        sentences.append("No diversity metric was recorded, so there is no trade-off to show.")
    for metric in (reward, *([diversity] if diversity else [])):
        sentences += _differences(results, setup, metric)
    alarms = sum(bool(run.result.alarms) for run in results.of(setup))
    sentences.append(f"{alarms} of {len(results.of(setup))} runs raised an alarm." if alarms else "No run raised an alarm.")
    return sentences


def _differences(results: Results, setup: str, metric: str) -> list[str]:
    pairs = results.pairs_frame
    pairs = pairs[(pairs["setup"] == setup) & (pairs["metric"] == metric)]
    tested = pairs.dropna(subset=["p"])
    if tested.empty:
        why = "two seeds of a cell are needed, whose values differ"
        return [f"{metric}: nothing can be said about chance from training to training ({why})."]
    clear = tested[tested["p_holm"] < LEVEL]
    if clear.empty:
        return [f"{metric}: no difference is beyond chance ({len(tested)} tested, Welch, Holm-corrected)."]
    said = [f"{metric}: {len(clear)} of {len(tested)} tested differences are beyond chance (Welch, Holm-corrected)."]
    for row in clear.to_dict("records"):
        high, low = (row["first"], row["second"]) if row["difference"] > 0 else (row["second"], row["first"])
        by, p = number(abs(row["difference"])), row["p_holm"]
        said.append(f"{metric} of {high} is higher than that of {low} by {by} (p = {p:.2g}).")
    return said


def _setup(results: Results, setup: str) -> dict[str, Any]:
    reward, diversity = results.reward(setup), results.diversity(setup)
    cells = results.cells_frame[results.cells_frame["setup"] == setup]
    first = results.of(setup)[0].result
    rows, texts = drawing.gallery(results, setup)
    pictures = {cell: [_data_uri(p) for p in found] for cell, found in rows.items()}
    figures = drawing.comparison_figures(results, setup)
    for name in ("trade_off", "pictures"):  # the page has its own
        if name in figures:
            plt.close(figures.pop(name))
    pairs = results.pairs_frame
    return {
        "name": setup,
        "reward": reward,
        "diversity": diversity,
        "verdict": verdict(results, setup),
        "metrics": list(first.metrics),
        "rows": [_row(cells, str(cell)) for cell in dict.fromkeys(cells["cell"])],
        "plot": scatter(cells, reward, diversity) if diversity else None,
        "figures": {name.replace("_", " "): _svg_uri(figure) for name, figure in figures.items()},
        "pictures": pictures,
        "prompts": texts,
        "pairs": pairs[(pairs["setup"] == setup) & pairs["metric"].isin([reward, diversity])].to_dict("records"),
        "protocol": first.protocol.model_dump(mode="json"),
        "alarms": [(run.cell, run.result.run.seed, alarm) for run in results.of(setup) for alarm in run.result.alarms],
        "seeds": sorted({run.result.run.seed for run in results.of(setup)}),
    }


def _row(cells: pd.DataFrame, cell: str) -> dict[str, Any]:
    part = cells[cells["cell"] == cell].set_index("metric")
    return {
        "cell": cell,
        "metrics": part.to_dict("index"),
        **{name: float(part[name].iloc[0]) for name in ("model_rows", "seconds", "reward_calls")},
    }


def scatter(cells: pd.DataFrame, reward: str, diversity: str) -> dict[str, Any]:
    """Positions of the trade-off plot's points, bars, ticks and front, in units of its view box."""
    points = drawing.metric_pairs(cells, diversity, reward)
    left, top, width, height = FRAME
    limits = {c: _limits(points, c) for c in ("x", "y")}

    def place(axis: str, value: float) -> float:
        low, high = limits[axis]
        share = (min(max(value, low), high) - low) / (high - low)
        return round(left + share * width if axis == "x" else top + (1 - share) * height, 2)

    look = drawing.looks([str(c) for c in points.index])
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
    return {"marks": marks, "ticks": ticks, "front": " ".join(f"{x},{y}" for x, y in front), "frame": FRAME}


def _limits(points: pd.DataFrame, axis: str) -> tuple[float, float]:
    """Around all bars that end; an unbounded bar runs to the frame."""
    ends = points[[axis, f"{axis}_lower", f"{axis}_upper"]].to_numpy(dtype=float).ravel()
    known = [v for v in ends if math.isfinite(v)]
    low, high = min(known), max(known)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def number(value: float | None) -> str:
    """Four digits, or a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"


def estimate(row: dict[str, Any], name: str = "mean") -> str:
    """`0.12 [0.08, 0.16] (n = 5 seeds)`: never a mean without its interval and n."""
    value, lower, upper, n = (row[name + end] for end in ("", "_lower", "_upper", "_n"))
    if math.isnan(value):
        return "-"
    over = "seeds" if name == "iqm" or row["over"] == "seeds" else "prompts"
    return f"{number(value)} [{number(lower)}, {number(upper)}] (n = {n:.0f} {over})"


def latex_table(rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> str:
    """A booktabs table of means with intervals and n; every name is escaped."""
    head = " & ".join(["Method", *(_latex(m) for m in metrics)])
    lines = [rf"\begin{{tabular}}{{l{'l' * len(metrics)}}}", r"\toprule", head + r" \\", r"\midrule"]
    for row in rows:
        found = [_latex(estimate(row["metrics"][m])) if m in row["metrics"] else "-" for m in metrics]
        lines.append(" & ".join([_latex(row["cell"]), *found]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c) or (f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def _write_tables(results: Results, folder: Path) -> list[Path]:
    written = []
    frames = {"runs": results.runs_frame, "cells": results.cells_frame, "pairs": results.pairs_frame}
    frames |= {"prompts": results.prompts_frame, "curves": results.curves_frame}
    for name, frame in frames.items():
        write_atomically(folder / f"{name}.csv", partial(frame.to_csv, index=False))
        write_atomically(folder / f"{name}.parquet", partial(frame.to_parquet, index=False))
        written += [folder / f"{name}.csv", folder / f"{name}.parquet"]
    for setup in results.setups:
        cells = results.cells_frame[results.cells_frame["setup"] == setup]
        rows = [_row(cells, str(cell)) for cell in dict.fromkeys(cells["cell"])]
        text = latex_table(rows, [m for m in (results.reward(setup), results.diversity(setup)) if m])
        file = folder / f"{drawing.slug(setup)}.tex"
        _write(file, text)
        written.append(file)
    return written


def _write(file: Path, text: str) -> None:
    write_atomically(file, lambda p: p.write_text(text, encoding="utf-8"))


def _svg_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    with plt.rc_context(drawing.PAPER):
        figure.savefig(buffer, format="svg")
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _data_uri(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
