"""The rule `memoryless` and several roots, in every sampler that takes them."""

from typing import Any

import numpy as np
import pytest

from alignbench import UserError, load_sampler

RNG = np.random.default_rng(0)
TRUNKS = ["trunk_tree", "granular"]
SAMPLERS = ["independent", "fixed_tree", "dynamic_tree", "branch", "sliding_window", "flash", "tree_window", *TRUNKS]
GEOMETRY: dict[str, Any] = {"dynamic_tree": {"early": (1, 2), "late": (1, 4)}, "fixed_tree": {"splits": (1, 3)}}
TREES = ["fixed_tree", "dynamic_tree", "tree_window"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_memoryless_noise_without_a_level(name: str) -> None:
    plan = load_sampler(name, rule="memoryless").plan(0.5, np.random.default_rng(0))
    noisy = [move.step for move in plan.moves if move.step.stochastic]
    assert noisy
    assert {(step.rule, step.eta) for step in noisy} == {("memoryless", 1.0)}
    assert not any(plan.moves[point - 1].step.stochastic for point, _ in plan.ends)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_level_beside_memoryless_noise_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="rule memoryless fixes the noise of each step; leave noise_level out"):
        load_sampler(name, rule="memoryless", noise_level=0.7)


def test_a_schedule_that_changes_the_noise_is_refused_with_memoryless_noise() -> None:
    with pytest.raises(UserError, match="schedule=reward changes the noise"):
        load_sampler("dynamic_tree", rule="memoryless", schedule="reward")


@pytest.mark.parametrize("name", TREES)
def test_a_group_can_be_several_trees_with_noises_of_their_own(name: str) -> None:
    one, three = (load_sampler(name, roots=roots, levels=2, **GEOMETRY.get(name, {})) for roots in (1, 3))
    plans = [sampler.plan(0.0, np.random.default_rng(0)) for sampler in (one, three)]
    assert [plan.roots for plan in plans] == [1, 3]
    assert plans[1].leaves == 3 * plans[0].leaves
    assert plans[1].model_rows() == 3 * plans[0].model_rows()


def test_roots_that_exceed_the_largest_number_of_leaves_are_refused() -> None:
    with pytest.raises(UserError, match=r"4 trees of children \*\* levels = 3\*\*3 = 108 leaves exceed max_leaves=81"):
        load_sampler("fixed_tree", roots=4)


@pytest.mark.parametrize(
    ("name", "settings", "etas"),
    # 0.4 (1 + 1.5 j / 3) for j = 0, 1, 2 is 0.4, 0.6, 0.8.
    [
        ("fixed_tree", {"splits": (1, 3, 4)}, {1: 0.4, 3: 0.6, 4: 0.8}),
        ("tree_window", {}, {1: 0.4, 2: 0.6, 3: 0.8}),
        ("dynamic_tree", {"kappa": 0.0}, {1: 0.4, 2: 0.6, 3: 0.8}),
        ("fixed_tree", {"splits": (1, 3, 4), "early_split": "roots"}, {3: 0.6, 4: 0.8}),
    ],
)
def test_the_noise_of_a_tree_grows_with_the_depth_of_its_splits(name: str, settings: Any, etas: dict[int, float]) -> None:
    plan = load_sampler(name, rule="sde", noise_level=0.4, noise_slope=1.5, **settings).plan(0.0, RNG)
    assert {t: step.eta for t, step in enumerate(plan.steps) if step.stochastic} == pytest.approx(etas)


def test_between_the_splits_of_branch_the_noise_does_not_grow() -> None:
    sampler = load_sampler("branch", noise_level=0.2, split_noise_level=0.4, noise_slope=1.0, splits=(2, 0))
    assert [step.eta for step in sampler.plan(0.0, RNG).steps] == pytest.approx([0.4, 0.2, 0.6, 0.2, 0.2, 0.0])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"noise_slope": -1.5}, "noise_slope=-1.5 leaves the last of levels=3 splits no noise; raise it"),
        ({"noise_slope": 1.0, "rule": "memoryless"}, "noise_slope changes the noise, which rule=memoryless fixes"),
    ],
)
def test_a_slope_that_leaves_no_noise_or_moves_a_fixed_one_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_sampler("fixed_tree", **settings)
