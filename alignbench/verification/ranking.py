"""The order of methods in a table of the leaderboard, and which of them are apart beyond chance."""

from collections.abc import Sequence
from itertools import combinations
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np

from alignbench.analysis.against_front import losses_of_cell
from alignbench.comparison.results import Results
from alignbench.frontier.front import Front
from alignbench.reports.formatting import SIGNIFICANT
from alignbench.statistics import holm, mean_of_known, welch


class Ranking(NamedTuple):
    """The methods of a table in their order, the best first.

    Attributes:
        cells: their names.
        values: what each is sorted by, a number for each seed, float [seeds]: its losses, of which less is better, or its
            rewards. A method without any known loss has one NaN.
        groups: letters for each method; two that share one are not apart beyond chance.
        by_loss: whether they are sorted by avoidable loss; otherwise by the reward.
    """

    cells: list[str]
    values: dict[str, np.ndarray]
    groups: dict[str, str]
    by_loss: bool


def ranking(results: Results, setup: str, front: Front | None, diversity: str | None) -> Ranking:
    """Sorts the methods of a setup by the avoidable loss of diversity, or by the reward where no loss is known.

    Args:
        results: the runs.
        setup: the setup.
        front: the front of the tilted target; None without one.
        diversity: the metric whose loss counts.
    """
    cells = list(dict.fromkeys(run.cell for run in results.of(setup)))
    if front is not None and diversity is not None and diversity in front.metrics:
        recorded = {cell: losses_of_cell(results, setup, front, diversity, cell) for cell in cells}
        losses = {cell: np.array([np.nan]) if values is None else values for cell, values in recorded.items()}
        if any((~np.isnan(values)).any() for values in losses.values()):
            return _ranked(losses, by_loss=True)
    reward = results.reward(setup)
    return _ranked({cell: mean_of_known(results.scores(setup, cell, reward), axis=1) for cell in cells}, by_loss=False)


def _ranked(values: dict[str, np.ndarray], *, by_loss: bool) -> Ranking:
    sign = 1.0 if by_loss else -1.0

    def place(cell: str) -> tuple[bool, float]:
        known = values[cell][~np.isnan(values[cell])]
        return not len(known), sign * float(known.mean()) if len(known) else 0.0

    order = sorted(values, key=place)
    letters = letter_groups([values[cell] for cell in order])
    return Ranking(order, values, dict(zip(order, letters, strict=True)), by_loss)


def letter_groups(samples: Sequence[np.ndarray]) -> list[str]:
    """Letters by which ordered methods are grouped: two that share a letter are not apart beyond chance.

    Each pair is tested by Welch's t test over seeds, corrected by Holm's method for all pairs. A pair that cannot be tested,
    for instance because one of them has a single seed, is not apart (compact letter display, Piepho 2004).

    Args:
        samples: the values of each method, one for each seed, in the order of the table.
    """
    pairs = list(combinations(range(len(samples)), 2))
    corrected = holm([welch(samples[a], samples[b]) for a, b in pairs])
    apart = {pair for pair, p in zip(pairs, corrected, strict=True) if p < SIGNIFICANT}
    letters, last, count = [""] * len(samples), -1, 0
    for first in range(len(samples)):
        end = first
        while end + 1 < len(samples) and not any((k, end + 1) in apart for k in range(first, end + 1)):
            end += 1
        if end > last:
            letter = ascii_lowercase[count % 26] + (str(count // 26) if count >= 26 else "")
            for k in range(first, end + 1):
                letters[k] = " ".join(filter(None, [letters[k], letter]))
            last, count = end, count + 1
    return letters
