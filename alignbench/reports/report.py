"""The report of a comparison: one self-contained HTML page, Markdown, tables; all from records alone."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import pandas as pd
from markupsafe import Markup
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from alignbench.figures.plots import left_out, save
from alignbench.files.escaping import csv_frame, latex, markdown, visible
from alignbench.files.writing import PATIENCE, REPORT_LOCK, exclusive, own_folders, refuse_foreign, write_atomically
from alignbench.files.yaml_files import parse
from alignbench.records.record import MetricRecord
from alignbench.records.results import BASE, SPENT, Results, read_results
from alignbench.reports import comparison_plots as drawing

LEVEL = 0.05
SMALLEST_SHOWN = 1e-15
"""Of p values: below it a test's assumptions are worth less than its digits."""
ARROWS = {True: "↑", False: "↓", None: ""}
"""Where better is."""
FEW_SEEDS = 5
"""Below so many a difference that is there will often not be beyond chance."""
LISTED = 6
"""Differences between methods that the verdict names; the table of pairs has all."""
TEMPLATES = Path(__file__).parent / "templates"
PUBLISHED = Path(__file__).parent / "published.yaml"
FRAME = (86.0, 12.0, 464.0, 300.0)
"""Left, top, width and height of the trade-off plot's axes, in its own units."""
REPORTS = {
    "report.html": (b'<meta name="generator" content="alignbench">', b"<title>alignbench: comparison of"),
    "report.md": (b"<!-- written by alignbench -->", b"Numbers stand as mean [95 % interval] (n)."),
}
"""A report's pages, and what marks them as alignbench's; the latter mark is that of pages without the former."""
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


def write_report(folder: Path, *, reward: str | None = None, diversity: str | None = None) -> list[Path]:
    """Reads every record below `folder` and writes report.html, report.md, tables/ and plots/ into it; returns the files.

    The plots of a run's own folder stay what they are.

    Args:
        reward, diversity: metrics that are shown against one another, in place of each setup's first.

    Raises:
        UserError: there is no finished run, or none with such a metric; or a file that alignbench did not write is in the way.
        RunError: a file cannot be written.
    """
    results = read_results(folder, reward=reward, diversity=diversity)
    with exclusive(folder, REPORT_LOCK, PATIENCE):
        known = _refuse_foreign_report(folder)
        of_run = (folder / "result.json").is_file()  # whose plots stay what they are
        own_folders(folder, "tables", *([] if of_run else ["plots"]), known=known)
        return _write_report(results, folder)


def _write_report(results: Results, folder: Path) -> list[Path]:
    plots = [] if (folder / "result.json").is_file() else drawing.plot_comparison(results, folder / "plots")
    values = {
        "setups": [_setup(results, setup, folder, plots) for setup in results.setups],
        "results": results,
        "published": parse(PUBLISHED.read_text(encoding="utf-8")),
        "base": BASE,
    }
    written = []
    for name in REPORTS:
        text = render(f"{name}.jinja", values)
        refuse_foreign(folder / name, *REPORTS[name])
        _write(folder / name, text)
        written.append(folder / name)
    return written + _write_tables(results, folder / "tables") + plots


def write_plots(folder: Path, *, reward: str | None = None, diversity: str | None = None) -> tuple[list[Path], list[str]]:
    """Draws the plots of a comparison alone; see `write_report`. Also returns a line for each file that is left out."""
    results = read_results(folder, reward=reward, diversity=diversity)
    with exclusive(folder, REPORT_LOCK, PATIENCE):
        own_folders(folder, "plots", known=any((folder / name).exists() for name in REPORTS))
        return drawing.plot_comparison(results, folder / "plots"), results.unreadable


def _refuse_foreign_report(folder: Path) -> bool:
    """Raises UserError where a file of the report's name is not a report; returns whether there is a report."""
    for name, marks in REPORTS.items():
        refuse_foreign(folder / name, *marks)
    return any((folder / name).exists() for name in REPORTS)


def render(template: str, values: dict[str, Any]) -> str:
    """Fills a template; whatever stands in it is escaped for its format, so that a prompt or a name stays text."""
    html = ".html" in template
    escape = visible if html else markdown
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=html,
        finalize=lambda value: escape(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "p_value": p_value, "estimate": estimate, "spent": spent, "listed": listed}
    environment.filters |= {"code": _code, "link": lambda file: Markup(quote(file))}
    return environment.get_template(template).render(values | _style_and_script())


