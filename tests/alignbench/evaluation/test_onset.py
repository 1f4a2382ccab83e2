"""Where over-optimisation sets in: planted turns are found, and chance is not taken for one."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from alignbench import run
from alignbench.evaluation.curve import KINDS, read_curve
from alignbench.evaluation.onset import onset, onsets
from tests.support.plugins import toy_config, write_task

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


def test_false_onsets_are_rare_though_the_best_evaluation_is_taken() -> None:
    rng, false, trials = np.random.default_rng(1), 0, 400
    for _ in range(trials):
        rewards = np.linspace(0, 1, 9)[:, None] + rng.normal(0, 0.1, (9, 16))
        false += onset(range(9), rewards, rng.normal(0, 0.1, (9, 16)) + rng.normal(0, 0.3, 16), seed=0).over_optimised
    # One-sided level 2.5 %; three standard errors.
    assert false / trials <= 0.025 + 3 * (0.025 * 0.975 / trials) ** 0.5


def test_an_onset_needs_two_evaluations_and_four_prompts() -> None:
    with pytest.raises(ValueError, match="two evaluations and four prompts, got 1 and 8"):
        onset([0], np.zeros((1, 8)), np.zeros((1, 8)))


def planted_curve(prompts: int = 12) -> pd.DataFrame:
    """A reward that rises; one judge turns at iteration 20, one rises, one of which lower is better turns at 10."""
    rng = np.random.default_rng(3)
    means = {
        "reward": [0.1, 0.3, 0.5, 0.7],
        "turns": [0.5, 0.6, 0.7, 0.5],
        "rises": [0.1, 0.2, 0.3, 0.4],
        "error": [0.4, 0.2, 0.3, 0.4],
        "path_kl": [0.0, 1.0, 2.0, 3.0],
    }
    rows = [
        (10 * i, 100 * i, 1.0 * i, p, f"prompt {p}", metric, value + rng.normal(0, 0.01))
        for metric, values in means.items()
        for i, value in enumerate(values)
        for p in range(prompts)
    ]
    return pd.DataFrame(rows, columns=list(KINDS))


def test_the_onsets_of_a_run_are_those_of_its_independent_metrics() -> None:
    found = {each.metric: each for each in onsets(planted_curve(), ["reward"], {"turns": True, "rises": True, "error": False})}
    assert {name: each.over_optimised for name, each in found.items()} == {"turns": True, "rises": False, "error": True}
    turn, error = found["turns"], found["error"]
    assert (turn.iteration, turn.lower, turn.upper) == (20, 20, 20)
    assert turn.fall.value == pytest.approx(0.2, abs=0.02)
    assert error.iteration == 10
    assert error.fall.value == pytest.approx(0.2, abs=0.02)
    assert turn.sentence.startswith("turns is best at iteration 20 and then gets worse by 0.")
    assert turn.sentence.endswith("while reward goes on rising")


def test_metrics_without_a_direction_or_with_too_few_prompts_have_no_onset() -> None:
    assert onsets(planted_curve(), ["reward"], {"path_kl": None, "absent": True}) == []
    assert onsets(planted_curve(3), ["reward"], {"turns": True}) == []
    assert onsets(planted_curve(), ["another"], {"turns": True}) == []


def test_a_metric_without_some_prompts_is_paired_on_the_others() -> None:
    table = planted_curve()
    table = table[(table["metric"] != "turns") | (table["prompt_index"] % 2 == 0)]
    (found,) = onsets(table, ["reward"], {"turns": True})
    assert (found.fall.n, found.iteration) == (6, 20)


def test_a_run_records_the_onsets_of_its_own_curve(tmp_path: Path) -> None:
    evaluation = {"prompts": 6, "images_per_prompt": 3, "steps": 4, "every": 2, "validation_images": 3}
    result = run(toy_config(write_task(tmp_path), iterations=4, evaluation=evaluation), tmp_path / "run")
    curve = read_curve(tmp_path / "run")
    assert curve is not None
    assert result.onsets == onsets(curve, ["brightness"], {"pixel_diversity": True, "lgmd": True})
    assert [each.metric for each in result.onsets] == ["pixel_diversity", "lgmd"]
    plain = run(toy_config(write_task(tmp_path), iterations=2), tmp_path / "plain")
    assert plain.onsets == []
