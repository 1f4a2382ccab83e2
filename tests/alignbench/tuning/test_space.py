import numpy as np
import pytest

from alignbench.objective import Strength
from alignbench.tuning.space import (
    LR,
    UPDATES_KEY,
    Dimension,
    design,
    is_near_an_end,
    nested,
    search_space,
    settings_at,
    strength_dimension,
)


def test_the_space_of_an_objective_by_hand() -> None:
    space = search_space(1e-3, Strength("beta", (4.0, 2.0, 1.0)), 10.0, (1, 2, 4))
    assert [dimension.key for dimension in space] == [LR, UPDATES_KEY, "objective.beta"]
    assert settings_at(space, (0.5, 0.5, 0.5)) == {LR: 1e-3, UPDATES_KEY: 2, "objective.beta": 2.0}
    assert settings_at(space, (0.0, 0.99, 0.0)) == {LR: 1e-4, UPDATES_KEY: 4, "objective.beta": 1.0}


def test_an_objective_without_a_strength_varies_two_settings() -> None:
    assert [dimension.key for dimension in search_space(1e-3, None, 3.0, (1,))] == [LR, UPDATES_KEY]


def test_zero_keeps_its_share_of_a_logarithmic_range() -> None:
    dimension = strength_dimension(Strength("kl_beta", (0.1, 0.01, 0.0)))
    assert [dimension.value(place) for place in (0.0, 0.3, 1 / 3 + 1e-9, 2 / 3)] == [0.0, 0.0, 0.01, 0.03162]


def test_a_range_with_negative_values_is_linear() -> None:
    dimension = strength_dimension(Strength("aim", (-1.0, 3.0)))
    assert [dimension.value(place) for place in (0.0, 0.5, 0.75)] == [-1.0, 1.0, 2.0]


def test_whole_values_stay_whole() -> None:
    value = strength_dimension(Strength("rank", (2, 8, 32))).value(0.4)
    assert (value, type(value)) == (6, int)


@pytest.mark.parametrize(("values", "taken"), [((0.0, 0.5), {0.0, 0.5}), ((2.0,), {2.0})])
def test_values_that_span_no_range_are_taken_as_they_are(values: tuple[float, ...], taken: set[float]) -> None:
    dimension = strength_dimension(Strength("beta", values))
    assert {dimension.value(place) for place in (0.0, 0.4, 0.6, 0.999)} == taken


def test_a_longer_design_begins_with_the_shorter_one() -> None:
    assert np.array_equal(design(20)[:7], design(7))


def test_each_third_of_each_setting_has_its_share_of_27_trials() -> None:
    thirds = (design(27) * 3).astype(int)
    counts = [[int((thirds[:, axis] == third).sum()) for third in range(3)] for axis in range(3)]
    assert np.abs(np.array(counts) - 9).max() <= 1


def test_settings_by_dotted_key_become_nested() -> None:
    assert nested({"optimizer.lr": 0.1, "updates_per_rollout": 2, "objective.beta": 3.0}) == {
        "optimizer": {"lr": 0.1},
        "updates_per_rollout": 2,
        "objective": {"beta": 3.0},
    }


def test_the_outer_twentieths_of_a_range_are_near_its_ends() -> None:
    dimension = Dimension(LR, (1e-4, 1e-2))
    assert [is_near_an_end(dimension, value) for value in (1.1e-4, 2e-4, 1e-3, 9e-3)] == [True, False, False, True]
