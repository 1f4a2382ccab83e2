"""The report of a comparison: one self-contained HTML page, Markdown, tables and plots, from records alone."""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import pandas as pd
from markupsafe import Markup
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from alignbench.analysis.contrasts import families
from alignbench.analysis.modes import first_distributions
from alignbench.analysis.power import POWER
from alignbench.comparison.fronts import read_fronts
from alignbench.comparison.reading import read_results
from alignbench.comparison.results import BASE, Results
from alignbench.figures.metric_names import axis_name, explained, meanings
from alignbench.figures.style import left_out, save
from alignbench.files.escaping import markdown, slugs, visible
from alignbench.files.writing import PATIENCE, REPORT_LOCK, exclusive, own_folders, refuse_foreign, write_atomically
from alignbench.files.yaml_files import parse
from alignbench.records.diversity import default_diversity
from alignbench.reports.alarms import grouped
from alignbench.reports.contrast_sections import FamilyReport, family_report, joined, joined_frames
from alignbench.reports.curve_report import CurveReport
from alignbench.reports.curve_sections import tables as curve_tables
from alignbench.reports.findings import findings
from alignbench.reports.formatting import contrast, estimate, heading, listed, number, p_value, spent
from alignbench.reports.method_settings import settings_table
from alignbench.reports.plots import comparison_plots
from alignbench.reports.plots.curve_figure import curve_trade_off
from alignbench.reports.plots.gallery import example_sets, gallery, score_text, tree_drawings
from alignbench.reports.plots.trade_off import NARROW, scatter
from alignbench.reports.style import COLUMN, PAPER, TITLES, figure_title, metric_pairs, sampler_of
from alignbench.reports.tables import method_row, protocol_of, write_tables
from alignbench.reports.verdict import verdict

TEMPLATES = Path(__file__).parent / "templates"
PUBLISHED = Path(__file__).parent / "published.yaml"
REPORTS = {
    "report.html": (b'<meta name="generator" content="alignbench">', b"<title>alignbench: comparison of"),
    "report.md": (b"<!-- written by alignbench -->", b"Numbers stand as mean [95 % interval] (n)."),
}
"""A report's pages, and what marks them as alignbench's; the latter mark is that of pages without the former."""
CURVE_FIGURES = 2
"""Metrics of diversity whose curves are drawn, at most."""
ALARM_NOTES = {
    True: "Alarms about diversity compare with the target's front: a loss that the reward itself asks for raises none.",
    False: "Alarms about diversity compare with the base model, since there is no front of the target to compare models with.",
}
LISTED_PAIRS = 200
"""Pairs of methods that a page lists, at most; `tables/pairs.csv` has all."""
FIRST_METRICS = 4
"""Metrics that a table shows at first; the others are shown on request."""
PAGE_WIDTH, FLATTER = 6.2, 0.7
"""Inches: the width of figures on the page, and by what their height grows less than their width."""


@dataclass
class Plots:
    """The plots of a comparison, by setup or family and by name.

    Attributes:
        figures: the figures.
        images: their SVG.
        files: a file of each that was written.
        written: all files, PNG and SVG.
    """

    figures: dict[tuple[str, str], Figure] = field(default_factory=dict)
    images: dict[tuple[str, str], bytes] = field(default_factory=dict)
    files: dict[tuple[str, str], Path] = field(default_factory=dict)
    written: list[Path] = field(default_factory=list)


def write_report(
    folder: Path, *, reward: str | None = None, diversity: str | None = None, refresh: int | None = None
) -> list[Path]:
    """Reads every record below `folder` and writes report.html, report.md, tables/ and plots/ into it; returns the files.

    The plots of a run's own folder stay what they are.

    Args:
        reward, diversity: metrics that are plotted against one another, in place of each setup's first.
        refresh: seconds after which a browser loads the page anew, while runs are at work; None for a page that stays.

    Raises:
        UserError: there is no finished run, or none with such a metric; or a file that alignbench did not write is in the way.
        RunError: a file cannot be written.
    """
    return report_with_plots(folder, reward=reward, diversity=diversity, refresh=refresh)[0]


def report_with_plots(
    folder: Path, *, reward: str | None = None, diversity: str | None = None, refresh: int | None = None
) -> tuple[list[Path], Plots]:
    """Does what `write_report` does, and returns the plots as well."""
    results = read_results(folder, reward=reward, diversity=diversity)
    curves = curve_reports(results)
    with exclusive(folder, REPORT_LOCK, PATIENCE):
        known = refuse_foreign_report(folder)
        own_folders(folder, "tables", *([] if _is_run(folder) else ["plots"]), known=known)
        return _write_report(results, curves, folder, refresh)


