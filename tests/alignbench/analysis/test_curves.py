"""Comparison at equal reward on hand-made curves, and its error rates on simulated ones."""

import numpy as np
import pandas as pd
import pytest

from alignbench.analysis.curves import (
    ROWS,
    RunCurve,
    at_levels,
    best_strengths,
    common_level,
    equal_reward_differences,
    front_areas,
    onset_frame,
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
    # Differences without spread have no t test, by the rule of `statistics.one_sample`.
    assert rows["p"].isna().all()
    assert (rows["tests"] == 0).all()


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


def test_rows_to_a_reward_count_each_seed_at_the_fastest_strength_of_others() -> None:
    curves = [
        *(curve([0.0, 1.0], [1, 1], strength="fast", seed=seed) for seed in range(3)),
        *(curve([0.0, 0.1, 0.2], [1, 1, 1], strength="slow", seed=seed) for seed in range(3)),
    ]
    (row,) = rows_to_reward(curves, "reward", [0.5])
    assert (row.reached, row.seeds, row.median, row.budget) == (3, 3, 50, 200)


def test_every_run_reaches_the_common_level_at_some_strength() -> None:
    curves = [
        curve([0.0, 0.3], [1, 1], strength="x"),
        curve([0.0, 0.9, 0.5], [1, 1, 1], strength="y"),
        curve([0.0, 0.6], [1, 1], method="b"),
    ]
    assert common_level(curves, "reward") == 0.6
    assert common_level([*curves, curve([0.0, -0.1], [1, 1], method="c")], "reward") is None


def test_the_onset_is_told_over_seeds() -> None:
    """The judge is best at the second of three evaluations with both seeds, and 0.3 below that at the end."""
    rows = [
        (10 * e, 100 * e, 1.0, p, "x", metric, value + 0.01 * ((p * (e + 1)) % 4))
        for metric, values in (("reward", [0.0, 0.5, 0.9]), ("judge", [0.5, 0.8, 0.5]))
        for e, value in enumerate(values)
        for p in range(8)
    ]
    table = pd.DataFrame(rows, columns=["iteration", "model_rows", "seconds", "prompt_index", "prompt", "metric", "value"])
    curves = [curve([0.0, 0.5, 0.9], [1, 1, 1], seed=seed) for seed in range(2)]
    tables = {("a", "", seed): table for seed in range(2)}
    (row,) = onset_frame(curves, tables, "reward", {"judge": True, "missing": True}).to_dict("records")
    assert (row["iteration"], row["earliest"], row["latest"], row["over_optimised"], row["seeds"]) == (10, 10, 10, 2, 2)
    assert row["value"] == pytest.approx(0.3, abs=0.011)


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
