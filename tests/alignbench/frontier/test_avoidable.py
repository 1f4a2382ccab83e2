"""Avoidable loss on hand-made fronts."""

import numpy as np
import pytest

from alignbench import UserError
from alignbench.frontier.avoidable import avoidable_loss, loss_at_reward, metric_at_reward, reward_at_kl
from alignbench.frontier.front import KL, REWARD, Front
from tests.support.fronts import hand_made_front


def hand_made(rewards: np.ndarray, diversity: np.ndarray, kl: np.ndarray) -> Front:
    """A front of [S, P] values at beta = 0, 1, 2, ..."""
    return hand_made_front({REWARD: rewards, "diversity": diversity, KL: kl})


PROMPTS = 8
LINE = hand_made(
    np.linspace(0.2, 0.8, 4)[:, None] + np.zeros(PROMPTS),
    np.array([1.0, 0.9, 0.6, 0.1])[:, None] + np.zeros(PROMPTS),
    np.array([0.0, 0.1, 0.4, 0.9])[:, None] + np.zeros(PROMPTS),
)


def test_the_front_is_read_by_linear_interpolation_at_the_methods_reward() -> None:
    found = avoidable_loss(LINE, "diversity", np.full(PROMPTS, 0.5), np.full(PROMPTS, 0.4))
    assert found.front.value == pytest.approx(0.75)  # halfway between beta = 1 and 2
    assert found.loss == pytest.approx((0.35, 0.35, 0.35, PROMPTS))  # prompts that are alike leave no interval
    assert (found.beta, found.kl) == pytest.approx((1.5, 0.25))


def test_a_method_on_the_front_lost_nothing_needlessly() -> None:
    found = avoidable_loss(LINE, "diversity", np.full(PROMPTS, 0.6), np.full(PROMPTS, 0.6))
    assert found.loss.value == pytest.approx(0.0)


def test_a_reward_beyond_the_fronts_samples_is_not_compared() -> None:
    found = avoidable_loss(LINE, "diversity", np.full(PROMPTS, 0.9), np.full(PROMPTS, 0.4))
    assert np.isnan([found.front.value, found.loss.value, found.beta]).all()


def test_a_reward_below_the_base_models_is_compared_with_the_base_model() -> None:
    found = avoidable_loss(LINE, "diversity", np.full(PROMPTS, 0.1), np.full(PROMPTS, 0.7))
    assert found.loss.value == pytest.approx(0.3)


def test_prompts_without_the_metric_are_left_out_on_both_sides() -> None:
    values = np.array([0.4] * 4 + [np.nan] * 4)
    rewards = np.array([0.4] * 4 + [0.8] * 4)
    found = avoidable_loss(LINE, "diversity", rewards, values)
    assert found.front.n == 4
    assert found.loss.value == pytest.approx(0.5)


def test_the_interval_over_prompts_covers_the_truth_as_often_as_it_says() -> None:
    """Prompts differ in reward and diversity, of the front and of the method; the truth is a population of prompts."""
    rng = np.random.default_rng(0)
    covered, trials, prompts = 0, 200, 48
    for trial in range(trials):
        level = rng.normal(0, 0.1, prompts)
        reward_curve = np.linspace(0.2, 0.8, 5)[:, None] + level
        diversity = 1 - np.linspace(0, 0.8, 5)[:, None] + rng.normal(0, 0.1, prompts)
        front = hand_made(reward_curve, diversity, np.zeros((5, prompts)))
        rewards = 0.5 + level + rng.normal(0, 0.05, prompts)
        found = avoidable_loss(front, "diversity", rewards, 0.4 + rng.normal(0, 0.1, prompts), seed=trial)
        covered += found.loss.lower <= 0.6 - 0.4 <= found.loss.upper
    # 95 %: four standard errors of 200 trials are 6 %; a percentile bootstrap of 48 prompts is a little narrow.
    assert 0.88 <= covered / trials <= 1.0


def test_a_metric_that_the_front_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="front of task 't' has no metric 'vendi'"):
        avoidable_loss(LINE, "vendi", np.zeros(PROMPTS), np.zeros(PROMPTS))


def test_the_loss_without_its_interval_is_the_same_number() -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.uniform(0.3, 0.7, PROMPTS), rng.uniform(0, 1, PROMPTS)
    values[3] = np.nan
    expected = avoidable_loss(LINE, "diversity", rewards, values).loss.value
    assert loss_at_reward(LINE, "diversity", rewards, values) == pytest.approx(expected)
    assert np.isnan(loss_at_reward(LINE, "diversity", np.full(PROMPTS, 0.9), values))


def test_each_prompt_is_read_at_the_one_tilt_that_has_the_mean_reward() -> None:
    steep = hand_made(
        np.array([[0.0, 0.0], [0.2, 0.6]]), np.array([[1.0, 0.9], [0.5, 0.1]]), np.array([[0.0, 0.0], [0.5, 0.5]])
    )
    # The mean reward 0.2 is halfway to beta = 1, whichever prompt has it.
    assert metric_at_reward(steep, "diversity", np.array([0.4, 0.0])) == pytest.approx([0.75, 0.5])
    assert reward_at_kl(steep, 0.25) == pytest.approx(0.2)
    assert np.isnan(reward_at_kl(steep, 0.6))


def test_a_prompt_that_the_front_lacks_does_not_count_for_the_place_on_it() -> None:
    curves = [LINE.values(name).copy() for name in (REWARD, "diversity", KL)]
    for curve in curves:
        curve[:, 3] = np.nan
    front = hand_made(*curves)
    rewards, values = np.full(PROMPTS, 0.5), np.full(PROMPTS, 0.4)
    rewards[3] = 0.8  # would move the mean to 0.54
    assert loss_at_reward(front, "diversity", rewards, values) == pytest.approx(0.35)
    assert avoidable_loss(front, "diversity", rewards, values).loss.value == pytest.approx(0.35)
    assert reward_at_kl(front, 0.25) == pytest.approx(0.5)  # half-way from beta = 1 to 2
