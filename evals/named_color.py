"""named_color: whether a model can draw a colour when the prompt names it.

The counterpart of the metrics of diversity, which say what a model does where the prompt leaves the colour open: a model that
always draws red words may still draw blue ones when asked, or may have forgotten how.

    named_color          the share of a prompt's images in which the word, or the first shape, has the colour that is named
    named_color_COLOUR   the same for prompts that name this colour (with `by_color`), so that a colour that is lost is not
                         averaged away

An image in which nothing is found counts as a miss. Colours are read as by `mode_coverage`.

Source: the "can it" half of DIM-CIM (arXiv 2506.05108), with exact colours in place of a judging model.
"""

from typing import Any

import numpy as np

from alignbench import SetMetric, settings
from evals.mode_coverage import colors_of_subject, subject_of


def color_named_by(prompt: str) -> str | None:
    """Tells which colour a prompt gives its word or its first shape; None if it names none, or several for a word."""
    named = colors_of_subject(prompt)
    return next(iter(named)) if len(named) == 1 else None


class NamedColor(SetMetric):
    """Share of images in the colour that the prompt names."""

    class Settings(settings.Settings):
        by_color: bool = False
        """Whether each colour has a metric of its own as well. It needs many prompts, since each names one colour."""

    settings: Settings
    fewest = 1

    def measure(self, images: np.ndarray, latents: Any, prompt: str) -> dict[str, float]:
        """Measures the images of one prompt; NaN for prompts that name no colour."""
        asked = color_named_by(prompt)
        subject = None if asked is None else subject_of(images, prompt)
        if subject is None:
            return {"named_color": float("nan")}
        drawn = [found is not None and found["color"] == asked for found in subject.detections]
        share = float(np.mean(drawn))
        return {"named_color": share} | ({f"named_color_{asked}": share} if self.settings.by_color else {})

    def higher_is_better(self, metric: str) -> bool | None:
        """Tells the direction of a metric: none for single colours, which would only repeat its alarms."""
        return True if metric == "named_color" else None
