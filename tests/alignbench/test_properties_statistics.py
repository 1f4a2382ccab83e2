"""Statistics against plain loops, numpy and scipy: of groups, of intervals, of fronts, of denoising steps."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from alignbench import flow, groups, statistics
from alignbench.statistics import Interval

NAN = float("nan")
REWARDS = st.lists(
    st.lists(st.integers(-800, 800).map(lambda n: n / 16) | st.just(NAN), min_size=4, max_size=4), min_size=1, max_size=3
)
"""Groups of four, in sixteenths: shifts and scales by powers of two are exact, and any spread is far above MIN_STD."""
VALUES = st.lists(st.integers(-(10**6), 10**6).map(lambda n: n / 1000) | st.just(NAN), max_size=12).map(np.array)
KINDS = st.sampled_from(["group", "batch", "none"])
ROUNDING = 2e-5
"""float32, of values up to 50."""


# ------------------------------------------------------------------------------------------------------------- groups


def standardised(rewards: list[list[float]], std: str) -> np.ndarray:
    """By numpy in float64."""
    r = np.array(rewards, dtype=np.float64)
    centred = np.zeros_like(r)
    for g, group in enumerate(r):
        known = group[~np.isnan(group)]
        if len(set(known)) > 1:
            centred[g] = np.where(np.isnan(group), 0.0, group - known.mean())
    if std == "none":
        return centred
    known = ~np.isnan(r)
    if std == "group":
        scale = np.sqrt((centred**2).sum(1, keepdims=True) / np.maximum(known.sum(1, keepdims=True), 1))
    else:
        scale = r[known].std() if known.any() else 0.0
    return np.asarray(centred / np.maximum(scale, 1e-4))


@given(REWARDS, KINDS)
def test_standardised_rewards_are_numpys(rewards: list[list[float]], std: str) -> None:
    found = groups.standardise(torch.tensor(rewards), std=std)
    np.testing.assert_allclose(found.numpy(), standardised(rewards, std), atol=ROUNDING)
    equal = [len({r for r in group if r == r}) < 2 for group in rewards]
    assert groups.has_distinct_rewards(torch.tensor(rewards)).tolist() == [not e for e in equal]
    assert all(found[g].tolist() == [0.0] * 4 for g, e in enumerate(equal) if e)


@given(REWARDS, KINDS, st.integers(-64, 64), st.integers(-3, 6), st.permutations(range(4)))
def test_standardised_rewards_do_not_see_shift_scale_or_order(
    rewards: list[list[float]], std: str, shift: int, power: int, order: list[int]
) -> None:
    r = torch.tensor(rewards)
    z = groups.standardise(r, std=std)
    torch.testing.assert_close(groups.standardise(r + shift, std=std), z, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(groups.standardise(r[:, order], std=std), z[:, order], atol=ROUNDING, rtol=0)
    scaled = groups.standardise(r * 2.0**power, std=std)
    torch.testing.assert_close(scaled, z * 2.0**power if std == "none" else z, atol=ROUNDING * 2.0 ** max(power, 0), rtol=0)


@given(REWARDS, KINDS)
def test_a_missing_reward_changes_nothing_for_the_others(rewards: list[list[float]], std: str) -> None:
    r = torch.tensor(rewards)
    wider = torch.cat([torch.full((len(r), 1), NAN), r], dim=1)
    found = groups.standardise(wider, std=std)
    assert found[:, 0].tolist() == [0.0] * len(r)
    torch.testing.assert_close(found[:, 1:], groups.standardise(r, std=std), atol=ROUNDING, rtol=0)


@given(REWARDS, st.data())
def test_softmax_and_effective_sample_size_are_over_the_chosen_leaves(rewards: list[list[float]], data: st.DataObject) -> None:
    values = torch.tensor(rewards).nan_to_num()
    where = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=len(values), max_size=len(values)))
    )
    log_p = groups.log_softmax(values, where)
    sizes = groups.effective_sample_size(log_p, where)
    for g in range(len(values)):
        chosen = values[g][where[g]].double().numpy()
        p = np.exp(chosen - chosen.max()) / np.exp(chosen - chosen.max()).sum() if len(chosen) else chosen
        np.testing.assert_allclose(log_p[g][where[g]].exp().numpy(), p, atol=ROUNDING)
        assert log_p[g][~where[g]].abs().sum() == 0
        if len(p):
            assert float(sizes[g]) == pytest.approx(1 / (p**2).sum(), rel=1e-4)
            assert 1 - ROUNDING <= float(sizes[g]) <= len(p) + 1e-4
    assert groups.mean(values, where).item() == pytest.approx(
        values[where].double().mean().item() if where.any() else 0.0, abs=1e-4
    )


@given(st.lists(st.lists(st.integers(-9, 9), min_size=6, max_size=6), min_size=2, max_size=5))
def test_lgmd_is_the_mean_log_distance_over_pairs(latents: list[list[int]]) -> None:
    z = np.array(latents, dtype=np.float64)
    distances = [np.linalg.norm(z[i] - z[j]) / math.sqrt(6) for i in range(len(z)) for j in range(i)]
    found = groups.lgmd(torch.tensor(latents, dtype=torch.float32).view(-1, 2, 3))
    assert float(found) == pytest.approx(np.mean(np.log(np.maximum(distances, 1e-8))), abs=1e-4)


@given(st.floats(0.01, 3), st.floats(-5, 5), st.floats(0.01, 0.9))
def test_the_clipped_surrogate_never_exceeds_the_plain_one_and_equals_it_near_one(r: float, a: float, eps: float) -> None:
    ratio, advantage = torch.tensor([r], dtype=torch.float64), torch.tensor([a], dtype=torch.float64)
    found = groups.clipped(ratio, advantage, eps).item()
    assert found <= r * a
    if 1 - eps <= r <= 1 + eps or (a < 0 and r > 1) or (a > 0 and r < 1):
        assert found == r * a
    else:
        assert found == pytest.approx((1 + eps if r > 1 else 1 - eps) * a)


# ---------------------------------------------------------------------------------------------------------- intervals


def ordered(found: Interval, values: np.ndarray) -> None:
    known = values[~np.isnan(values)]
    assert found.n == len(known)
    if len(known) == 0:
        assert all(math.isnan(v) for v in found[:3])
        return
    tiny = 1e-9 * (1 + np.abs(known).max())
    assert found.value == pytest.approx(known.mean(), abs=tiny)
    assert found.lower - tiny <= found.value <= found.upper + tiny
    if len(known) == 1:
        assert (found.lower, found.upper) == (-np.inf, np.inf)


@given(VALUES)
def test_a_missing_value_changes_no_interval(values: np.ndarray) -> None:
    found = statistics.mean_interval(values)
    ordered(found, values)
    assert statistics.mean_interval(values + NAN).n == 0
    np.testing.assert_array_equal(statistics.mean_interval(np.append(values, NAN)), found)
    np.testing.assert_array_equal(statistics.paired_interval(values, np.zeros(len(values))), found)
    np.testing.assert_array_equal(statistics.mean_of_means_interval([values, np.array([NAN])]), found)


@given(st.lists(VALUES, max_size=3))
def test_the_interval_and_the_test_of_a_rise_agree(strata: list[np.ndarray]) -> None:
    found, p = statistics.mean_of_means_interval(strata), statistics.rise_test(strata)
    assert math.isnan(p) or 0 < p < 1 or p == 1  # 1 - 0.5^54 and more is 1
    if math.isfinite(found.lower) and abs(p - 0.025) > 1e-6 and abs(p - 0.975) > 1e-6:
        assert (p < 0.025) == (found.lower > 0)
        assert (p > 0.975) == (found.upper < 0)


@given(VALUES, st.integers(-50, 50), st.integers(-2, 2))
def test_students_interval_is_scipys_and_moves_with_the_values(values: np.ndarray, shift: int, power: int) -> None:
    found = statistics.mean_interval(values)
    ordered(found, values)
    known = values[~np.isnan(values)]
    if len(known) > 1 and np.ptp(known) > 0:
        low, high = stats.ttest_1samp(known, 0).confidence_interval()
        assert (found.lower, found.upper) == pytest.approx((low, high), abs=1e-6)
        moved = statistics.mean_interval(values * 2.0**power + shift)
        assert moved[:3] == pytest.approx(tuple(v * 2.0**power + shift for v in found[:3]), abs=1e-6)


@given(VALUES, VALUES)
def test_welchs_interval_and_p_value_agree_with_scipy_and_with_each_other(one: np.ndarray, other: np.ndarray) -> None:
    a, b = (x[~np.isnan(x)] for x in (one, other))
    found, p = statistics.welch_interval(one, other), statistics.welch(one, other)
    assert found.n == min(len(a), len(b))
    assume(len(a) and len(b))
    assert found.value == pytest.approx(a.mean() - b.mean(), abs=1e-9)
    assert found.lower <= found.value <= found.upper
    back = statistics.welch_interval(other, one)
    assert (back.value, back.lower, back.upper) == pytest.approx((-found.value, -found.upper, -found.lower), abs=1e-9)
    if min(len(a), len(b)) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0:
        test = stats.ttest_ind(a, b, equal_var=False)
        low, high = test.confidence_interval()
        assert p == pytest.approx(test.pvalue, abs=1e-9)
        assert (found.lower, found.upper) == pytest.approx((low, high), abs=1e-6)
    if math.isfinite(p) and abs(p - 0.05) > 1e-6:
        assert (p < 0.05) == (found.lower > 0 or found.upper < 0)
    assert math.isnan(p) == math.isinf(found.lower)


@given(st.lists(st.floats(0, 1) | st.just(NAN), max_size=8))
def test_holms_correction_is_the_plain_loop_and_keeps_the_order(p: list[float]) -> None:
    found = statistics.holm(p)
    known = sorted((value, i) for i, value in enumerate(p) if value == value)
    largest = 0.0
    for rank, (value, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * value))
        assert found[i] == pytest.approx(largest)
        assert value <= found[i] <= 1 or found[i] == pytest.approx(value)
    assert [math.isnan(value) for value in found] == [math.isnan(value) for value in p]
    if known:
        larger = statistics.holm([*p, 1.0])
        assert all(larger[i] >= found[i] for _, i in known)


@given(VALUES)
def test_the_interquartile_mean_is_scipys_and_lies_inside(values: np.ndarray) -> None:
    known = values[~np.isnan(values)]
    assume(len(known))
    found = statistics.interquartile_mean(values)
    assert found == pytest.approx(stats.trim_mean(known, 0.25), abs=1e-9)
    assert known.min() - 1e-9 <= found <= known.max() + 1e-9


POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda p: tuple(map(float, p))), max_size=7)


@given(POINTS)
def test_front_and_hypervolume_are_those_of_counted_squares(points: list[tuple[float, float]]) -> None:
    array = np.array(points).reshape(-1, 2)
    front = statistics.non_dominated(array).tolist()
    better = [any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points) for p in points]
    assert front == [not b for b in better]
    squares = sum(any(x < p[0] and y < p[1] for p in points) for x in range(6) for y in range(6))
    assert statistics.hypervolume(array, (0, 0)) == squares


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_the_probability_of_improvement_and_of_its_reverse_are_one_together(a: list[int], b: list[int]) -> None:
    one, other = (np.array(x, dtype=np.float64)[:, None] for x in (a, b))
    found = statistics.probability_of_improvement(one, other)
    assert found == pytest.approx(np.mean([(x > y) + (x == y) / 2 for x in a for y in b]))
    assert found + statistics.probability_of_improvement(other, one) == pytest.approx(1)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_an_interval_over_runs_contains_its_statistic(runs: int, prompts: int, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(runs, prompts))
    found = statistics.interval_over_runs(scores)
    assert found.lower <= found.value <= found.upper
    assert found.n == runs


# -------------------------------------------------------------------------------------------------------------- steps


@st.composite
def denoising(draw: st.DrawFn) -> dict[str, Any]:
    """Two neighbouring sigmas of a schedule, as the executor has them: sigma is 1 or clearly below it."""
    sigma = draw(st.sampled_from([1.0]) | st.floats(0.02, 0.98))
    rule = draw(st.sampled_from(["sde", "cps", "dance"]))
    share = draw(st.floats(0.05 if rule == "cps" else 0.0, 0.95))
    size = draw(st.integers(1, 5))
    numbers = st.lists(st.floats(-3, 3, width=32), min_size=size, max_size=size)
    return {
        "rule": rule, "sigma": sigma, "sigma_next": sigma * share, "level": draw(st.floats(0.05, 1.0)),
        **{name: torch.tensor([draw(numbers)]) for name in ("x", "velocity", "noise")},
    }  # fmt: skip


@given(denoising(), st.sampled_from(["mean", "sum"]))
def test_the_log_density_of_a_step_is_scipys(drawn: dict[str, Any], reduction: Any) -> None:
    step = drawn["x"], drawn["velocity"], drawn["sigma"], drawn["sigma_next"], drawn["level"], drawn["rule"]
    found = flow.step(*step, noise=drawn["noise"], reduction=reduction)
    y, mean, std = (value.double().numpy() for value in (found.x_next, found.mean, found.std))
    densities = np.asarray(stats.norm.logpdf(y, mean, std))
    expected = densities.mean() if reduction == "mean" else densities.sum()
    # x_next is rounded to float32: the noise that is read back from it is off by 1e-7 |x| / std.
    assert found.log_prob.item() == pytest.approx(expected, abs=1e-4 * (1 + abs(expected)))
    assert flow.log_prob(found.x_next, found.mean, found.std, reduction=reduction).item() == found.log_prob.item()


@given(denoising())
def test_the_law_of_a_step_is_that_of_the_rules_formula(drawn: dict[str, Any]) -> None:
    """In float64 and by the reverse-time SDE's drift, where the code has the papers' forms."""
    x, v = (drawn[name].double().numpy() for name in ("x", "velocity"))
    s, s_next, level = drawn["sigma"], drawn["sigma_next"], drawn["level"]
    x0, x1 = x - s * v, x + (1 - s) * v
    if drawn["rule"] == "cps":
        std = s_next * math.sin(level * math.pi / 2)
        mean = (1 - s_next) * x0 + s_next * math.cos(level * math.pi / 2) * x1
    else:
        g = level if drawn["rule"] == "dance" else level * math.sqrt(s / (1 - (s if s < 1 else s_next)))
        std, mean = g * math.sqrt(s - s_next), x + (v + g**2 / (2 * s) * x1) * (s_next - s)
    found = flow.moments(drawn["x"], drawn["velocity"], s, s_next, level, drawn["rule"])
    np.testing.assert_allclose(found[0].numpy(), mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1].numpy().flatten(), std, rtol=1e-4)


@given(st.integers(1, 60), st.floats(0.2, 10))
def test_a_schedule_falls_from_one_to_zero_whatever_its_shift(steps: int, shift: float) -> None:
    found = flow.sigmas(steps, shift)
    assert (len(found), float(found[0]), float(found[-1])) == (steps + 1, 1.0, 0.0)
    assert bool((found.diff() < 0).all())
