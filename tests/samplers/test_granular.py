from typing import Any

import numpy as np
import pytest
import torch

from alignbench import Plan, UserError, load_objective, load_sampler
from alignbench.rollouts.builder import planned_forest
from alignbench.rollouts.executor import rollout
from alignbench.training.engine import backward
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


def test_the_released_coarse_steps_begin_one_step_later_and_end_in_a_longer_one() -> None:
    # Sixteen steps. After the noise at step 0 the coarse images go 1 -> 2 -> 4 -> ... -> 14 -> 16, after that at step 1 they go
    # 2 -> 3 -> 5 -> ... -> 13 -> 16.
    made = plan(steps=16, children=12, last_branch=7, coarse="released")
    stops = [[made.moves[m].stop for m in made.path_to(point)] for point, _ in made.ends]
    assert stops[1] == [1, 2, 4, 6, 8, 10, 12, 14, 16]
    assert stops[3] == [1, 2, 3, 5, 7, 9, 11, 13, 16]
    # Of the coarse ones' 8, 7, 7, 6, 6, 5, 5, 4 evaluations two are those of the fine ones.
    assert made.model_rows() == 8 + 12 * (92 + 48 - 16)
    assert (made.leaves, made.groups, made.replay_rows(), made.path_length) == (192, 16, 8, 1)


def test_a_released_coarse_step_that_would_pass_the_end_is_one_step_to_it() -> None:
    # Three steps are left after the noise: 1 -> 2 -> 3 -> 4, and with strides of 3 one step 1 -> 4.
    made = plan(steps=4, children=2, last_branch=0, strides=(1, 3), coarse="released")
    assert [[made.moves[m].stop for m in made.path_to(point)] for point, _ in made.ends] == [[1, 2, 3, 4], [1, 4]]


def test_released_coarse_steps_need_fine_ones_to_begin_with() -> None:
    with pytest.raises(UserError, match=r"coarse=released needs 1 as the first of strides, got \[2, 1\]"):
        plan(strides=(2, 1), coarse="released")


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


def test_each_step_at_which_branches_leave_can_have_an_update_of_its_own() -> None:
    toy = ToyBackbone()
    forest = rollout(toy, PROMPTS[:1], plan(steps=5, children=2, last_branch=2), seed=0)
    forest.rewards = torch.arange(12.0) % 2
    grpo: Any = load_objective("grpo", parts=3, part_by="step")
    rows = []
    for update in range(3):
        rows.append(backward(toy, grpo, forest, update=update).rows)
        # The images of a step are two groups of two: those of fine and of coarse steps.
        assert grpo.trained_leaves(forest).nonzero()[:, 0].tolist() == [4 * update + i for i in range(4)]
        terms = {name: torch.zeros(6, requires_grad=True) for name in ("log_prob", "log_ratio")}
        gradient = torch.autograd.grad(grpo.loss(terms, forest), terms["log_ratio"])[0].view(3, 2)
        # Advantages -1 and 1 of two images each, and a mean over the four images of the step alone.
        assert gradient[update].tolist() == [0.5, -0.5]
        assert int(gradient.count_nonzero()) == 2
    assert rows == [1, 1, 1]  # the trunk's state at the step


def test_two_parts_of_four_steps_are_two_neighbours_each() -> None:
    forest = rollout(ToyBackbone(), PROMPTS[:1], plan(steps=6, children=2, last_branch=3, strides=(1,)), seed=0)
    forest.rewards = torch.arange(8.0)
    grpo: Any = load_objective("grpo", parts=2, part_by="step")
    assert grpo.trained_leaves(forest).tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize(("sampler", "steps"), [("granular", 3), ("independent", 1)])
def test_parts_by_step_must_divide_the_number_of_steps(sampler: str, steps: int) -> None:
    plan = load_sampler(sampler).plan(0.0, RNG)
    with pytest.raises(UserError, match=f"parts=2 with part_by=step must divide .* first trained, which is {steps}"):
        load_objective("grpo", parts=2, part_by="step").trained_leaves(planned_forest(plan, 1))


def test_steps_without_an_update_are_reported() -> None:
    grpo = load_objective("grpo", parts=3, part_by="step")
    assert grpo.ineffective_parts(3) == {}
    reason = "with part_by=step, parts=3 and updates_per_rollout=2 no update trains on them"
    assert grpo.ineffective_parts(2) == {"training of later steps": reason}
