"""The rule `memoryless` and several roots, in every sampler that takes them."""

from typing import Any

import numpy as np
import pytest

from alignbench import UserError, load_sampler

RNG = np.random.default_rng(0)
SAMPLERS = ["independent", "fixed_tree", "dynamic_tree", "branch", "sliding_window", "flash", "tree_window"]
GEOMETRY: dict[str, Any] = {"dynamic_tree": {"early": (1, 2), "late": (1, 4)}, "fixed_tree": {"splits": (1, 3)}}
TREES = ["fixed_tree", "dynamic_tree", "tree_window"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_memoryless_noise_without_a_level(name: str) -> None:
    plan = load_sampler(name, rule="memoryless").plan(0.5, np.random.default_rng(0))
    noisy = [step for step in plan.steps if step.stochastic]
    assert noisy
    assert {(step.rule, step.eta) for step in noisy} == {("memoryless", 1.0)}
    assert not plan.steps[-1].stochastic


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
