"""Where over-optimisation sets in: planted turns are found, and chance is not taken for one."""

import numpy as np
import pytest

from alignbench.evaluation.onset import onset

ITERATIONS = [0, 20, 40, 60, 80]


def test_the_onset_is_where_the_judge_turns_while_the_reward_rises() -> None:
    rng = np.random.default_rng(0)
    rewards = np.linspace(0, 1, 5)[:, None] + rng.normal(0, 0.02, (5, 24))
    judge = np.array([0.5, 0.7, 0.8, 0.6, 0.4])[:, None] + rng.normal(0, 0.02, (5, 24))
    found = onset(ITERATIONS, rewards, judge)
    assert (found.iteration, found.lower, found.upper) == (40, 40, 40)
    assert found.over_optimised
    assert found.fall.value == pytest.approx(0.4, abs=0.03)


def test_a_judge_that_rises_with_the_reward_has_no_onset() -> None:
    rng = np.random.default_rng(0)
    rising = np.linspace(0, 1, 5)[:, None] + rng.normal(0, 0.1, (5, 24))
    assert not onset(ITERATIONS, rising, rising + rng.normal(0, 0.1, (5, 24))).over_optimised


def test_a_fall_without_a_rising_reward_is_no_over_optimisation() -> None:
    falling = np.linspace(1, 0, 5)[:, None] + np.random.default_rng(0).normal(0, 0.1, (5, 24))
    assert not onset(ITERATIONS, falling, falling).over_optimised


def test_false_onsets_are_as_rare_as_said_though_the_best_of_many_evaluations_is_taken() -> None:
    rng, false, trials = np.random.default_rng(1), 0, 400
    for _ in range(trials):
        rewards = np.linspace(0, 1, 9)[:, None] + rng.normal(0, 0.1, (9, 16))
        false += onset(range(9), rewards, rng.normal(0, 0.1, (9, 16)) + rng.normal(0, 0.3, 16), seed=0).over_optimised
    # One-sided level 2.5 %; three standard errors.
    assert false / trials <= 0.025 + 3 * (0.025 * 0.975 / trials) ** 0.5


def test_an_onset_needs_two_evaluations_and_four_prompts() -> None:
    with pytest.raises(ValueError, match="two evaluations and four prompts, got 1 and 8"):
        onset([0], np.zeros((1, 8)), np.zeros((1, 8)))
