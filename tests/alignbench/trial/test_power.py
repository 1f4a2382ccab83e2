"""Power and false alarms, by simulation of the test itself and by hand."""

import numpy as np
import pytest

from alignbench.statistics import ONE_SIDED_LEVEL, mean_interval
from alignbench.trial.power import (
    effect,
    effect_interval,
    effect_with_power,
    effects_without,
    false_alarms,
    jackknife,
    power,
    ranked_rightly,
    through,
)


def test_effect_by_hand() -> None:
    # Mean -2; deviations -1, 1, 1, -1 with variance 4 / 3.
    assert effect(np.array([[-3.0, -1], [-1, -3]])) == pytest.approx(-2 / (4 / 3) ** 0.5)
    assert effect(np.zeros((3, 2))) == 0
    assert effect(np.full((3, 2), -0.5)) == -np.inf
    assert np.isnan(effect(np.zeros((0, 2))))


@pytest.mark.parametrize(("size", "prompts"), [(-0.5, 16), (-0.2, 64), (0.3, 16)])
def test_power_is_that_of_a_simulated_t_test(size: float, prompts: int) -> None:
    values = np.random.default_rng(0).normal(size, 1, (20_000, prompts))
    t = values.mean(axis=1) / (values.std(axis=1, ddof=1) / prompts**0.5)
    critical = {16: 2.131, 64: 1.998}[prompts]
    assert float(power(size, prompts)) == pytest.approx((t < -critical).mean(), abs=0.012)  # three standard errors


def test_power_without_an_effect_is_the_level_and_grows_with_prompts() -> None:
    assert power(0.0, np.array([16, 32, 64, 128])) == pytest.approx([ONE_SIDED_LEVEL] * 4, abs=1e-4)
    rising = power(-0.3, np.array([16, 32, 64, 128]))
    assert (np.diff(rising) > 0).all()
    assert power(np.array([-np.inf, np.inf]), 16) == pytest.approx([1, 0], abs=1e-4)
    assert np.isnan(power(np.nan, 16))


def test_effects_without_a_prompt_are_those_of_the_rest() -> None:
    table = np.random.default_rng(0).normal(0.3, 1, (5, 3))
    by_hand = [effect(np.delete(table, i, axis=0)) for i in range(5)]
    assert effects_without(table) == pytest.approx(by_hand)
    table[1:] = 0.0  # all that is left without the first prompt is equal
    assert effects_without(table)[0] == 0


def test_the_jackknife_of_a_mean_is_its_t_interval() -> None:
    values = np.array([0.2, 0.9, 0.4, 0.1])
    without = np.array([np.delete(values, i).mean() for i in range(4)])
    assert jackknife(float(values.mean()), [without]) == pytest.approx(mean_interval(values))
    assert effect_interval(np.full((3, 2), 0.5)).lower == -np.inf


def test_equal_sets_raise_false_alarms_at_the_level() -> None:
    found = false_alarms(np.random.default_rng(0).normal(1, 1, (50, 2)), 64, np.random.default_rng(1))
    assert found.lower <= ONE_SIDED_LEVEL <= found.upper


def test_ranking_by_hand() -> None:
    assert float(ranked_rightly(0.0, 64)) == 0.5
    assert float(ranked_rightly(-1.959964 / 8, 64)) == pytest.approx(0.975, abs=1e-6)


def test_bounds_of_an_effect_become_those_of_the_power() -> None:
    size = effect_interval(np.random.default_rng(0).normal(-0.3, 1, (30, 2)))
    found = through(lambda effects: power(effects, 64), size)
    assert found.lower < found.value < found.upper
    assert found.value == pytest.approx(float(power(size.value, 64)))


def test_the_effect_of_a_power_is_its_inverse() -> None:
    assert float(power(effect_with_power(0.8, 64), 64)) == pytest.approx(0.8, abs=1e-3)
    # Student's test of 64 values has the power 0.8 at about 2.84 standard errors, a little more than 2.80 of the normal one.
    assert effect_with_power(0.8, 64) * 8 == pytest.approx(-2.84, abs=0.02)
