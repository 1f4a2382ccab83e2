"""The reward-KL frontier: no method is above its line, which the tilts of an exact front draw."""

import numpy as np
import pandas as pd
import pytest

from alignbench.comparison.results import BASE
from alignbench.frontier.front import Front
from alignbench.reports.plots.reward_kl import reward_kl_frontier
from tests.support.fronts import hand_made_front

SETUP = "equal_modes on gaussian_mixture"


def values(*rows: tuple[str, int, float, float, float]) -> pd.DataFrame:
    """Rows of cell, seed, KL, reward and best reward at that KL."""
    frame = pd.DataFrame(rows, columns=["cell", "seed", "kl_base", "exact_reward", "best_reward_at_kl"])
    return frame.assign(setup=SETUP, part="", objective="tmpo", sampler="independent")


METHODS = values(
    (BASE, -1, 0.02, 0.3, 0.35), ("tmpo x independent", 0, 2.0, 0.7, 0.9), ("tmpo x independent", 1, 1.0, 0.6, 0.8)
)


def line(front: Front | None) -> np.ndarray:
    figure = reward_kl_frontier(METHODS, pd.DataFrame(), {SETUP: "equal_modes"}, {SETUP: front})
    return np.asarray(figure.axes[0].lines[0].get_xydata())


def test_without_a_front_the_line_goes_through_the_best_rewards_at_the_methods_kl() -> None:
    np.testing.assert_allclose(line(None), [[0.02, 0.35], [1, 0.8], [2, 0.9]])


def test_the_line_goes_through_an_exact_fronts_tilts_and_then_the_methods_bounds() -> None:
    front = hand_made_front(
        {"kl_base": [[0.0, 0.0], [0.3, 0.5], [1.0, 2.0]], "exact_reward": [[0.3, 0.3], [0.5, 0.7], [0.8, 0.9]]}
    )
    # Means over two prompts; a KL of 0 is at the axis' beginning, and of the methods only 2.0 is beyond the last tilt.
    np.testing.assert_allclose(line(front), [[0.01, 0.3], [0.4, 0.6], [1.5, 0.85], [2.0, 0.9]])


def test_a_front_without_the_models_expected_reward_draws_no_line() -> None:
    np.testing.assert_allclose(line(hand_made_front({"reward": [[0.0, 0.0]], "kl_base": [[0.0, 0.0]]})), line(None))


def test_the_line_never_falls() -> None:
    falling = hand_made_front({"kl_base": [[0.1, 0.1], [0.2, 0.2]], "exact_reward": [[0.5, 0.5], [0.4, 0.4]]})
    assert line(falling)[:2, 1] == pytest.approx([0.5, 0.5])