def _style_and_script() -> dict[str, Markup]:
    """What a page looks like and does, and the policy that lets a browser load and run these and nothing else."""
    style, script = ((TEMPLATES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    sources = (f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'" for text in (style, script))
    parts = zip(("style-src", "script-src"), sources, strict=True)
    only = ["default-src 'none'", "img-src data:", *map(" ".join, parts), "base-uri 'none'", "form-action 'none'"]
    return {"style": Markup(style), "script": Markup(script), "policy": Markup("; ".join(only))}


def _code(command: str) -> Markup:
    """A line of an indented block of code, in which Markdown reads nothing."""
    return Markup(visible(" ".join(command.split())))


def verdict(results: Results, setup: str) -> list[str]:
    """What the setup's records show, in sentences: the front, what is beyond chance, alarms."""
    reward, diversity = results.reward(setup), results.diversity(setup)
    cells = results.cells_frame[results.cells_frame["setup"] == setup]
    sentences = []
    if diversity:
        points = drawing.metric_pairs(cells, diversity, reward)
        front = ", ".join(str(c) for c in points.index[points["front"]]) or "nothing"
        sentences.append(f"On the front of {reward} and {diversity}, by their means: {front}.")
        sentences += _beaten(results, setup, [str(c) for c in points.index[~points["front"]]], reward, diversity)
    else:
        sentences.append("No diversity metric was recorded, so there is no trade-off to show.")
    for metric in (reward, *([diversity] if diversity else [])):
        sentences += _differences(results, setup, metric)
    if 1 < cells.loc[cells["cell"] != BASE, "seeds"].min() < FEW_SEEDS:
        few = drawing.seeds_of(cells)
        sentences.append(f"{few} a method: a difference that is not beyond chance here may still be there.")
    sentences += _moved(cells)
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
    return tested.assign(high=high, low=low, better=better, worse=worse, clear=tested["p_holm"] < LEVEL)


def _beaten(results: Results, setup: str, behind: list[str], reward: str, diversity: str) -> list[str]:
    """Which cells behind the front another one beats beyond chance in both; nothing where nothing can be tested."""
    tests = [_tested(results, setup, metric) for metric in (reward, diversity)]
    if not behind or any(tested.empty for tested in tests):
        return []
    clear = [{(row["better"], row["worse"]) for row in tested[tested["clear"]].to_dict("records")} for tested in tests]
    by = {worse: better for better, worse in sorted(clear[0] & clear[1])}
    found = ", ".join(f"{cell} (by {by[cell]})" for cell in behind if cell in by)
    return [f"Beaten in both beyond chance: {found or 'none, so that what stands behind the front may belong to it'}."]


def _differences(results: Results, setup: str, metric: str) -> list[str]:
    tested = _tested(results, setup, metric)
    if tested.empty:
        why = "two seeds of a cell are needed, whose values differ; intervals over prompts hold for these trained models alone"
        return [f"{metric}: nothing can be said about chance from training to training ({why})."]
    clear, count = int(tested["clear"].sum()), f"{len(tested)} tested differences"
    how = f"Welch's test over {drawing.seeds_of(results.runs_frame.query('setup == @setup'))} a method, Holm-corrected"
    if not clear:
        return [f"{metric}: none of {count} is beyond chance ({how})."]
    said = [f"{metric}: {clear} of {count} are beyond chance ({how})."]
    to_base = tested[(tested["first"] == BASE) | (tested["second"] == BASE)]
    for side, other, word in (("high", "low", "above"), ("low", "high", "below")):
        rows = to_base[to_base["clear"] & (to_base[other] == BASE)]
        if len(rows):
            listed = ", ".join(f"{row[side]} ({_by(row)})" for row in rows.to_dict("records"))
            said.append(f"{metric} is {word} the base model's for {listed}.")
    between = tested.drop(to_base.index)
    surest = between[between["clear"]].sort_values("p_holm", kind="stable").to_dict("records")
    if surest:
        listed = "; ".join(f"{row['high']} above {row['low']} ({_by(row)})" for row in surest[:LISTED])
        more = f"; {len(surest) - LISTED} more in the table of pairs" if len(surest) > LISTED else ""
        said.append(f"{metric} between methods: {listed}{more}.")
    elif len(between):
        said.append(f"{metric} between methods: no difference is beyond chance.")
    return said


def _by(row: dict[Any, Any]) -> str:
    size, ends = abs(row["difference"]), sorted(row[f"difference_{end}"] for end in ("lower", "upper"))
    low, high = ends if row["difference"] > 0 else (-ends[1], -ends[0])
    return f"by {number(size)} [{number(low)}, {number(high)}], {_equals(row['p_holm'])}"


def _equals(p: float) -> str:
    return f"p {'' if p < SMALLEST_SHOWN else '= '}{p_value(p)}"


def _moved(cells: pd.DataFrame) -> list[str]:
    """How far the methods went from the base model: at unequal distances, diversity alone says little."""
    for metric in drawing.DISTANCES:
        rows = cells[(cells["metric"] == metric) & (cells["cell"] != BASE)].dropna(subset=["mean"])
        if len(rows) > 1:
            near, *_, far = rows.sort_values("mean").to_dict("records")
            ends = " to ".join(f"{estimate(row)} for {row['cell']}" for row in (near, far))
            why = "what moved less keeps diversity for free, so compare at equal distance"
            return [f"The distance from the base model, {metric}, goes from {ends}: {why}."]
    return []


def _setup(results: Results, setup: str, folder: Path, plots: Sequence[Path]) -> dict[str, Any]:
    """What the templates show of a setup.

    Args:
        plots: files that were drawn; their SVGs go into the page. Without any, they are drawn for the page alone.
    """
    reward, diversity = results.reward(setup), results.diversity(setup)
    cells = results.cells_frame[results.cells_frame["setup"] == setup]
    first = results.of(setup)[0].result
    rows, texts = drawing.gallery(results, setup)
    pictures = {cell: [_data_uri(p) for p in found] for cell, found in rows.items()}
    own = drawing.plots_folder(results, setup, folder / "plots")
    files = [file for file in plots if file.parent == own and file.suffix == ".svg"]
    figures = {file.stem: _svg_uri(file.read_bytes()) for file in files}
    if not files:
        for name, figure in drawing.comparison_figures(results, setup).items():
            with left_out(f"plot {name} of {setup}", results.unreadable.append):
                figures[name] = _svg_uri(_svg(figure))
    pairs = results.pairs_frame
    both = diversity is not None and len(drawing.metric_pairs(cells, diversity, reward)) > 0
    return {
        "name": setup,
        "reward": reward,
        "diversity": diversity,
        "verdict": verdict(results, setup),
        "metrics": {name: heading(name, metric) for name, metric in first.metrics.items()},
        "rows": [_row(cells, str(cell)) for cell in dict.fromkeys(cells["cell"])],
        "plot": scatter(cells, reward, diversity) if diversity and both else None,
        # The page has a trade-off plot and pictures of its own.
        "figures": {drawing.figure_title(name): uri for name, uri in figures.items() if name not in ("trade_off", "pictures")},
        "files": {drawing.figure_title(f.stem): f.relative_to(folder).with_suffix(".png").as_posix() for f in files},
        "pictures": pictures,
        "prompts": texts,
        "trees": {cell: _data_uri(tree) for cell, tree in drawing.tree_drawings(results, setup).items()},
        "pairs": pairs[(pairs["setup"] == setup) & pairs["metric"].isin([reward, diversity])].to_dict("records"),
        "protocol": _protocol(results, setup),
        "alarms": [(run.cell, run.result.run.seed, alarm) for run in results.of(setup) for alarm in run.result.alarms],
    }


def _protocol(results: Results, setup: str) -> dict[str, Any]:
    """How its models were judged, and what they were trained with."""
    runs = results.of(setup)
    seeds = sorted({run.result.run.seed for run in runs})
    return {**runs[0].result.protocol.model_dump(mode="json"), "training seeds": ", ".join(map(str, seeds))}


def _row(cells: pd.DataFrame, cell: str) -> dict[str, Any]:
    part = cells[cells["cell"] == cell].set_index("metric")
    return {
        "cell": cell,
        "metrics": part.to_dict("index"),
        "seeds": int(part["seeds"].iloc[0]),
        **{name + end: float(part[name + end].iloc[0]) for name in SPENT for end in ("", "_min", "_max")},
    }


def heading(name: str, metric: MetricRecord) -> str:
    """A metric's name, with where better is, and whether it was trained on."""
    return " ".join([name, *ARROWS[metric.higher_is_better], *(["(trained on)"] if metric.role == "reward" else [])])


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
    more_is_better = drawing.sign(cells, diversity) > 0
    corners = [(x, below) if more_is_better else (right, y) for (x, y), (right, below) in pairwise(front)]
    line = [point for both in zip_longest(front, corners) for point in both if point]
    return {"marks": marks, "ticks": ticks, "front": " ".join(f"{x},{y}" for x, y in line), "frame": FRAME}


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
    """Four digits, those before the point in full, or a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def p_value(p: float) -> str:
    """No p value is 0, and where there is no test none is made up."""
    if math.isnan(p):
        return "cannot be told"
    return f"{p:.2g}" if p >= SMALLEST_SHOWN else f"< {SMALLEST_SHOWN:.0g}"


def estimate(row: Mapping[Any, Any], name: str = "mean") -> str:
    """`0.12 [0.08, 0.16] (n = 5 seeds)`: never a mean without its interval and n."""
    value, lower, upper, n = (row[name + end] for end in ("", "_lower", "_upper", "_n"))
    if math.isnan(value):
        return "-"
    over = row.get("over", "seeds") if name != "iqm" else "seeds"
    interval = f"[{number(lower)}, {number(upper)}]" if math.isfinite(lower) and math.isfinite(upper) else "[no interval]"
    return f"{number(value)} {interval} ({_counted(n, over)})"


def spent(row: Mapping[str, Any], name: str) -> str:
    """`5.3 (4.9 to 6.1, n = 3 seeds)`: what a cell took on average, and its seeds where they differ."""
    lowest, highest = (number(row[name + end]) for end in ("_min", "_max"))
    several = f" ({lowest} to {highest}, {_counted(row['seeds'], 'seeds')})" if lowest != highest else ""
    return number(row[name]) + several


def _counted(n: float, over: str) -> str:
    return f"n = {n:.0f} {over if n != 1 else over.removesuffix('s')}"


def listed(value: Any) -> str:
    """Keys and values in a line, nested ones in brackets."""
    if not isinstance(value, Mapping):
        return str(value) or '""'
    found = {k: f"({listed(v)})" if isinstance(v, Mapping) else listed(v) for k, v in value.items() if v != {}}
    return ", ".join(f"{k} {v}" for k, v in found.items())


def latex_table(rows: Sequence[dict[str, Any]], metrics: Mapping[str, str], about: str) -> str:
    """A booktabs table of means with intervals and n; every name is escaped.

    Args:
        metrics: those that are shown, with their headings.
        about: a line for its first comment.
    """
    head = " & ".join(["Method", *map(latex, metrics.values())])
    lines = [f"% {visible(' '.join(about.split()))}", r"% Mean [95 % interval] (n); needs \usepackage{booktabs}."]
    lines += [rf"\begin{{tabular}}{{l{'l' * len(metrics)}}}", r"\toprule", head + r" \\", r"\midrule"]
    for row in rows:
        found = [latex(estimate(row["metrics"][m])) if m in row["metrics"] else "-" for m in metrics]
        lines.append(" & ".join([latex(row["cell"]), *found]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _write_tables(results: Results, folder: Path) -> list[Path]:
    written = []
    frames = {"runs": results.runs_frame, "cells": results.cells_frame, "pairs": results.pairs_frame}
    frames |= {"prompts": results.prompts_frame, "curves": results.curves_frame, "images": results.images_frame}
    volumes = {setup: drawing.setup_hypervolumes(results, setup) for setup in results.setups if results.diversity(setup)}
    if volumes:
        frames["hypervolumes"] = pd.concat(volumes, names=["setup"]).reset_index("setup")
    for name, frame in frames.items():
        write_atomically(folder / f"{name}.csv", partial(csv_frame(frame).to_csv, index=False))
        write_atomically(folder / f"{name}.parquet", partial(frame.to_parquet, index=False))
        written += [folder / f"{name}.csv", folder / f"{name}.parquet"]
    for setup in results.setups:
        cells = results.cells_frame[results.cells_frame["setup"] == setup]
        rows = [_row(cells, str(cell)) for cell in dict.fromkeys(cells["cell"])]
        metrics = results.of(setup)[0].result.metrics
        shown = {m: heading(m, metrics[m]) for m in (results.reward(setup), results.diversity(setup)) if m}
        text = latex_table(rows, shown, f"{setup}: {listed(_protocol(results, setup))}")
        file = folder / f"{results.file_names[setup]}.tex"
        _write(file, text)
        written.append(file)
    return written


def _write(file: Path, text: str) -> None:
    write_atomically(file, lambda p: p.write_text(text, encoding="utf-8"))


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with plt.rc_context(drawing.PAPER):
        save(figure, buffer, format="svg")
    return buffer.getvalue()


def _svg_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
