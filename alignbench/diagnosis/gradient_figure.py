"""The figure of gradient estimates: a row for each trial, with 95 % intervals."""

from collections.abc import Callable

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from alignbench.diagnosis.record import GradientDiagnosis, GradientTrial
from alignbench.figures.style import COLORS, STYLE, draw_estimates
from alignbench.files.escaping import visible
from alignbench.records.record import Estimate

ROW = 0.2
"""Height of a row in inches."""
PANELS: tuple[tuple[str, str, Callable[[GradientTrial], Estimate]], ...] = (
    ("cosine to the exact gradient", "1 is the claimed direction", lambda t: t.cosine),
    ("relative bias", "part that no learning rate corrects", lambda t: t.relative_bias),
    ("signal-to-noise ratio", "of one gradient estimate", lambda t: t.snr),
)


def draw(diagnosis: GradientDiagnosis) -> Figure:
    """Draws three panels: cosine, relative bias and signal-to-noise ratio. Each objective has a colour."""
    trials = diagnosis.trials
    objectives = list(dict.fromkeys(t.objective for t in trials))
    places = np.arange(len(trials))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(PANELS), sharey=True, figsize=(9, 1.2 + ROW * len(trials)), layout="constrained", squeeze=False
        )
        for axis, (title, meaning, statistic) in zip(axes[0], PANELS, strict=True):
            for i, objective in enumerate(objectives):
                own = [at for at, t in enumerate(trials) if t.objective == objective]
                estimates = [statistic(trials[at]) for at in own]
                draw_estimates(axis, own, estimates, horizontal=True, capsize=2, color=COLORS[i % len(COLORS)])
            axis.set(title=title, xlabel=meaning)
        axes[0, 0].set(yticks=places, yticklabels=[_name(t) for t in trials], ylim=(len(trials) - 0.5, -0.5))
        axes[0, 0].axvline(1, color="black", linewidth=0.8)
        axes[0, 1].set(xlim=(-0.03, 1.03))
        axes[0, 2].set(xlim=(0, None))
        at = f"iteration {diagnosis.iteration}" if diagnosis.checkpoint else "the base model"
        of_what = f"gradients on {visible(diagnosis.backbone)}, task {visible(diagnosis.task)}, at {at}"
        figure.suptitle(f"{of_what}; {diagnosis.repetitions} estimates each; bars are 95 % intervals", fontsize=9)
    return figure


def _name(trial: GradientTrial) -> str:
    return visible(f"{trial.objective}, {trial.sampler}, {trial.noise}, K = {trial.leaves}")
