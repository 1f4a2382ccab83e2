"""The forms in which a reading and its target are compared."""

from typing import Literal

from alignbench.files.text import normal_form, plain_form

Score = Literal["flow_grpo", "tmpo"]
"""Which similarity is computed; see `evals.ocr.similarity`."""


def normalised(text: str) -> str:
    """Converts a text to the normal form in which case and white space do not count (see `alignbench.files.text`).

    Of printable ASCII that is the lower case without spaces.
    """
    return "".join(normal_form(text).split())


def compared_form(text: str, score: Score) -> str:
    """Converts a text to the form that a score compares: `normalised`, or for `tmpo` one with its case and inner spaces."""
    return normalised(text) if score == "flow_grpo" else plain_form(text).strip()
