"""Comparison at equal reward on hand-made curves, and its error rates on simulated ones."""

import numpy as np
import pandas as pd
import pytest

from alignbench.comparison.curves import (
    ROWS,
    RunCurve,
    at_levels,
    best_strengths,
    equal_reward_differences,
    front_areas,
    hypervolume,
    onset,
    point_at,
    reward_levels,
    rows_to_reward,
)


def curve(rewards: list[float], diversity: list[float], *, method: str = "a", strength: str = "", seed: int = 0) -> RunCurve:
    points = pd.DataFrame({"reward": rewards, "diversity": diversity, ROWS: 100.0 * np.arange(len(rewards))})
    return RunCurve(method, strength, seed, points)


def test_a_level_is_read_where_the_reward_first_reaches_it() -> None:
    points = curve([0.0, 0.4, 0.2, 0.8], [1.0, 0.8, 0.9, 0.2]).points
    point = point_at(points, "reward", 0.3)
    assert point is not None
    assert point["diversity"] == pytest.approx(0.85)
    assert point[ROWS] == pytest.approx(75)
    later = point_at(points, "reward", 0.6)  # between 0.2 and 0.8
    assert later is not None
    assert later["diversity"] == pytest.approx(0.9 - 0.7 * 2 / 3)
    assert point_at(points, "reward", 0.9) is None


def test_a_level_that_the_base_model_has_is_read_there() -> None:
    point = point_at(curve([0.5, 0.6], [1.0, 0.9]).points, "reward", 0.4)
    assert point is not None
    assert point[ROWS] == 0


def test_levels_lie_between_the_base_model_and_the_best_methods_mean() -> None:
    curves = [curve([0.2, 0.6], [1, 1], seed=0), curve([0.2, 1.0], [1, 1], seed=1), curve([0.2, 0.4], [1, 1], method="b")]
    assert reward_levels(curves, "reward", [0.5, 1.0]) == pytest.approx([0.5, 0.8])
    assert reward_levels([curve([0.2, 0.1], [1, 1])], "reward") == []


def test_differences_at_equal_reward_are_paired_by_seed_and_count_who_reaches_it() -> None:
    curves = [
        *(curve([0.0, 1.0], [1.0, 0.5 + 0.1 * seed], method="a", seed=seed) for seed in range(3)),
        *(curve([0.0, 1.0], [1.0, 0.3 + 0.1 * seed], method="b", seed=seed) for seed in range(2)),
        curve([0.0, 0.4], [1.0, 0.5], method="b", seed=2),
    ]
    table = at_levels(curves, "reward", [0.5, 1.0], ["diversity"])
    rows = equal_reward_differences(table).set_index(["level", "metric"])
    half = rows.xs((0.5, "diversity"))
    assert (half["reached_first"], half["reached_second"], half["seeds"], half["n"]) == (3, 2, 3, 2)
    # At half the way the diversity has fallen by half: 0.1 apart for both seeds, which have no spread.
    assert half["difference"] == pytest.approx(0.1)
    assert rows.xs((1.0, "diversity"))["difference"] == pytest.approx(0.2)
    assert rows.xs((0.5, ROWS))["difference"] == pytest.approx(0.0)
    assert (rows["tests"] == 2).all()


def test_a_strength_is_chosen_by_the_other_seeds() -> None:
    """Strength y is best on seed 0 by luck alone; there the choice is made by seeds 1 and 2."""
    values = {("x", 0): 0.5, ("x", 1): 0.6, ("x", 2): 0.6, ("y", 0): 0.9, ("y", 1): 0.4, ("y", 2): 0.4}
    rows = [("a", strength, seed, 0.5, "diversity", value) for (strength, seed), value in values.items()]
    table = pd.DataFrame(rows, columns=["method", "strength", "seed", "level", "metric", "value"])
    chosen = best_strengths(table, {"diversity": True}).set_index("seed")
    assert chosen.loc[0, "value"] == 0.5
    assert list(chosen["strength"]) == ["x", "y", "y"]  # seeds 1 and 2 see 0.9 beside 0.4: a mean of 0.65


