"""How often the alarm about a loss beyond the front is false, and how often it sees one."""

from collections.abc import Callable

import numpy as np
import pytest

from alignbench.analysis.power import POWER, detectable
from alignbench.statistics import ONE_SIDED_LEVEL, rise_test

SIMULATIONS = 4000
Draw = Callable[[np.random.Generator, int], np.ndarray]


def normal(rng: np.random.Generator, prompts: int) -> np.ndarray:
    """Differences as those of cosine diversity."""
    return rng.normal(0.0, 0.05, prompts)


def shares_of_pairs(rng: np.random.Generator, prompts: int) -> np.ndarray:
    """Differences as those of attribute_difference with eight images: shares of their 28 pairs that differ."""
    before, after = rng.binomial(28, 0.6, (2, prompts)) / 28
    return np.asarray(before - after)


def shares_of_modes(rng: np.random.Generator, prompts: int) -> np.ndarray:
    """Differences as those of the toy's modes: six for each prompt, each lost in one of the two models with a probability."""
    before, after = rng.binomial(6, 0.8, (2, prompts)) / 6
    return np.asarray(before - after)


def alarm_rate(draw: Draw, prompts: int, fall: float) -> float:
    rng = np.random.default_rng(prompts)
    return float(np.mean([rise_test([draw(rng, prompts) + fall]) < ONE_SIDED_LEVEL for _ in range(SIMULATIONS)]))


@pytest.mark.parametrize(
    ("draw", "prompts"), [(normal, 48), (shares_of_pairs, 48), (shares_of_pairs, 12), (shares_of_modes, 4)]
)
def test_alarms_are_false_at_their_level_and_find_the_fall_that_is_told(draw: Draw, prompts: int) -> None:
    deviation = float(draw(np.random.default_rng(0), 100_000).std())
    told = detectable(deviation, prompts, paired=True, level=2 * ONE_SIDED_LEVEL)
    error = 3 * (ONE_SIDED_LEVEL * (1 - ONE_SIDED_LEVEL) / SIMULATIONS) ** 0.5
    assert alarm_rate(draw, prompts, 0.0) <= ONE_SIDED_LEVEL + error
    # Power is that of normal differences; those that are shares are discrete, which moves it by a few per cent.
    assert alarm_rate(draw, prompts, told) == pytest.approx(POWER, abs=0.05)
