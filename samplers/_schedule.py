"""What the samplers share that follow the training's progress or take a fraction of the steps."""

from math import ceil

ROUNDING = 1e-9
"""What a product may exceed a whole number by without counting as more: 0.28 * 25 is 7 steps, not 8."""


def clamped(progress: float) -> float:
    """Limits the training's progress to 0..1."""
    return min(max(progress, 0.0), 1.0)


def place_at(progress: float, places: int) -> int:
    """Tells which of some equally long intervals of the training the progress is in: 0 to places - 1."""
    return min(int(clamped(progress) * places), places - 1)


def rounded_up(fraction: float, count: int) -> int:
    """Computes a fraction of a count of steps, rounded up."""
    return ceil(fraction * count - ROUNDING)