def write_plots(folder: Path, *, reward: str | None = None, diversity: str | None = None) -> tuple[list[Path], list[str]]:
    """Draws the plots of a comparison alone; see `write_report`. Also returns a line for each file that is left out."""
    results = read_results(folder, reward=reward, diversity=diversity)
    curves = curve_reports(results)
    with exclusive(folder, REPORT_LOCK, PATIENCE):
        own_folders(folder, "plots", known=any((folder / name).exists() for name in REPORTS))
        reports = [family_report(results, family) for family in families(results)]
        return draw_plots(results, reports, curves, folder / "plots").written, results.unreadable


def curve_reports(results: Results) -> dict[str, CurveReport]:
    """What is said of each setup's curves and front. A front that cannot be read is a line of `results.unreadable`."""
    fronts = read_fronts(results.folder)
    results.unreadable += fronts.unreadable
    return {setup: CurveReport.of(results, setup, fronts) for setup in results.setups}


def _write_report(
    results: Results, curves: Mapping[str, CurveReport], folder: Path, refresh: int | None = None
) -> tuple[list[Path], Plots]:
    reports = [family_report(results, family) for family in families(results)]
    plots = draw_plots(results, reports, curves, None if _is_run(folder) else folder / "plots")
    if not _is_run(folder):
        _remove_former_plots(folder / "plots", plots.written)
    values = {
        "setups": [setup_values(results, setup, folder, plots, curves[setup]) for setup in results.setups],
        "families": [_family_values(report, folder, plots) for report in reports],
        "results": results,
        "published": published(results),
        "base": BASE,
        "refresh": refresh,
    }
    written = []
    for name in REPORTS:
        text = render(f"{name}.jinja", values)
        refuse_foreign(folder / name, *REPORTS[name])
        write_atomically(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))
        written.append(folder / name)
    frames = joined_frames(reports) | joined([report.frames() for report in curves.values()])
    return written + write_tables(results, frames, folder / "tables") + plots.written, plots


def published(results: Results) -> list[dict[str, Any]]:
    """The figures that others published on a model which a run was trained on too."""
    backbones = {
        f"{run.result.run.backbone} {run.result.config.get('backbone')}".lower().replace("_", "-") for run in results.runs
    }
    tables: list[dict[str, Any]] = parse(PUBLISHED.read_text(encoding="utf-8"))
    return [table for table in tables if any(model in backbone for model in table["models"] for backbone in backbones)]


def _remove_former_plots(folder: Path, written: Sequence[Path]) -> None:
    """Removes plots of an earlier report that this one does not have, such as those of another `--diversity`."""
    for file in (*folder.glob("*.*"), *folder.glob("*/*.*")):
        is_plot = file.suffix in (".png", ".svg") and file.name.startswith(tuple(TITLES))
        if is_plot and file not in written and not file.is_symlink():
            file.unlink()


def _is_run(folder: Path) -> bool:
    """Whether it is the folder of a single run, whose own plots a report does not touch."""
    return (folder / "result.json").is_file()


def refuse_foreign_report(folder: Path) -> bool:
    """Raises UserError where a file of the report's name is not a report; returns whether there is a report."""
    for name, marks in REPORTS.items():
        refuse_foreign(folder / name, *marks)
    return any((folder / name).exists() for name in REPORTS)


# ---------------------------------------------------------------------------------------------------- plots


def draw_plots(
    results: Results, reports: Sequence[FamilyReport], curves: Mapping[str, CurveReport], folder: Path | None
) -> Plots:
    """Draws every plot of every setup and family. What cannot be drawn is a line of `results.unreadable`.

    Args:
        folder: where each is written as PNG and SVG; None to draw them for the page alone.
    """
    plots = Plots()
    for setup in results.setups:
        below = None if folder is None else comparison_plots.plots_folder(results, setup, folder)
        for metric, file in slugs(curves[setup].diversities[:CURVE_FIGURES]).items():
            with left_out(f"plot curve_trade_off_{file} of {setup}", results.unreadable.append):
                drawn = curve_trade_off(curves[setup], metric)
                if drawn is not None:
                    _add_plot(plots, (setup, f"curve_trade_off_{file}"), drawn, below)
        for name, figure in comparison_plots.comparison_figures(results, setup).items():
            with left_out(f"plot {name} of {setup}", results.unreadable.append):
                _add_plot(plots, (setup, name), figure, below)
    names = slugs(report.name for report in reports)
    for report in reports:
        with left_out(f"plot reward_kl of {report.name}", results.unreadable.append):
            frontier = report.frontier({setup: curves[setup].front for setup in report.titles})
            if frontier is not None:
                name = "reward_kl" if len(reports) == 1 else f"reward_kl_{names[report.name]}"
                _add_plot(plots, (f"family {report.name}", name), frontier, folder)
    return plots


