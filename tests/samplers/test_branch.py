import numpy as np
import pytest

from alignbench import UserError, load_sampler

RNG = np.random.default_rng(0)


def test_every_step_but_the_last_draws_noise_and_some_split() -> None:
    plan = load_sampler("branch", steps=5, children=2, splits=(0, 2), noise_level=0.3, split_noise_level=0.9).plan(0.0, RNG)
    assert [s.children for s in plan.steps] == [2, 1, 2, 1, 1]
    assert [s.noise_level for s in plan.steps] == [0.9, 0.3, 0.9, 0.3, 0.0]
    # 1 + 2 + 2 + 4 + 4 rows, of which the last draws no noise.
    assert (plan.roots, plan.leaves, plan.model_rows(), plan.replay_rows()) == (1, 4, 13, 9)


def test_the_published_geometry() -> None:
    plan = load_sampler(
        "branch", steps=20, children=2, levels=4, splits=(0, 3, 6, 9), rule="dance", noise_level=0.3
    ).plan(0.0, RNG)  # fmt: skip
    assert plan.leaves == 16
    # Model rows for each leaf over the steps, 13.68 in its table: 1 + 3 x (2 + 4 + 8) + 10 x 16 = 203 rows, 12.7 a leaf.
    assert plan.model_rows() == 203


@pytest.mark.parametrize("splits", [(0,), (0, 0), (0, 5)])
def test_splits_that_do_not_fit_are_refused(splits: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"splits must be 2 different steps between 0 and 4, got"):
        load_sampler("branch", splits=splits)
