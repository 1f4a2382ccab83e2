import numpy as np
import pytest
from scipy import stats

from alignbench.statistics import (
    CONFIDENCE,
    Interval,
    best_of_n_kl_bound,
    best_of_n_mass,
    difference,
    equal_values,
    first_reached,
    holm,
    hypervolume,
    interquartile_mean,
    interval_over_groups,
    interval_over_runs,
    mean_interval,
    mean_of_known,
    mean_of_means_interval,
    non_dominated,
    paired_interval,
    performance_profile,
    probability_of_improvement,
    rise_test,
    welch,
    welch_interval,
    within,
)


def test_missing_values_are_left_out() -> None:
    found = mean_interval(np.array([1.0, np.nan, 3.0]))
    assert found.value == 2.0
    assert found.n == 2


def test_equal_values_have_no_interval_for_nothing_is_known_of_what_varies() -> None:
    assert mean_interval(np.full(5, 0.25)) == (0.25, -np.inf, np.inf, 5)
    assert mean_interval(np.zeros(3)) == (0.0, -np.inf, np.inf, 3)
    assert mean_of_means_interval([np.full(4, 0.25), np.full(2, 0.75)]) == (0.5, -np.inf, np.inf, 6)


def test_rounding_is_no_spread() -> None:
    thirds = np.array([0.1 + 0.2, 0.3, 0.3])
    assert len(set(thirds)) == 2
    assert equal_values(thirds)
    assert mean_interval(thirds)[1:] == (-np.inf, np.inf, 3)
    assert np.isnan(welch(thirds, np.array([0.2, 0.2])))
    assert rise_test([thirds]) == 0.125
    # Of numbers as large, so is 1e-5; 1 is not.
    assert equal_values(np.array([1e8, 1e8 + 1e-5]))
    assert not equal_values(np.array([1e8, 1e8 + 1]))


def test_a_difference_by_rounding_is_none() -> None:
    assert difference(np.array([0.1 + 0.2, 0.5, np.nan, np.inf]), np.array([0.3, 0.25, 1.0, np.inf])).tolist()[:2] == [
        0.0,
        0.25,
    ]
    assert paired_interval(np.full(9, 0.1 + 0.2), np.full(9, 0.3)) == (0.0, -np.inf, np.inf, 9)
    assert probability_of_improvement(np.array([[0.1 + 0.2]]), np.array([[0.3]])) == 0.5
    assert non_dominated(np.array([[0.3, 1.0], [0.1 + 0.2, 1.0]])).tolist() == [True, True]


def test_the_scale_of_the_values_does_not_matter() -> None:
    values = np.array([1.0, 2.0, 4.0, 5.0, 8.0])
    low, high = mean_interval(values)[1:3]
    for scale in (1e-200, 1e200):
        found = mean_interval(scale * values)
        assert found[:3] == pytest.approx((4 * scale, low * scale, high * scale), rel=1e-9)
        assert welch(scale * values, scale * values[::2]) == pytest.approx(welch(values, values[::2]))


def test_one_value_has_an_unbounded_interval() -> None:
    assert mean_interval(np.array([0.5])) == (0.5, -np.inf, np.inf, 1)


def test_no_value_is_not_a_number() -> None:
    assert np.isnan(mean_interval(np.array([np.nan])).value)
    assert mean_interval(np.array([])).n == 0


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
    pairs = np.stack([values, 1 - values], axis=-1)
    assert interval_over_groups(lambda x: x.sum(-1).mean((1, 2)), pairs) == (1.0, -np.inf, np.inf, 30)  # nothing varies


def test_over_groups_the_interval_of_a_mean_is_students_over_prompts() -> None:
    values = np.random.default_rng(7).normal(size=(1, 6))
    found = interval_over_groups(grand_mean, values)
    low, high = stats.t.interval(0.95, 5, loc=values.mean(), scale=stats.sem(values[0]))
    # 2,000 resamples have a standard deviation to within 1.6 %, three times of which is below 5 %.
    assert found[1:3] == pytest.approx((low, high), abs=0.025 * (high - low))
    assert interval_over_groups(grand_mean, values[:, :1])[1:3] == (-np.inf, np.inf)


