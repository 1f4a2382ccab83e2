"""The figure of a trial: each metric's dose-response curves, what it takes for a loss, and its index."""

from collections.abc import Sequence
from math import ceil
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from alignbench.figures.style import COLORS, STYLE, draw_estimates
from alignbench.files.escaping import visible
from alignbench.statistics import ONE_SIDED_LEVEL
from alignbench.trial.judging import TYPICAL_IMAGES, TYPICAL_PROMPTS
from alignbench.trial.measuring import EXACT
from alignbench.trial.power import effect_with_power
from alignbench.trial.record import Seen, Trial

ACROSS = 4
FEW = 4
"""Of an eval with more metrics than this only the first is drawn in the panels: the others are its parts."""
MARKS = "osD^vPX"
GOOD = 0.8
"""The power whose effect is drawn as a line."""


def draw(trial: Trial) -> Figure:
    """Draws a panel of effect against degree for each planted loss, one of false alarms, and one of Youden's index."""
    typical = [s for s in trial.seen if s.images == TYPICAL_IMAGES]
    planted = list(dict.fromkeys((s.source, s.condition) for s in typical if s.kind == "planted"))
    shown = _shown(trial)
    down = max(1, ceil(len(planted) / ACROSS))
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10, 2.1 * down + 3.6), layout="constrained")
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.1 * down + 0.6, 3.0])[:, 0]
        axes = above.subplots(down, ACROSS, sharex=True, sharey=True, squeeze=False)
        for axis in axes.flat[len(planted) :]:
            axis.set_axis_off()
        for axis, place in zip(axes.flat, planted, strict=False):
            _draw_effects(axis, [s for s in typical if (s.source, s.condition) == place], shown)
            axis.set_title(visible(f"{place[1]} ({place[0]})"))
        if planted:
            title = (
                f"mean difference / standard deviation, {TYPICAL_IMAGES} images of a prompt; below the dotted line a fall is "
                f"reported with probability {GOOD:g} at {TYPICAL_PROMPTS} prompts"
            )
            above.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(shown), title=title)
            above.supxlabel("degree of the collapse", fontsize=8)
        alarms, index = below.subplots(1, 2)
        _draw_alarms(alarms, typical, shown)
        _draw_index(index, trial)
    return figure


def _shown(trial: Trial) -> list[str]:
    """The metrics in the panels: as many as there are colours."""
    wholes = [metric for metrics in trial.metrics.values() for metric in (metrics if len(metrics) <= FEW else metrics[:1])]
    return sorted(wholes, key=lambda metric: metric != EXACT)[: len(COLORS)]


def _draw_effects(axis: Any, seen: Sequence[Seen], shown: Sequence[str]) -> None:
    for i, metric in enumerate(shown):
        of_metric = sorted((s for s in seen if s.metric == metric), key=lambda s: s.degree)
        places = [s.degree + 0.012 * (i - len(shown) / 2) for s in of_metric]
        draw_estimates(axis, places, [s.effect for s in of_metric], label=visible(metric), linestyle="-", **_style(i))
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axhline(effect_with_power(GOOD, TYPICAL_PROMPTS), color="black", linewidth=0.8, linestyle=":")
    axis.set_yscale("symlog", linthresh=1)
    axis.set_yticks([-10, -1, 0, 1], ["-10", "-1", "0", "1"])
    axis.set_yticks([], minor=True)
    axis.set(xticks=[0.25, 0.5, 0.75, 1], ylim=(-30, 3))


def _draw_alarms(axis: Any, seen: Sequence[Seen], shown: Sequence[str]) -> None:
    harmless = list(dict.fromkeys((s.source, s.condition) for s in seen if s.kind != "planted"))
    for i, metric in enumerate(shown):
        of_metric = [s for s in seen if s.metric == metric and s.kind != "planted"]
        places = [harmless.index((s.source, s.condition)) + 0.1 * (i - (len(shown) - 1) / 2) for s in of_metric]
        draw_estimates(axis, places, [s.falls[TYPICAL_PROMPTS] for s in of_metric], label=visible(metric), **_style(i))
    axis.axhline(ONE_SIDED_LEVEL, color="black", linewidth=0.8, linestyle=":")
    labels = [f"{visible(condition)} ({visible(source)})" for source, condition in harmless]
    axis.set_xticks(range(len(harmless)), labels, rotation=40, ha="right")
    axis.set(ylim=(-0.05, 1.05), ylabel="reported falls")
    axis.set_title(f"{TYPICAL_PROMPTS} prompts, changes that are no loss (dots: 2.5 %)")


def _draw_index(axis: Any, trial: Trial) -> None:
    known = [v for v in trial.verdicts if v.youden.value is not None][::-1]
    draw_estimates(axis, range(len(known)), [v.youden for v in known], horizontal=True, **_style(-1))
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(known)), [visible(v.metric) for v in known], fontsize=6)
    axis.set_title("Youden's index: mean power - mean false alarms")


def _style(of: int) -> dict[str, Any]:
    """Colour and marker of a metric, by its place among those in the panels."""
    return {"color": COLORS[of], "marker": MARKS[of], "elinewidth": 0.6, "capsize": 0}
