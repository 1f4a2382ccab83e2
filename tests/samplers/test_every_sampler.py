"""What holds for every sampler that ships, whichever those are."""

import json

import numpy as np
import pytest
import torch

from alignbench import Sampler, load_sampler, registry, rollout
from alignbench.config.run_config import load_config, presets
from alignbench.testing import hand_made_forest
from tests.support.toys import PROMPTS, ToyBackbone

CASES = [(name, preset) for name in registry.names("samplers") for preset in presets()]
every_case = pytest.mark.parametrize(("name", "preset"), CASES)


def sampler(name: str, preset: str, **settings: object) -> Sampler:
    return load_sampler(name, **load_config(preset=preset, options={"sampler": name}).sampler.settings, **settings)


def test_all_are_tried() -> None:
    known = {
        "independent",
        "sliding_window",
        "flash",
        "fixed_tree",
        "dynamic_tree",
        "tree_window",
        "branch",
        "trunk_tree",
        "granular",
    }
    assert known <= {name for name, _ in CASES}


@every_case
def test_a_plan_costs_what_it_says_in_one_call_for_each_place_in_the_schedule(name: str, preset: str) -> None:
    toy, made = ToyBackbone(), sampler(name, preset)
    for i, progress in enumerate((0.0, 0.5, 1.0)):
        plan = made.plan(progress, np.random.default_rng(i))
        toy.reset_counters()
        forest = rollout(toy, PROMPTS, plan, seed=i)
        assert (toy.calls, toy.rows) == (len(plan.calls), plan.model_rows(2))
        assert len(forest.leaves) == 2 * plan.leaves == forest.groups * forest.group_size
        assert forest.groups == 2 * plan.groups
        # Each replay row is another state.
        rows = forest.states[forest.rows].flatten(1)
        assert len(torch.unique(rows, dim=0)) == len(rows) == plan.replay_rows(2)


@every_case
def test_the_last_step_draws_no_noise_and_the_schedule_ends_at_the_image(name: str, preset: str) -> None:
    for progress in (0.0, 0.5, 1.0):
        plan = sampler(name, preset).plan(progress, np.random.default_rng(0))
        assert not any(plan.moves[point - 1].step.stochastic for point, _ in plan.ends)
        assert plan.stochastic_steps
        assert float(ToyBackbone().sigmas(plan.schedule_indices[-1])[plan.schedule_indices[-1]]) == 0


@pytest.mark.parametrize(
    ("name", "settings"), [*((name, {}) for name in registry.names("samplers")), ("dynamic_tree", {"schedule": "reward"})]
)
def test_its_state_goes_through_a_checkpoint_and_gives_the_same_plans(name: str, settings: dict[str, object]) -> None:
    one, other = (load_sampler(name, steps=20, **settings) for _ in range(2))
    for reward in (0.9, 0.7, 0.4):
        one.observe(hand_made_forest([[reward, 0.1]], [[0], [1]], [0.0, 0.0]))
    other.load_state(json.loads(json.dumps(one.state())))
    assert other.state() == one.state()
    for i in range(20):
        assert one.plan(0.3, np.random.default_rng(i)) == other.plan(0.3, np.random.default_rng(i))