def test_a_statistic_that_is_not_a_number_has_no_interval() -> None:
    assert np.isnan(interval_over_groups(lambda x: np.full(len(x), np.nan), np.ones((1, 3)))[:3]).all()


def test_the_interval_over_seeds_is_students() -> None:
    values = np.array([1.0, 2.0, 4.0, 5.0, 8.0])
    # mean 4, variance (9 + 4 + 0 + 1 + 16) / 4 = 7.5, standard error sqrt(1.5), t(0.975, 4) = 2.776445
    found = mean_interval(values)
    assert found.value == 4.0
    assert found.upper - 4.0 == pytest.approx(2.776445 * 1.5**0.5, rel=1e-6)
    assert found.n == 5
    assert mean_interval(np.array([3.0])) == (3.0, -np.inf, np.inf, 1)


# Hours of sleep gained by ten patients with two drugs: Cushny and Peebles' data in Student 1908, R's data set `sleep`.
DRUG_1 = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
DRUG_2 = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])


def test_students_own_example() -> None:
    # As R documents it: t.test(extra ~ group, data = sleep), and with paired = TRUE.
    assert welch(DRUG_1, DRUG_2) == pytest.approx(0.07939, abs=5e-6)
    assert welch_interval(DRUG_1, DRUG_2)[1:3] == pytest.approx((-3.3654832, 0.2054832), abs=5e-8)
    assert mean_interval(DRUG_1 - DRUG_2)[:3] == pytest.approx((-1.58, -2.4598858, -0.7001142), abs=5e-8)
    low, high = stats.ttest_1samp(DRUG_1 - DRUG_2, 0).confidence_interval()
    assert mean_interval(DRUG_1 - DRUG_2)[1:3] == pytest.approx((low, high))


def test_paired_differences_agree_with_the_paired_t_test() -> None:
    rng = np.random.default_rng(5)
    shared = rng.normal(0, 10, 300)
    first, second = shared + rng.normal(1, 1, 300), shared + rng.normal(0, 1, 300)
    found = paired_interval(first, second)
    low, high = stats.ttest_rel(first, second).confidence_interval()
    assert found.value == pytest.approx((first - second).mean())
    assert found[1:3] == pytest.approx((low, high))
    assert found.n == 300


def test_interquartile_mean_is_the_mean_of_the_middle_half() -> None:
    assert interquartile_mean(np.array([100.0, 1, 2, 3, 4, 5, 6, -50])) == 3.5  # of 2, 3, 4, 5
    values = np.random.default_rng(0).normal(size=(5, 7))
    assert interquartile_mean(values) == stats.trim_mean(values.ravel(), 0.25)
    assert interquartile_mean(np.array([1.0, np.nan, 3.0])) == 2.0


def test_over_runs_the_interval_of_a_mean_is_students_over_the_runs_means() -> None:
    table = np.random.default_rng(3).normal(size=(5, 7)) * [1, 3, 9, 1, 1, 1, 1]
    found, other = interval_over_runs(table, lambda scores: float(scores.mean())), mean_interval(table.mean(axis=1))
    assert found == pytest.approx(other)
    assert found.n == 5


def test_over_runs_the_jackknife_by_hand() -> None:
    # Medians without one run: of (2, 9) 5.5, of (1, 9) 5, of (1, 2) 1.5; their mean is 4, their squares 2.25 + 1 + 6.25.
    found = interval_over_runs(np.array([[1.0], [2.0], [9.0]]), lambda scores: float(np.median(scores)))
    assert found.value == 2.0
    assert found.upper - 2.0 == pytest.approx(4.302653 * (2 / 3 * 9.5) ** 0.5, rel=1e-6)