def _add_plot(plots: Plots, key: tuple[str, str], figure: Figure, folder: Path | None) -> None:
    """Saves a figure as SVG for the page, and as PNG and SVG for a paper into the folder."""
    images, plots.figures[key] = {}, figure
    resizable = figure.get_layout_engine() is not None and figure.get_figwidth() == COLUMN
    with plt.rc_context(PAPER):
        for kind in () if folder is None else ("svg", "png"):
            images[kind] = drawn(figure, kind)
            figure.set_layout_engine("none")  # the first drawing has laid it out
        if resizable:
            widen(figure)
        plots.images[key] = images["svg"] if images and not resizable else drawn(figure, "svg")
    plt.close(figure)
    for kind, data in images.items():
        file = Path(folder or "") / f"{key[1]}.{kind}"
        write_atomically(file, partial(Path.write_bytes, data=data))
        plots.written.append(file)
        plots.files[key] = file


def widen(figure: Figure) -> None:
    """Gives a figure of a paper's column the width of a page, so that its letters have the size of the page's."""
    figure.set_size_inches(PAGE_WIDTH, figure.get_figheight() * (1 + FLATTER * (PAGE_WIDTH / COLUMN - 1)))
    figure.set_layout_engine("constrained")


def drawn(figure: Figure, kind: str) -> bytes:
    """Draws a figure as a file of a kind, such as `svg`."""
    buffer = io.BytesIO()
    save(figure, buffer, format=kind)
    return buffer.getvalue()