def test_rows_to_a_reward_are_censored_where_it_is_not_reached() -> None:
    curves = [
        curve([0.0, 1.0], [1, 1], seed=0),
        curve([0.0, 0.5, 1.0], [1, 1, 1], seed=1),
        curve([0.0, 0.1, 0.2], [1, 1, 1], seed=2),
    ]
    (row,) = rows_to_reward(curves, "reward", [0.5])
    assert (row.reached, row.seeds, row.median, row.budget) == (2, 3, 100, 200)
    (never,) = rows_to_reward(curves, "reward", [0.9])
    assert (never.reached, never.median) == (2, 180)
    assert rows_to_reward(curves[1:], "reward", [1.5])[0].median == np.inf


def test_hypervolume_of_three_points_by_hand() -> None:
    rewards, diversity = np.array([0.2, 0.5, 0.4]), np.array([0.9, 0.4, 0.3])
    # (0.2 x 0.9) + (0.5 - 0.2) x 0.4; the third point is below the second.
    assert hypervolume(rewards, diversity, (0.0, 0.0)) == pytest.approx(0.2 * 0.9 + 0.3 * 0.4)
    assert hypervolume(rewards, diversity, (0.5, 0.0)) == 0.0


def test_the_area_of_a_method_counts_all_its_strengths() -> None:
    curves = [
        curve([0.0, 0.5], [1.0, 0.8], strength="x"),
        curve([0.0, 1.0], [1.0, 0.4], strength="y"),
        curve([0.0, 0.5], [1.0, 0.5], method="b"),
    ]
    areas = front_areas(curves, "reward", "diversity")
    assert areas["a"].value == pytest.approx(0.5 * (0.8 - 0.4))
    assert areas["b"].value == pytest.approx(0.5 * 0.1)


def test_equal_methods_differ_as_rarely_as_the_level_says() -> None:
    """Comparisons of two equal methods, five seeds, curves that are noisy in reward and diversity; 2,000 gave the same."""
    rng, rejected, trials = np.random.default_rng(0), 0, 300
    steps = np.linspace(0, 1, 6)
    for _ in range(trials):
        curves = [
            curve(list(steps + rng.normal(0, 0.05, 6)), list(1 - 0.5 * steps + rng.normal(0, 0.05, 6)), method=m, seed=s)
            for m in "ab"
            for s in range(5)
        ]
        table = at_levels(curves, "reward", [0.6], ["diversity"])
        rows = equal_reward_differences(table)
        rejected += int((rows.loc[rows.metric == "diversity", "p_holm"] < 0.05).iloc[0])
    # Two standard errors at 5 %.
    assert rejected / trials <= 0.05 + 2 * (0.05 * 0.95 / trials) ** 0.5


def test_a_curve_of_one_evaluation_is_refused() -> None:
    with pytest.raises(ValueError, match="a, seed 0: a curve needs at least two evaluations"):
        at_levels([curve([0.1], [1.0])], "reward", [0.5], ["diversity"])


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


def test_false_onsets_are_as_rare_as_said_though_the_best_of_many_is_taken() -> None:
    rng, false, trials = np.random.default_rng(1), 0, 400
    for _ in range(trials):
        rewards = np.linspace(0, 1, 9)[:, None] + rng.normal(0, 0.1, (9, 16))
        false += onset(range(9), rewards, rng.normal(0, 0.1, (9, 16)) + rng.normal(0, 0.3, 16), seed=0).over_optimised
    # One-sided level 2.5 %; three standard errors.
    assert false / trials <= 0.025 + 3 * (0.025 * 0.975 / trials) ** 0.5


def test_an_onset_needs_two_evaluations_and_four_prompts() -> None:
    with pytest.raises(ValueError, match="two evaluations and four prompts, got 1 and 8"):
        onset([0], np.zeros((1, 8)), np.zeros((1, 8)))