def test_prompts_of_one_run_are_not_taken_for_independent() -> None:
    rows = np.tile(np.arange(6.0)[:, None], (1, 100))
    assert interval_over_runs(rows, np.mean)[1:3] == pytest.approx(mean_interval(rows[:, 0])[1:3])
    # Prompts differ, runs do not: nothing is known of what another run would give.
    assert interval_over_runs(np.tile([0.0, 10.0, 20.0], (6, 1))) == (10.0, -np.inf, np.inf, 6)


def test_one_run_has_an_unbounded_interval() -> None:
    assert interval_over_runs(np.array([[1.0, 3.0]])) == (2.0, -np.inf, np.inf, 1)
    assert np.isnan(interval_over_runs(np.empty((0, 3))).value)
    with pytest.raises(ValueError, match="runs, prompts"):
        interval_over_runs(np.zeros(3))


def test_welch_agrees_with_the_formula() -> None:
    a, b = np.array([3.0, 4, 1, 2.1]), np.array([490.2, 340.0, 433.9])  # unequal sizes and variances
    va, vb = a.var(ddof=1) / 4, b.var(ddof=1) / 3
    t = (a.mean() - b.mean()) / (va + vb) ** 0.5
    degrees = (va + vb) ** 2 / (va**2 / 3 + vb**2 / 2)
    assert welch(a, b) == pytest.approx(2 * stats.t.sf(abs(t), degrees), rel=1e-9)
    assert welch(a, b) == pytest.approx(0.010751561149785, rel=1e-9)  # as Rosetta Code's page on this test has it


def test_welch_against_a_base_model_without_spread_is_the_one_sample_test() -> None:
    values = np.array([0.3, 0.5, 0.45, 0.6])
    # One-sample t: mean 0.4625, standard error sqrt(0.01562500 / 4) = 0.0625, t = 4.2 with 3 degrees of freedom.
    assert welch(values, np.full(4, 0.2)) == pytest.approx(2 * stats.t.sf(4.2, 3))
    assert welch(np.full(4, 0.2), values) == pytest.approx(2 * stats.t.sf(4.2, 3))


def test_the_interval_of_a_difference_belongs_to_the_test() -> None:
    a, b = np.array([3.0, 4, 1, 2.1]), np.array([490.2, 340.0, 433.9, np.nan])
    low, high = stats.ttest_ind(a, b[:3], equal_var=False).confidence_interval()
    assert welch_interval(a, b) == pytest.approx((a.mean() - b[:3].mean(), low, high, 3))
    base = np.full(4, 0.2)
    low, high = stats.ttest_1samp(a, 0.2).confidence_interval()
    assert welch_interval(a, base)[1:3] == pytest.approx((low - 0.2, high - 0.2))
    assert welch_interval(base, base + 1) == (-1.0, -np.inf, np.inf, 4)
    assert welch_interval(a[:1], b) == pytest.approx((3.0 - b[:3].mean(), -np.inf, np.inf, 1))
    assert np.isnan(welch_interval(a, np.array([np.nan])).value)


def test_welch_says_nothing_where_nothing_can_be_told() -> None:
    assert np.isnan(welch(np.array([1.0]), np.array([2.0, 3.0])))
    assert np.isnan(welch(np.array([1.0, 1.0]), np.array([2.0, 2.0])))


def test_the_test_of_a_rise_is_students() -> None:
    values = np.array([0.3, -0.1, 0.4, np.nan, 0.2])
    expected = stats.ttest_1samp([0.3, -0.1, 0.4, 0.2], 0, alternative="greater").pvalue
    assert rise_test([values]) == pytest.approx(expected)
    assert rise_test([-values]) == pytest.approx(1 - expected)


def test_over_several_strata_it_is_welchs() -> None:
    a, b = np.array([0.3, -0.1, 0.4, 0.2]), np.array([1.0, -2.0, 2.5])
    # The mean of both means has the t of the difference between a and -b.
    expected = stats.ttest_ind(a, -b, equal_var=False, alternative="greater").pvalue
    assert rise_test([a, b]) == pytest.approx(expected)


