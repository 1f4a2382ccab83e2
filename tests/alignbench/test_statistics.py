import numpy as np
import pytest
from scipy import stats

from alignbench.statistics import interval_over_groups, mean_interval


def test_the_interval_agrees_with_the_t_interval_on_normal_values() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 399, loc=values.mean(), scale=stats.sem(values))
    assert found.value == pytest.approx(values.mean())
    # 2,000 resamples place a 2.5 % quantile to within about 5 % of the interval's width.
    assert found.lower == pytest.approx(low, abs=0.05 * (high - low))
    assert found.upper == pytest.approx(high, abs=0.05 * (high - low))
    assert found.n == 400


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [(lambda i: i.lower <= 0 <= i.upper)(mean_interval(rng.normal(size=40))) for _ in range(200)]
    # 95 % of 200 with a binomial deviation of 1.5 %; percentile intervals of 40 values run slightly short.
    assert 0.89 <= np.mean(covered) <= 0.99


def test_missing_values_are_left_out() -> None:
    found = mean_interval(np.array([1.0, np.nan, 3.0]))
    assert found.value == 2.0
    assert found.n == 2


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert mean_interval(np.full(5, 0.25)) == (0.25, 0.25, 0.25, 5)


def test_one_value_has_an_unbounded_interval() -> None:
    assert mean_interval(np.array([0.5])) == (0.5, -np.inf, np.inf, 1)


def test_no_value_is_not_a_number() -> None:
    assert np.isnan(mean_interval(np.array([np.nan])).value)
    assert mean_interval(np.array([])).n == 0


def test_the_same_values_give_the_same_interval() -> None:
    values = np.random.default_rng(2).normal(size=30)
    assert mean_interval(values) == mean_interval(values)


def grand_mean(values: np.ndarray) -> np.ndarray:
    return values.mean((1, 2))


def test_over_groups_the_differences_between_prompts_do_not_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    values = np.array([[0.0], [100.0]]) + rng.normal(size=(2, 200))
    found = interval_over_groups(grand_mean, values)
    assert found.value == pytest.approx(values.mean())
    # Standard error 1 / sqrt 400, 1.96 of it on both sides; a tenth for sample variance and resampling.
    assert found.upper - found.lower == pytest.approx(2 * 1.96 / 20, rel=0.1)
    assert found.n == 400


def test_samples_of_different_sizes_are_drawn_apart() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(3, 1, (2, 50)), rng.normal(1, 1, (2, 200))
    found = interval_over_groups(lambda a, b: grand_mean(a) - grand_mean(b), one, other)
    assert found.value == pytest.approx(one.mean() - other.mean())
    assert found.upper - found.lower == pytest.approx(2 * 1.96 * (1 / 100 + 1 / 400) ** 0.5, rel=0.15)


def test_groups_may_hold_several_numbers_that_stay_together() -> None:
    values = np.random.default_rng(1).normal(size=(1, 30))
    pairs = np.stack([values, -values], axis=-1)
    assert interval_over_groups(lambda x: x.sum(-1).mean((1, 2)), pairs)[:3] == (0.0, 0.0, 0.0)


def test_a_statistic_that_is_not_a_number_has_no_interval() -> None:
    assert np.isnan(interval_over_groups(lambda x: np.full(len(x), np.nan), np.ones((1, 3)))[:3]).all()
