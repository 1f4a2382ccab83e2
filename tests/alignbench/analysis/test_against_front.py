"""How often the alarm about a loss beyond the front is false, and how often it sees one; and which run's numbers it reads."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alignbench.analysis.against_front import excess_fall
from alignbench.analysis.power import POWER, detectable
from alignbench.comparison.reading import read_results
from alignbench.statistics import ONE_SIDED_LEVEL, rise_test
from tests.alignbench.record_folders import write_run
from tests.support.fronts import hand_made_front

SIMULATIONS = 4000
Draw = Callable[[np.random.Generator, int], np.ndarray]


def normal(rng: np.random.Generator, prompts: int) -> np.ndarray:
    """Differences as those of cosine diversity."""
    return rng.normal(0.0, 0.05, prompts)


def shares_of_pairs(rng: np.random.Generator, prompts: int) -> np.ndarray:
    """Differences as those of attribute_difference with eight images: shares of their 28 pairs that differ."""
    before, after = rng.binomial(28, 0.6, (2, prompts)) / 28
    return np.asarray(before - after)


def shares_of_modes(rng: np.random.Generator, prompts: int) -> np.ndarray:
    """Differences as those of the toy's modes: six for each prompt, each lost in one of the two models with a probability."""
    before, after = rng.binomial(6, 0.8, (2, prompts)) / 6
    return np.asarray(before - after)


def alarm_rate(draw: Draw, prompts: int, fall: float) -> float:
    rng = np.random.default_rng(prompts)
    return float(np.mean([rise_test([draw(rng, prompts) + fall]) < ONE_SIDED_LEVEL for _ in range(SIMULATIONS)]))


@pytest.mark.parametrize(
    ("draw", "prompts"), [(normal, 48), (shares_of_pairs, 48), (shares_of_pairs, 12), (shares_of_modes, 4)]
)
def test_alarms_are_false_at_their_level_and_find_the_fall_that_is_told(draw: Draw, prompts: int) -> None:
    deviation = float(draw(np.random.default_rng(0), 100_000).std())
    told = detectable(deviation, prompts, paired=True, level=2 * ONE_SIDED_LEVEL)
    error = 3 * (ONE_SIDED_LEVEL * (1 - ONE_SIDED_LEVEL) / SIMULATIONS) ** 0.5
    assert alarm_rate(draw, prompts, 0.0) <= ONE_SIDED_LEVEL + error
    # Power is that of normal differences; those that are shares are discrete, which moves it by a few per cent.
    assert alarm_rate(draw, prompts, told) == pytest.approx(POWER, abs=0.05)


def test_a_run_is_compared_by_its_own_numbers_where_another_seed_has_none(tmp_path: Path) -> None:
    # The front has reward 0.4 to 0.8 and LGMD 0.4 to 0.2 on both prompts; all runs have reward 0.6, where it asks for 0.3.
    front = hand_made_front({"reward": [[0.4, 0.4], [0.8, 0.8]], "lgmd": [[0.4, 0.4], [0.2, 0.2]]})
    front = replace(front, record=front.record.model_copy(update={"rewards": {"ocr": 1.0}}))
    for seed, final in enumerate((0.3, 0.2, 0.1)):
        write_run(tmp_path / str(seed), seed=seed, reward=(0.6, 0.6), lgmd=(final, final))
    (tmp_path / "1" / "evals.parquet").write_bytes(b"damaged")
    results = read_results(tmp_path)
    falls = {run.result.run.seed: excess_fall(results, run, front, "lgmd") for run in results.runs}
    # The base model has 0.4 and 0.5, so that the runs fell by 0.1 to 0.4, of which the front explains 0.1.
    assert falls[0].tolist() == pytest.approx([0.0, 0.1])
    assert falls[2].tolist() == pytest.approx([0.2, 0.3])
    assert np.isnan(falls[1]).all()