def test_a_few_equal_values_prove_nothing() -> None:
    assert rise_test([np.full(3, 0.25)]) == 0.125
    assert rise_test([np.full(3, -0.25)]) == 0.875
    assert rise_test([np.zeros(50)]) == 0.5
    assert rise_test([np.full(20, 0.25), np.full(20, 0.5)]) == 0.5**40


def test_no_p_value_is_zero() -> None:
    near, far = np.array([1.0, 1.0 + 1e-9] * 500), np.array([2.0, 2.0 + 1e-9] * 500)
    assert 0 < rise_test([far]) < 1e-300
    assert 0 < welch(near, far) < 1e-300
    assert 0 < rise_test([np.ones(2000)]) < 1e-300


def test_a_rise_of_one_prompt_or_none_cannot_be_told() -> None:
    assert np.isnan(rise_test([np.array([1.0])]))
    assert np.isnan(rise_test([np.array([np.nan, np.nan])]))
    assert np.isnan(rise_test([np.array([1.0, 2.0]), np.array([1.0])]))


def test_holm_by_hand() -> None:
    # The example of Wikipedia's article, in which .005 and .01 are significant at .05.
    # sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04, and never below the one before: .06 for the last
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    found = holm([0.02, np.nan, 0.5])
    assert found[0] == pytest.approx(0.04)
    assert np.isnan(found[1])
    assert len(holm([])) == 0


def test_probability_of_improvement_is_the_mann_whitney_statistic() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 5, (6, 3)).astype(float), rng.integers(0, 5, (4, 3)).astype(float)
    expected = np.mean([stats.mannwhitneyu(a[:, s], b[:, s]).statistic / 24 for s in range(3)])
    assert probability_of_improvement(a, b) == pytest.approx(expected)
    assert probability_of_improvement(a, a) == pytest.approx(0.5)


def test_performance_profile_counts_what_is_above() -> None:
    found = performance_profile(np.array([[0.1, 0.5], [0.9, np.nan]]), np.array([0.0, 0.1, 0.5, 1.0]))
    assert found == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])
    scores, thresholds = np.random.default_rng(6).normal(size=(5, 8)), np.linspace(-2, 2, 9)
    assert performance_profile(scores, thresholds) == pytest.approx(stats.ecdf(scores.ravel()).sf.evaluate(thresholds))


def test_paired_differences_leave_out_what_has_no_partner() -> None:
    found = paired_interval(np.array([1.0, 2.0, np.nan]), np.array([0.5, 1.5, 1.0]))
    assert found == (0.5, -np.inf, np.inf, 2)


def test_front_and_hypervolume_by_hand() -> None:
    points = np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [1.0, 1.0], [2.0, 2.0], [np.nan, 9.0]])
    assert non_dominated(points).tolist() == [True, True, True, False, True, False]
    # A staircase of 3 + 2 + 1 unit squares; above (1, 1) only one square is left.
    assert hypervolume(points, (0, 0)) == 6.0
    assert hypervolume(points, (1, 1)) == 1.0
    assert hypervolume(points, (5, 5)) == 0.0
    assert hypervolume(np.empty((0, 2)), (0, 0)) == 0.0


def test_intervals_have_the_level_that_texts_and_figures_name() -> None:
    """Reports, help and figures say "95 % interval"."""
    assert CONFIDENCE == 0.95


def test_best_of_n_of_a_fair_coin() -> None:
    coin, score = np.array([0.5, 0.5]), np.array([0.0, 1.0])
    for n, heads, kl, bound in ((2, 0.75, 0.131, 0.193), (4, 0.9375, 0.459, 0.636)):
        found = best_of_n_mass(coin, score, n)
        assert found == pytest.approx([1 - heads, heads])
        assert float((found * np.log(found / coin)).sum()) == pytest.approx(kl, abs=5e-4)
        assert best_of_n_kl_bound(n) == pytest.approx(bound, abs=5e-4)


