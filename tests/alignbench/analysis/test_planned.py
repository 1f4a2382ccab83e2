"""Planned contrasts on hand-made curves, with each of the four answers."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from alignbench.analysis.curves import ROWS, RunCurve
from alignbench.analysis.planned import Answer, planned_frame
from alignbench.comparison.grid import Contrast

DIRECTIONS = {"diversity": True, "judge": True}


def curve(method: str, seed: int, best: float, diversity: float, strength: str = "") -> RunCurve:
    """From reward 0.5 and diversity 1 at the base model to `best` and `diversity`, with as much of another metric."""
    points = pd.DataFrame({"reward": [0.5, best], "diversity": [1.0, diversity], "judge": [2.0, 2.0], ROWS: [0.0, 100.0]})
    return RunCurve(method, strength, seed, points)


def answered(curves: list[RunCurve], *contrasts: Contrast) -> pd.DataFrame:
    return planned_frame(curves, contrasts or (Contrast(first="a", second="b"),), "reward", "diversity", DIRECTIONS)


def test_the_level_is_the_highest_that_both_reach_whatever_a_third_method_does() -> None:
    """At 0.7, half of a's way and all of b's: a has 1 - 0.1 (1 + seed / 10), b 0.6."""
    curves = [curve("a", seed, 0.9, 0.8 - 0.02 * seed) for seed in range(3)]
    curves += [curve("b", seed, 0.7, 0.6) for seed in range(3)]
    curves += [curve("c", seed, 0.4, 0.2) for seed in range(3)]
    (row,) = answered(curves).to_dict("records")
    apart = np.array([0.3, 0.29, 0.28])
    low, high = stats.t.interval(0.95, 2, apart.mean(), stats.sem(apart))
    assert (row["level"], row["gain"]) == (pytest.approx(0.7), pytest.approx(0.2))
    assert [row[key] for key in ("value", "lower", "upper", "n")] == pytest.approx([0.29, low, high, 3])
    assert row["p"] == pytest.approx(stats.ttest_1samp(apart, 0).pvalue)
    assert row["matters"] == pytest.approx(0.1)
    assert row["answer"] == Answer.MORE
    (turned,) = answered(curves, Contrast(first="b", second="a")).to_dict("records")
    assert (turned["answer"], turned["value"]) == (Answer.LESS, pytest.approx(-0.29))


@pytest.mark.parametrize(("spread", "answer"), [(0.01, Answer.NONE), (0.3, Answer.UNKNOWN)])
def test_no_difference_is_an_answer_only_where_one_that_matters_would_have_been_seen(spread: float, answer: Answer) -> None:
    """Five seeds with a deviation of the differences s find 1.68 s in 80 % of cases (two-sided t test, noncentral t)."""
    curves = [curve("a", seed, 0.9, 0.6 + spread * (seed - 2)) for seed in range(5)]
    curves += [curve("b", seed, 0.9, 0.6) for seed in range(5)]
    (row,) = answered(curves).to_dict("records")
    deviation = spread * 2.5**0.5
    shift = row["detectable"] / deviation * 5**0.5
    assert stats.nct.sf(stats.t.ppf(0.975, 4), 4, shift) == pytest.approx(0.8, abs=1e-3)
    assert row["answer"] == answer


def test_a_run_below_the_base_model_leaves_the_answer_unknown_and_single_seeds_too() -> None:
    curves = [curve("a", 0, 0.9, 0.6), curve("a", 1, 0.4, 0.6), curve("b", 0, 0.9, 0.5), curve("b", 1, 0.9, 0.5)]
    (row,) = answered(curves).to_dict("records")
    assert np.isnan([row["level"], row["value"], row["p"]]).all()
    assert (row["n"], row["answer"]) == (0, Answer.UNKNOWN)
    (single,) = answered([curves[0], curves[2]]).to_dict("records")
    assert (single["n"], single["value"], single["answer"]) == (1, pytest.approx(0.1), Answer.UNKNOWN)


def test_of_a_sweep_the_strength_that_does_best_on_the_other_seeds_counts() -> None:
    """On seed 0 the strength "1" is better, on the two others "2" is, so seed 0 counts "2" and the others their mean's best."""
    values = {"1": [0.9, 0.5, 0.5], "2": [0.7, 0.8, 0.8]}
    curves = [curve("a", seed, 0.9, of_seed[seed], strength) for strength, of_seed in values.items() for seed in range(3)]
    curves += [curve("b", seed, 0.9, 0.6) for seed in range(3)]
    (row,) = answered(curves).to_dict("records")
    assert row["value"] == pytest.approx(((0.7 - 0.6) + (0.8 - 0.6) + (0.8 - 0.6)) / 3)


def test_p_is_corrected_over_all_contrasts_and_what_is_not_recorded_is_left_out() -> None:
    rng = np.random.default_rng(0)
    curves = [curve(m, seed, 0.9, 0.6 + 0.1 * rng.random()) for m in "abc" for seed in range(4)]
    pairs = [Contrast(first="a", second="b"), Contrast(first="a", second="c"), Contrast(first="b", second="c")]
    frame = answered(curves, *pairs, Contrast(first="a", second="d"), Contrast(first="a", second="b", metric="other"))
    assert len(frame) == 3
    smallest = min(frame.to_dict("records"), key=lambda row: row["p"])
    assert smallest["p_holm"] == pytest.approx(min(1.0, 3 * smallest["p"]))
    judged = answered(curves, Contrast(first="a", second="b", metric="judge", matters=0.05))
    assert judged.loc[0, "matters"] == pytest.approx(0.1)
    assert judged.loc[0, "answer"] == Answer.NONE  # all are equal
    assert planned_frame(curves, [], "reward", "diversity", DIRECTIONS).empty
