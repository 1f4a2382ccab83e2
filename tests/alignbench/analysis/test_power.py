"""Power of t tests over seeds, against simulation and published values."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from alignbench.analysis.power import detectable, pooled_deviation, power, power_row, seeds_needed


def test_power_agrees_with_cohens_table() -> None:
    # Cohen 1988, table 2.3.5: two-sided 5 %, d = 0.8 and 25 a group has power 0.79; d = 0.5 and 64 a group has 0.80.
    assert power(0.8, 1.0, 25, paired=False) == pytest.approx(0.79, abs=0.005)
    assert power(0.5, 1.0, 64, paired=False) == pytest.approx(0.80, abs=0.005)


@pytest.mark.parametrize("paired", [True, False])
def test_power_agrees_with_simulation(paired: bool) -> None:
    rng, trials, seeds = np.random.default_rng(0), 4000, 5
    a, b = rng.normal(1.0, 1.0, (trials, seeds)), rng.normal(0.0, 1.0, (trials, seeds))
    p = np.asarray((stats.ttest_1samp(a, 0.0, axis=1) if paired else stats.ttest_ind(a, b, axis=1)).pvalue)
    expected = power(1.0, 1.0, seeds, paired=paired)
    assert (p < 0.05).mean() == pytest.approx(expected, abs=4 * (0.25 / trials) ** 0.5)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_the_detectable_difference_has_the_wanted_power(paired: bool, seeds: int) -> None:
    found = detectable(0.3, seeds, paired=paired)
    assert power(found, 0.3, seeds, paired=paired) == pytest.approx(0.8, abs=1e-6)


def test_the_seeds_needed_are_the_fewest_that_suffice() -> None:
    needed = seeds_needed(0.5, 1.0, paired=False)
    assert needed == 64
    assert power(0.5, 1.0, 63, paired=False) < 0.8 <= power(0.5, 1.0, 64, paired=False)
    assert seeds_needed(1e-6, 1.0, paired=True) is None
    assert seeds_needed(0.0, 1.0, paired=True) is None


def test_without_spread_or_with_one_seed_the_answers_are_the_limits() -> None:
    assert detectable(1.0, 1, paired=True) == np.inf
    assert detectable(0.0, 5, paired=True) == 0.0
    assert power(0.1, 0.0, 3, paired=True) == 1.0


def test_the_pooled_deviation_weighs_methods_by_their_degrees_of_freedom() -> None:
    a, b = np.array([1.0, 3.0]), np.array([0.0, 1.0, 2.0, np.nan])
    assert pooled_deviation([a, b, np.array([5.0])]) == pytest.approx(np.sqrt((2.0 + 2.0) / 3))
    assert np.isnan(pooled_deviation([np.array([1.0])]))


def test_what_seeds_can_tell_is_that_of_their_spread() -> None:
    """Two methods that differ by 1, 2 and 3: the paired spread is 1; their own are 1 and 2."""
    a, b = pd.Series({0: 1.0, 1: 2.0, 2: 3.0}), pd.Series({0: 0.0, 1: 0.0, 2: 0.0})
    row = power_row({"a": a, "b": b.add([2.0, 4.0, 6.0])})
    assert (row["seeds"], row["smallest"], row["largest"]) == (3, 2.0, 2.0)
    assert row["paired_deviation"] == pytest.approx(1.0)
    assert row["deviation"] == pytest.approx((2.5) ** 0.5)
    assert row["paired_detectable"] == pytest.approx(detectable(1.0, 3, paired=True))
    assert row["seeds_needed"] == seeds_needed(2.0, 1.0, paired=True)


def test_one_seed_can_tell_nothing() -> None:
    row = power_row({"a": pd.Series({0: 1.0}), "b": pd.Series({0: 2.0})})
    assert [str(row[key]) for key in ("deviation", "detectable", "paired_detectable")] == ["nan"] * 3
    assert row["seeds_needed"] is None
