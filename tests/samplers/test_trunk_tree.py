from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from alignbench import Plan, UserError, load_objective, load_sampler
from alignbench.rollouts.executor import rollout
from tests.support.toys import PROMPTS, ToyBackbone

RNG = np.random.default_rng(0)


def plan(**settings: object) -> Plan:
    return load_sampler("trunk_tree", **settings).plan(0.0, RNG)


def test_the_published_setting_costs_1116_rows_for_216_images_of_a_prompt() -> None:
    # Each of 4 trunks is evaluated at steps 0 to 8. Six branches leave at each and have 9, 8, ..., 1 steps left: 6 * 45.
    made = plan(steps=10, roots=4, children=6)
    assert (made.leaves, made.model_rows(), made.model_rows(3)) == (216, 4 * (9 + 6 * 45), 3 * 1116)
    assert (made.groups, made.leaves // made.groups) == (9, 24)
    # One scored step for each image; 36 states serve 216 of them.
    assert (made.path_length, made.replay_rows(), len(made.calls)) == (1, 36, 10)
    # At step t the trunks, and six branches from each of the t earlier steps.
    assert made.rows_of_calls == (*(4 + 24 * t for t in range(9)), 216)


def test_branches_may_leave_at_some_steps_only() -> None:
    # The trunk is evaluated at steps 0 to 2; branches leave at 1 and 2, with 4 and 3 of six steps left.
    made = plan(steps=6, roots=1, children=2, first_branch=1, last_branch=2)
    assert (made.leaves, made.model_rows(), made.replay_rows(), made.groups) == (4, 3 + 2 * (4 + 3), 2, 2)
    assert made.splits == (1, 2)


def test_compared_over_the_whole_prompt_the_images_are_one_group() -> None:
    made, apart = plan(compare="prompt"), plan()
    assert (made.groups, apart.groups, made.leaves) == (1, 5, 30)
    assert made.moves == apart.moves


def test_each_image_replays_the_step_at_which_it_left_its_trunk() -> None:
    toy = ToyBackbone()
    forest = rollout(toy, PROMPTS, plan(steps=4, roots=2, children=3, rule="sde"), seed=0)
    assert (forest.groups, forest.group_size) == (6, 6)
    assert forest.prompts == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    sigmas = toy.sigmas(4)
    for group in range(6):
        edges = forest.leaf_edges[group * 6 : (group + 1) * 6, 0]
        assert forest.edge_sigma[edges].tolist() == [float(sigmas[group % 3])] * 6
        assert forest.edge_sigma_next[edges].tolist() == [float(sigmas[group % 3 + 1])] * 6
        assert forest.edge_group[edges].tolist() == [group] * 6
        # Three siblings from each of the two trunks share the state and the velocity.
        assert [len(rows.unique()) for rows in forest.edge_row[edges].split(3)] == [1, 1]


def test_a_branch_is_finished_by_eulers_steps_from_its_noisy_state() -> None:
    toy = ToyBackbone()
    forest = rollout(toy, PROMPTS, plan(steps=4, roots=1, children=2), seed=0)
    sigmas = toy.sigmas(4)
    for group in range(forest.groups):
        x = forest.states[forest.edge_child[forest.leaf_edges[group * 2 : group * 2 + 2, 0]]]
        condition = toy.encode([forest.prompts[group]]).expand(2, -1)
        for t in range(group % 3 + 1, 4):
            v = toy.net(x, sigmas[t].expand(2), condition)
            x = x + (sigmas[t + 1] - sigmas[t]) * v
        assert (x - forest.leaf_latents[group * 2 : group * 2 + 2]).abs().max() < 2e-6  # a few float32 steps


def test_the_trunk_is_that_of_the_ode_from_the_same_noise() -> None:
    toy = ToyBackbone()
    forest = rollout(toy, PROMPTS[:1], plan(steps=4, roots=1, children=2), seed=0)
    trunk = forest.states[forest.rows]
    sigmas, condition = toy.sigmas(4), toy.encode(PROMPTS[:1])
    for t in range(2):
        v = toy.net(trunk[t : t + 1], sigmas[t].expand(1), condition)
        assert (trunk[t : t + 1] + (sigmas[t + 1] - sigmas[t]) * v - trunk[t + 1 : t + 2]).abs().max() < 1e-6


def test_an_advantage_is_relative_to_the_images_of_the_same_step() -> None:
    forest = rollout(ToyBackbone(), PROMPTS[:1], plan(steps=3, roots=1, children=2), seed=0)
    forest.rewards = torch.tensor([0.0, 1.0, 10.0, 14.0])  # steps 0 and 1
    plain: Any = load_objective("grpo")
    assert plain.advantage(forest).tolist() == [[-1.0, 1.0], [-1.0, 1.0]]
    # Standardised by depth, as BranchGRPO does, edges of one step have one image each: the same.
    deep: Any = load_objective("grpo", credit="depth")
    by_depth = deep.edge_advantage(forest)
    assert by_depth[forest.leaf_edges[:, 0]].tolist() == [-1.0, 1.0, -1.0, 1.0]


def test_tempflows_weight_of_a_step_is_the_noise_it_draws_over_its_mean() -> None:
    # SD3's scheduler for ten steps: times from 1 to 0.003, shift 3, and 0 at the end.
    times = np.linspace(1, 0.003, 10)
    sigmas = np.append(3 * times / (1 + 2 * times), 0)

    class SD3(ToyBackbone):
        def sigmas(self, steps: int) -> torch.Tensor:
            return torch.tensor(sigmas).float()

    forest = rollout(SD3(), PROMPTS[:1], plan(steps=10, roots=1, children=2, rule="sde"), seed=0)
    forest.rewards = torch.arange(18.0)
    # sde, 0.7: eta sqrt(s / (1 - s)) sqrt(s - q), with 1 - q where s is 1.
    noise = [0.7 * (s / (1 - (s if s < 1 else q)) * (s - q)) ** 0.5 for s, q in pairwise(sigmas[:-1])]
    grpo: Any = load_objective("grpo", step_weight="noise")
    found = grpo.weight(forest)[forest.leaf_edges[::2, 0]]
    assert found.tolist() == pytest.approx([n / np.mean(noise) for n in noise], rel=1e-4)
    assert 1 / np.mean(noise) == pytest.approx(2.25, abs=5e-3)  # their factor


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"last_branch": 5}, "branches leave at steps 0 to 5, which must be at least one step and end by 4 of steps=6"),
        ({"first_branch": 3, "last_branch": 2}, "branches leave at steps 3 to 2, which must be at least one step"),
        ({"strides": ()}, r"strides must be different whole numbers of at least 1, got \[\]"),
        ({"strides": (2, 2)}, r"strides must be different whole numbers of at least 1, got \[2, 2\]"),
        ({"roots": 1, "children": 1}, "roots \\* children must be at least 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_sampler("trunk_tree", **settings)
