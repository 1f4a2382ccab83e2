import numpy as np
import pytest

from alignbench import UserError, load_sampler

RNG = np.random.default_rng(0)


def test_by_default_a_3x3x3_tree_at_steps_1_3_4_costs_44_rows_and_13_in_replay() -> None:
    plan = load_sampler("fixed_tree").plan(0.0, RNG)
    assert plan.splits == plan.stochastic_steps == (1, 3, 4)
    assert (plan.roots, plan.leaves, plan.model_rows(), plan.replay_rows()) == (1, 27, 44, 13)


def test_splitting_steps_carry_rule_and_noise_level_and_others_are_deterministic() -> None:
    plan = load_sampler("fixed_tree", rule="dance", noise_level=0.3).plan(0.0, RNG)
    assert [s.rule for s in plan.steps] == ["ode", "dance", "ode", "dance", "dance", "ode"]
    assert [s.eta for s in plan.steps] == [0, 0.3, 0, 0.3, 0.3, 0]
    assert [s.children for s in plan.steps] == [1, 3, 1, 3, 3, 1]


def test_the_plan_is_the_same_at_any_progress() -> None:
    sampler = load_sampler("fixed_tree", splits=(1, 2, 3))
    assert sampler.plan(0.0, np.random.default_rng(0)) == sampler.plan(1.0, np.random.default_rng(1))
    assert sampler.plan(0.0, RNG).model_rows() == 68


def test_other_geometries_are_plans_too() -> None:
    plan = load_sampler("fixed_tree", steps=8, children=2, levels=4, splits=(0, 2, 3, 6), first_split=0).plan(0.0, RNG)
    assert plan.leaves == 16
    # 1 + 2 + 2 + 4 + 8 + 8 + 8 + 16, and 1 + 2 + 4 + 8
    assert (plan.model_rows(), plan.replay_rows()) == (49, 15)


@pytest.mark.parametrize(
    ("splits", "roots", "stochastic", "rows", "replayed"),
    [
        # Three noises; their branches split at 3 and 4: 4 x 3 + 9 + 27 rows.
        ((1, 3, 4), 3, (3, 4), 48, 3 + 9),
        ((1, 2, 3), 3, (2, 3), 3 * 3 + 9 + 27 + 27, 3 + 9),
        ((4, 3, 1), 3, (3, 4), 48, 3 + 9),
        # A first split at step 2 or later is a split like the others.
        ((2, 3, 4), 1, (2, 3, 4), 42, 13),
    ],
)
def test_an_early_first_split_may_be_initial_noises_as_in_the_released_code(
    splits: tuple[int, ...], roots: int, stochastic: tuple[int, ...], rows: int, replayed: int
) -> None:
    plan = load_sampler("fixed_tree", splits=splits, early_split="roots").plan(0.0, RNG)
    assert (plan.roots, plan.leaves, plan.stochastic_steps) == (roots, 27, stochastic)
    assert (plan.model_rows(), plan.replay_rows()) == (rows, replayed)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"splits": (1, 3)}, r"splits must be 3 different steps between 1 and 4, got \[1, 3\]"),
        ({"splits": (1, 3, 3)}, r"splits must be 3 different steps between 1 and 4, got \[1, 3, 3\]"),
        ({"splits": (1, 3, 3, 4)}, r"splits must be 3 different steps between 1 and 4, got \[1, 3, 3, 4\]"),
        ({"splits": (0, 3, 4)}, r"splits must be 3 different steps between 1 and 4, got \[0, 3, 4\]"),
        ({"splits": (1, 3, 5)}, r"splits must be 3 different steps between 1 and 4, got \[1, 3, 5\]"),
        ({"splits": (1, 2, 3, 4, 5), "levels": 5}, r"levels=5 splits do not fit into steps 1..4 of 6; raise steps"),
        ({"children": 5}, r"children \*\* levels = 5\*\*3 = 125 leaves exceed max_leaves=81"),
        ({"children": 1}, r"sampler fixed_tree: children: .*greater than or equal to 2, got 1"),
        ({"levels": 1, "splits": (1,), "early_split": "roots"}, "early_split=roots leaves no stochastic step of levels=1"),
        ({"levels": 0, "splits": ()}, r"sampler fixed_tree: levels: .*greater than or equal to 1, got 0"),
    ],
)
def test_geometries_that_cannot_work_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_sampler("fixed_tree", **settings)
