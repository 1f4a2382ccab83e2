"""Which of a record's diversity metrics is the one to look at."""

from collections.abc import Mapping

from alignbench.records.record import MetricRecord

DIVERSITY = (
    "attribute_difference",
    "mode_coverage",
    "vendi",
    "cosine_diversity",
    "lgmd",
    "pixel_diversity",
    "mode_entropy",
    "modes_covered",
)
"""Diversity metrics, in the order in which a trial with planted losses supports them (docs/evals.md). The first that a setup
has is plotted."""


def default_diversity(metrics: Mapping[str, MetricRecord]) -> str | None:
    """The diversity metric of the axis: the first of `DIVERSITY` that has a value; without one, the first that was recorded.

    A metric of drawn scenes is recorded without a value where no prompt asks for one.
    """
    recorded = [name for name in DIVERSITY if name in metrics]
    return next((name for name in recorded if metrics[name].base.value is not None), next(iter(recorded), None))