def svg_link(svg: bytes) -> str:
    """An SVG as the link of an image, so that a page needs no file beside it."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


# ---------------------------------------------------------------------------------------------------- pages


def render(template: str, values: dict[str, Any]) -> str:
    """Fills a template; whatever stands in it is escaped for its format, so that a prompt or a name stays text."""
    return _environment(html=".html" in template).get_template(template).render(values | _style_and_script())


@cache
def _environment(*, html: bool) -> jinja2.Environment:
    """The templates of pages, or of other files, each of which is compiled once."""
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
    environment.filters |= {
        "at": lambda key, mapping: mapping[key],
        "at_most": lambda row, count: row[:count],
        "axis_name": axis_name,
        "contrast": contrast,
        "code": _code,
        "link": lambda file: Markup(quote(file)),
        "without": lambda row, start, end: [*row[:start], *row[end:]],
    }
    return environment


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


def setup_values(results: Results, setup: str, folder: Path, plots: Plots, curves: CurveReport | None = None) -> dict[str, Any]:
    """What the templates show of a setup; its curves are read where they are not given."""
    curves = curves or curve_reports(results)[setup]
    reward, diversity = results.reward(setup), results.diversity(setup)
    cells = results.cells_frame[results.cells_frame["setup"] == setup]
    first = results.of(setup)[0].result
    shown = gallery(results, setup)
    pairs = results.pairs_frame
    pairs = pairs[(pairs["setup"] == setup) & pairs["metric"].isin([reward, diversity])]
    both = diversity is not None and len(metric_pairs(cells, diversity, reward)) > 0
    metrics = results.table_metrics(setup)
    target = curves.target_line(diversity) if diversity else []
    samplers = {sampler_of(run.cell) for run in results.of(setup)}
    table_rows = [method_row(cells, str(cell)) for cell in dict.fromkeys(cells["cell"])]
    return {
        "name": setup,
        "reward": reward,
        "diversity": diversity,
        "axes": {name: axis_name(name) for name in (reward, diversity) if name},
        "verdict": verdict(results, setup, curves),
        "findings": findings(results, setup, curves),
        "meanings": meanings(metrics),
        "tables": curve_tables(curves),
        "settings": settings_table(results, setup),
        "metrics": {name: heading(name, first.metrics[name]) for name in metrics},
        "first_metrics": _first_metrics(results, setup, curves),
        "rows": table_rows,
        "usual_n": Counter(row["n"] for row in table_rows if row["cell"] != BASE).most_common(1)[0][0],
        "best": {metric: _best(cells, metric) for metric in metrics},
        "plot": scatter(cells, reward, diversity, target) if diversity and both else None,
        "narrow_plot": scatter(cells, reward, diversity, target, NARROW) if diversity and both else None,
        "sampler": samplers.pop() if len(samplers) == 1 else None,
        # The page has a trade-off plot and images of its own.
        "figures": _figures(plots, setup, leave_out=("trade_off", "images", "curve_trade_off")),
        "has_curves": curves.comparable,
        "curve_figures": _figures(plots, setup, only="curve_trade_off"),
        "files": _files(plots, setup, folder),
        "images": {cell: [[_data_uri(image) for image in block] for block in blocks] for cell, blocks in shown.images.items()},
        "image_scores": {cell: [list(map(score_text, block)) for block in blocks] for cell, blocks in shown.scores.items()},
        "kept_no_images": not shown.images and _kept_no_images(results, setup),
        "prompts": shown.prompts,
        "trees": {cell: _data_uri(tree) for cell, tree in tree_drawings(results, setup).items()},
        "pairs": pairs.head(LISTED_PAIRS).to_dict("records"),
        "pairs_count": len(pairs),
        "protocol": protocol_of(results, setup),
        "alarms": grouped(curves.alarms),
        "alarm_note": _alarm_note(curves),
        "diversity_section": _diversity_values(results, setup, curves),
    }


def _kept_no_images(results: Results, setup: str) -> bool:
    """Whether the runs of a setup draw images and were told to keep none; runs of a toy problem keep distributions instead."""
    of_setup = results.of(setup)
    return not any(run.result.config.get("save_images", True) for run in of_setup) and not first_distributions(results, setup)


def _diversity_values(results: Results, setup: str, curves: CurveReport) -> dict[str, Any] | None:
    """What the section about diversity shows; None without a metric of diversity."""
    metric = results.diversity(setup)
    if metric is None:
        return None
    higher = curves.directions.get(metric) is not False
    examples = example_sets(results, setup, metric, higher_is_better=higher)
    images = {} if examples is None else {cell: [_data_uri(i) for i in row] for cell, row in examples.images.items()}
    recorded = results.table_metrics(setup)
    return {
        "explained": explained(metric),
        "is_default": metric == default_diversity(results.of(setup)[0].result.metrics),
        "metrics": [m for m in dict.fromkeys([metric, *curves.diversities]) if m in recorded],
        "examples": examples,
        "images": images,
    }


def _first_metrics(results: Results, setup: str, curves: CurveReport) -> list[str]:
    """The metrics that tables show at first: the two axes, another one of diversity, and a judge."""
    metrics = results.table_metrics(setup)
    axes = [curves.reward, *filter(None, [curves.diversity])]
    wanted = [*axes, *[m for m in curves.diversities if m not in axes][:1], *curves.judges, *metrics]
    return [metric for metric in dict.fromkeys(wanted) if metric in metrics][:FIRST_METRICS]


def _best(cells: pd.DataFrame, metric: str) -> str | None:
    """The cell with the best mean of a metric, base model included; None without a direction or a difference."""
    rows = cells[cells["metric"] == metric].dropna(subset=["mean"])
    higher = rows["higher_is_better"].iloc[0] if len(rows) else None
    if higher is None or rows["mean"].nunique() < 2:
        return None
    return str(rows["cell"].iloc[int(rows["mean"].argmax() if higher else rows["mean"].argmin())])


def _alarm_note(curves: CurveReport) -> str:
    """What alarms about diversity compare with, and how large a fall they see."""
    note = ALARM_NOTES[curves.comparable_front is not None]
    if curves.alarm_power is None:
        return note
    prompts, fall = curves.alarm_power
    what = f"a fall of {number(fall)} in {axis_name(str(curves.diversity))}"
    return f"{note} With {prompts} prompts the test finds {what} in {100 * POWER:.0f} % of runs; smaller ones may raise none."


def _family_values(report: FamilyReport, folder: Path, plots: Plots) -> dict[str, Any]:
    """What the templates show of a family of setups."""
    key = f"family {report.name}"
    return {
        "name": report.name,
        "sections": report.sections,
        "first_metrics": FIRST_METRICS,
        "details": report.details,
        "figures": _figures(plots, key),
        "files": _files(plots, key, folder),
    }


def _figures(plots: Plots, owner: str, leave_out: Sequence[str] = (), only: str = "") -> Mapping[str, str]:
    """Title -> SVG as a link, of the plots of a setup or family, but for those whose name begins with one of `leave_out`."""
    images = {name: svg for (of, name), svg in plots.images.items() if of == owner and name.startswith(only)}
    images = {name: svg for name, svg in images.items() if not name.startswith(tuple(leave_out))}
    return {figure_title(name): svg_link(svg) for name, svg in images.items()}


def _files(plots: Plots, owner: str, folder: Path) -> Mapping[str, str]:
    """Title -> path of the PNG below the folder, of the plots of a setup or family."""
    files = {name: file.relative_to(folder) for (of, name), file in plots.files.items() if of == owner}
    return {figure_title(name): file.with_suffix(".png").as_posix() for name, file in files.items()}


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
