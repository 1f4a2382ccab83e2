from typing import Any

import numpy as np
import pytest
import torch

from alignbench import Plan, load_objective, load_sampler
from alignbench.rollouts.executor import rollout
from tests.support.toys import PROMPTS, ToyBackbone

RNG = np.random.default_rng(0)


def plan(**settings: object) -> Plan:
    return load_sampler("granular", **settings).plan(0.0, RNG)


def test_the_published_setting_costs_1592_rows_for_192_images_of_a_prompt() -> None:
    made = plan(steps=16, children=12, last_branch=7)
    # The trunk: 8. Fine steps left after steps 0 to 7: 15 + 14 + ... + 8 = 92. Coarse ones: 8, 7, 7, 6, 6, 5, 5, 4, of which
    # the first starts where a fine one does and costs nothing: 40.
    assert made.model_rows() == 8 + 12 * (92 + 40)
    assert (made.leaves, made.groups, made.replay_rows(), made.path_length, len(made.calls)) == (192, 16, 8, 1, 16)


def test_the_coarse_images_skip_every_second_step_and_end_at_the_image() -> None:
    # Five steps, branches at step 0: four steps are left, 1 -> 2 -> 3 -> 4 -> 5 and 1 -> 3 -> 5.
    made = plan(steps=5, children=2, last_branch=0)
    assert made.rows_of_calls == (1, 2, 2, 4, 2)
    paths = [[(made.moves[m].start, made.moves[m].stop) for m in made.path_to(point)] for point, _ in made.ends]
    assert paths == [[(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], [(0, 1), (1, 3), (3, 5)]]
    # Six steps, branches at step 0: of five left, the coarse ones take 2, 2 and 1.
    odd = plan(steps=6, children=2, last_branch=0)
    assert [odd.moves[m].step.stride for m in odd.path_to(odd.ends[1][0])] == [1, 2, 2, 1]


def test_both_images_of_a_branch_have_the_same_noisy_state() -> None:
    forest = rollout(ToyBackbone(), PROMPTS, plan(steps=5, children=3, last_branch=1), seed=0)
    assert (forest.groups, forest.group_size) == (8, 3)
    fine, coarse = forest.leaf_edges[:, 0].view(4, 2, 3).unbind(1)
    assert torch.equal(fine, coarse)
    images = forest.leaf_latents.view(4, 2, 3, -1)
    assert (images[:, 0] - images[:, 1]).abs().amax(-1).min() > 1e-3  # but they are finished differently


def test_a_branch_learns_from_the_mean_of_its_standardised_rewards() -> None:
    forest = rollout(ToyBackbone(), PROMPTS[:1], plan(steps=4, children=2, last_branch=0), seed=0)
    # The fine images prefer the second branch, the coarse ones the first, whatever their scales are.
    forest.rewards = torch.tensor([0.0, 1.0, 300.0, 100.0])
    grpo: Any = load_objective("grpo")
    assert grpo.advantage(forest).tolist() == [[-1.0, 1.0], [1.0, -1.0]]
    zeros = {name: torch.zeros(2, requires_grad=True) for name in ("log_prob", "log_ratio")}
    gradient = torch.autograd.grad(grpo.loss(zeros, forest), zeros["log_ratio"])[0]
    assert gradient.tolist() == [0.0, 0.0]
    forest.rewards = torch.tensor([0.0, 1.0, 100.0, 300.0])
    gradient = torch.autograd.grad(grpo.loss(zeros, forest), zeros["log_ratio"])[0]
    # Four images, two for each edge: -A / 4 for each.
    assert gradient.tolist() == pytest.approx([0.5, -0.5])
