"""Whether a ranking survives another protocol: by hand, and flips that were planted."""

import numpy as np
import pytest
from scipy.stats import kendalltau, ttest_1samp

from alignbench.analysis.protocols import corrected, flips, rank_correlation


def values(*means: float, noise: float = 0.0, prompts: int = 30, seed: int = 0) -> np.ndarray:
    """Methods with these means on prompts that differ for all of them alike."""
    rng = np.random.default_rng(seed)
    return np.array(means)[:, None] + 5 * rng.normal(size=prompts) + noise * rng.normal(size=(len(means), prompts))


def test_equal_and_reversed_rankings() -> None:
    reference = values(1, 2, 3, 4)
    assert rank_correlation(reference, values(0.1, 0.2, 0.7, 0.8, seed=1)) == pytest.approx((1, 1, 1, 30))
    assert rank_correlation(reference, values(4, 3, 2, 1, seed=1)) == pytest.approx((-1, -1, -1, 30))


def test_tau_is_scipys_with_a_tie_and_without_one() -> None:
    # One of six pairs of four methods is reversed: (5 - 1) / 6.
    assert rank_correlation(values(1, 2, 3, 4), values(1, 2, 4, 3)).value == pytest.approx(4 / 6)
    found = rank_correlation(values(1, 2, 3, 4), values(1, 2, 2, 3)).value
    assert found == pytest.approx(kendalltau([1, 2, 3, 4], [1, 2, 2, 3]).statistic)


def test_the_interval_is_wide_where_methods_hardly_differ() -> None:
    near = [values(0, 0.01, 0.02, noise=1.0, seed=seed) for seed in (0, 1)]
    far = [values(0, 1, 2, noise=1.0, seed=seed) for seed in (0, 1)]
    first, second = rank_correlation(near[0], near[1]), rank_correlation(far[0], far[1])
    assert first.lower < 0 < first.upper
    assert second.lower > 0.3


def test_prompts_without_a_value_are_left_out() -> None:
    reference, other = values(1, 2, 3), values(1, 2, 3)
    other[0, :4] = np.nan
    reference[1, 2:7] = np.nan
    assert rank_correlation(reference, other).n == 30 - 7
    assert np.isnan(rank_correlation(reference * np.nan, other).value)


def test_equal_methods_have_no_ranking() -> None:
    assert np.isnan(rank_correlation(values(1, 1, 1), values(1, 2, 3)).value)


def test_a_planted_flip_is_found_and_no_other() -> None:
    reference, other = values(1, 2, 3, noise=0.3), values(1, 3, 2, noise=0.3, seed=1)
    found = flips(reference, other)
    assert [(f.first, f.second) for f in found] == [(1, 2)]
    assert found[0].before.value == pytest.approx(-1, abs=0.2)
    assert found[0].after.value == pytest.approx(1, abs=0.2)
    assert corrected([found], 3)[0][0] < 1e-6


def test_p_of_a_flip_is_that_of_the_less_sure_of_its_two_differences() -> None:
    before = np.array([1.0, 2.0, 3.0, 2.0])  # t = 2 / sqrt((2 / 3) / 4) with 3 degrees of freedom
    after = np.array([-1.0, 0.5, -2.0, -1.5])
    found = flips(np.stack([before, 0 * before]), np.stack([after, 0 * after]))
    assert found[0].p == pytest.approx(2 * ttest_1samp(after, 0, alternative="less").pvalue)


def test_false_flips_are_as_rare_as_said() -> None:
    """Methods that do not differ by either protocol: every change of order is chance."""
    surely = 0
    for seed in range(200):
        pair = [values(0, 0, 0, noise=1.0, seed=10_000 * k + seed) for k in (1, 2)]
        surely += any(p < 0.05 for p in corrected([flips(*pair)], 3)[0])
    assert surely <= 20
