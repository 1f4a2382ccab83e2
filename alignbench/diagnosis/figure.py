"""The figure of a diagnosis: all its numbers with 95 % intervals."""

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from alignbench.diagnosis.record import Diagnosis
from alignbench.figures.style import COLORS, STYLE, draw_estimates, legend_name
from alignbench.files.escaping import visible


def draw(diagnosis: Diagnosis) -> Figure:
    """Draws five panels: distances, prefix entropy, total variation distance, and bias and deviation of log Z_hat."""
    sampler = legend_name(visible(diagnosis.sampler))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplot_mosaic("AABBCC;DDDEEE", figsize=(9, 5), layout="constrained")
        _draw_distances(axes["A"], diagnosis, sampler)
        _draw_entropy(axes["B"], diagnosis)
        _draw_total_variation(axes["C"], diagnosis)
        _draw_bias(axes["D"], diagnosis, sampler)
        _draw_deviation(axes["E"], diagnosis, sampler)
        of = f"{len(diagnosis.prompts)} prompts x {diagnosis.groups} groups of {diagnosis.group_size} leaves"
        figure.suptitle(f"{sampler} on {visible(diagnosis.backbone)}, {of}; bars are 95 % intervals", fontsize=9)
    return figure


def _draw_distances(axis: Any, diagnosis: Diagnosis, sampler: str) -> None:
    places = range(len(diagnosis.distances))
    draw_estimates(axis, places, [d.sampler for d in diagnosis.distances], label=sampler, color=COLORS[0])
    draw_estimates(axis, places, [d.independent for d in diagnosis.distances], label="independent", color=COLORS[1])
    axis.set(xticks=places, xticklabels=[d.apart_since for d in diagnosis.distances], xlim=(-0.5, len(places) - 0.5))
    axis.set(xlabel="where the two leaves diverge", ylim=(0, None), ylabel="distance |z - z'| / sqrt(D)")
    axis.set_title("distance between two leaves of a group")
    axis.legend()


def _draw_entropy(axis: Any, diagnosis: Diagnosis) -> None:
    places = range(len(diagnosis.prefix_entropy))
    draw_estimates(axis, places, [e.policy for e in diagnosis.prefix_entropy], label="p (policy)", color=COLORS[0])
    label = f"q (target, beta = {diagnosis.beta:g})"
    draw_estimates(axis, places, [e.target for e in diagnosis.prefix_entropy], label=label, color=COLORS[1])
    prefixes = [str(e.prefixes) for e in diagnosis.prefix_entropy]
    axis.set(xticks=places, xticklabels=prefixes, xlim=(-0.5, len(places) - 0.5), ylim=(0, 1.05))
    axis.set(xlabel="number of prefixes", ylabel="entropy / maximum", title="entropy of the mass over prefixes")
    axis.legend()


def _draw_total_variation(axis: Any, diagnosis: Diagnosis) -> None:
    variation = diagnosis.total_variation
    draw_estimates(axis, [0, 1], [variation.leaf, variation.group], color=COLORS[0])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xticks=[0, 1], xticklabels=["single leaves", "whole groups"], xlim=(-0.5, 1.5), ylim=(-0.15, 1.05))
    axis.set(ylabel="total variation (lower bound)", title="distance to independent groups")


def _draw_bias(axis: Any, diagnosis: Diagnosis, sampler: str) -> None:
    _draw_by_size(axis, diagnosis, "bias", sampler)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(ylabel="E[log Z_hat] - log Z (nats)", title="bias of log Z_hat")
    axis.legend()


def _draw_deviation(axis: Any, diagnosis: Diagnosis, sampler: str) -> None:
    _draw_by_size(axis, diagnosis, "deviation", sampler)
    axis.set(ylabel="standard deviation (nats)", title="standard deviation of log Z_hat")
    first, sizes = diagnosis.partition[0].independent_deviation.value, [p.k for p in diagnosis.partition]
    if first:
        axis.set_yscale("log")
        for set_formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            set_formatter(ScalarFormatter())
        guide = [first * (size / sizes[0]) ** -0.5 for size in sizes]
        axis.plot(sizes, guide, color="#999999", linestyle=":", label="proportional to 1 / sqrt(K)")
    axis.legend()


def _draw_by_size(axis: Any, diagnosis: Diagnosis, quantity: str, sampler: str) -> None:
    sizes = [p.k for p in diagnosis.partition]
    for name, label, color in (("sampler", sampler, COLORS[0]), ("independent", "independent", COLORS[1])):
        estimates = [getattr(p, f"{name}_{quantity}") for p in diagnosis.partition]
        draw_estimates(axis, sizes, estimates, label=label, color=color, linestyle="-")
    axis.axvline(diagnosis.group_size, color="#999999", linewidth=0.8)
    axis.set(xscale="log", xlabel="number of leaves K (right of the line: several groups)")
    axis.set(xticks=sizes, xticklabels=[str(size) for size in sizes])
    axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