def test_best_of_n_shares_a_scores_mass_among_the_points_that_have_it() -> None:
    # Scores 0, 1 and 1 of mass 0.4, 0.5 and 0.1: F is 0.4 and 1, so the best of 3 has score 1 with 1 - 0.4^3.
    found = best_of_n_mass(np.array([0.5, 0.4, 0.1]), np.array([1.0, 0.0, 1.0]), 3)
    assert found == pytest.approx([0.936 * 5 / 6, 0.064, 0.936 / 6])
    assert best_of_n_mass(np.array([0.5, 0.4, 0.1]), np.array([1.0, 0.0, 1.0]), 1) == pytest.approx([0.5, 0.4, 0.1])


def test_best_of_n_of_equally_likely_scores_reaches_the_bound_as_they_become_many() -> None:
    n, size = 4, 4000
    found = best_of_n_mass(np.full(size, 1 / size), np.arange(size), n)
    kl = float((found * np.log(found * size)).sum())
    assert kl < best_of_n_kl_bound(n)
    assert kl == pytest.approx(best_of_n_kl_bound(n), abs=1e-5)
    assert float((found * np.arange(size)).sum()) / size == pytest.approx(n / (n + 1), abs=1e-3)


def test_best_of_n_keeps_the_digits_of_tiny_masses() -> None:
    found = best_of_n_mass(np.array([1.0, 1e-18, 0.0]), np.array([0.0, 1.0, 2.0]), 8)
    assert found[1] == pytest.approx(8e-18, rel=1e-9)
    assert found[2] == 0


def test_an_interval_that_leaves_the_range_ends_inside_it_and_others_stay() -> None:
    """0.9 +- 0.2 in [0, 1]: the upper end is 1 - 0.1 exp(-0.2 / 0.1); 0.5 +- 0.7 in [0, inf): the lower is 0.5 exp(-1.4)."""
    found = within(Interval(0.9, 0.7, 1.1, 5), 0.0, 1.0)
    assert list(found) == pytest.approx([0.9, 0.7, 1 - 0.1 * np.exp(-2), 5])
    assert list(within(Interval(0.5, -0.2, 1.2, 3), 0.0, None)) == pytest.approx([0.5, 0.5 * np.exp(-1.4), 1.2, 3])
    inside = Interval(0.5, 0.4, 0.6, 5)
    assert within(inside, 0.0, 1.0) == inside
    unbounded = Interval(0.5, -np.inf, np.inf, 1)
    assert within(unbounded, 0.0, 1.0) == unbounded


def test_means_are_those_of_the_values_that_are_known() -> None:
    nan = float("nan")
    table = np.array([[1.0, nan, 4.0], [nan, nan, nan], [0.0, nan, 3.0]])
    np.testing.assert_array_equal(mean_of_known(table, axis=1), [2.5, nan, 1.5])
    np.testing.assert_array_equal(mean_of_known(table, axis=0), [0.5, nan, 3.5])


def test_an_infinite_number_differs_from_a_finite_one() -> None:
    assert difference(np.array([np.inf, 1.0]), np.array([1.0, -np.inf])).tolist() == [np.inf, np.inf]
    assert non_dominated(np.array([[np.inf, 1.0], [1.0, 1.0]])).tolist() == [True, False]


def test_a_level_is_reached_between_known_values() -> None:
    nan = float("nan")
    assert first_reached(np.array([0.0, nan, 1.0]), 0.5) == (0, 2, 0.5)
    assert first_reached(np.array([nan, 1.0]), 0.5) == (1, 1, 0.0)
    assert first_reached(np.array([0.75, 1.0]), 0.5) == (0, 0, 0.0)
    assert first_reached(np.array([0.0, nan]), 0.5) is None
