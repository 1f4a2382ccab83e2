from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from alignbench import RolloutForest, load_objective, load_sampler, rollout
from objectives.ddpo import DDPO
from tests.support.by_hand import clipped, leaf_values
from tests.support.replays import by_autograd, check, drawn, plan_of
from tests.support.toys import ToyBackbone


def forest(rewards: list[float], prompts: list[str]) -> RolloutForest:
    plan = load_sampler("fixed_tree", steps=4, levels=1, children=2, splits=(1,)).plan(0, np.random.default_rng(0))
    found = rollout(ToyBackbone(), prompts, plan, seed=0)
    found.rewards = torch.tensor(rewards)
    return found


def ddpo(**settings: Any) -> DDPO:
    objective = load_objective("ddpo", **settings)
    assert isinstance(objective, DDPO)
    return objective


def test_a_new_prompt_is_measured_against_the_whole_rollout() -> None:
    # Mean 3 and population deviation sqrt 5 of 0, 2, 4, 6.
    a = ddpo().advantage(forest([0.0, 2.0, 4.0, 6.0], ["a", "b"]))
    assert torch.allclose(a, torch.tensor([[-3.0, -1.0], [1.0, 3.0]]) / 5**0.5, atol=1e-6)


def test_a_known_prompt_is_measured_against_its_own_history() -> None:
    objective = ddpo(min_count=4, buffer=4)
    objective.observe(forest([1.0, 3.0], ["a"]))
    second = forest([5.0, 7.0], ["a"])
    objective.observe(second)
    # History 1, 3, 5, 7: mean 4, deviation sqrt 5.
    assert torch.allclose(objective.advantage(second), torch.tensor([[1.0, 3.0]]) / 5**0.5, atol=1e-6)


def test_prompts_that_differ_in_case_and_blanks_share_one_history() -> None:
    objective = ddpo(min_count=4, buffer=4)
    objective.observe(forest([1.0, 3.0], ["a cat"]))
    second = forest([5.0, 7.0], ["A  Cat"])
    objective.observe(second)
    assert objective.history == {"a cat": [1.0, 3.0, 5.0, 7.0]}
    assert torch.allclose(objective.advantage(second), torch.tensor([[1.0, 3.0]]) / 5**0.5, atol=1e-6)
    assert objective.diagnostics({}, second)["own_statistics_share"] == 1.0


def test_only_the_last_rewards_are_remembered_and_missing_ones_never() -> None:
    objective = ddpo(buffer=3)
    for rewards in ([1.0, 2.0], [float("nan"), 3.0], [4.0, 5.0]):
        objective.observe(forest(rewards, ["a"]))
    assert objective.state() == {"history": {"a": [3.0, 4.0, 5.0]}}


def test_equal_rewards_move_nothing() -> None:
    objective = ddpo()
    same = forest([2.0, 2.0], ["a"])
    log_prob = same.old_log_prob.clone().requires_grad_()
    objective.loss({"log_prob": log_prob}, same).backward()
    assert torch.equal(objective.advantage(same), torch.zeros(1, 2))
    assert log_prob.grad is not None
    assert torch.equal(log_prob.grad, torch.zeros_like(log_prob))


def test_rounding_of_a_scorer_is_no_advantage_and_an_offset_changes_none() -> None:
    one_unit = forest([0.95, 0.95, 0.95, 0.95000005], ["a", "a"])
    objective = ddpo(min_count=4)
    assert objective.advantage(one_unit).abs().max() == 0
    objective.observe(one_unit)
    assert objective.advantage(one_unit).abs().max() == 0
    far = forest([0.0, 2.0, 4.0, 6.0], ["a", "b"])
    near = ddpo().advantage(far)
    far.rewards = far.rewards.double() + 1e8
    assert torch.allclose(ddpo().advantage(far), near, atol=1e-6)


def test_loss_by_hand_with_one_ratio_clipped() -> None:
    both = forest([0.0, 2.0], ["a"])  # advantages -1 and 1
    log_prob = both.old_log_prob + torch.log(torch.tensor([0.9, 1.5]))
    loss = ddpo(clip=0.2).loss({"log_prob": log_prob}, both)
    # max(0.9, 0.9) for the first, max(-1.5, -1.2) for the second.
    assert float(loss) == pytest.approx((0.9 - 1.2) / 2, abs=1e-5)


def test_a_missing_reward_is_left_out_of_the_mean() -> None:
    objective = ddpo(clip=0.2)
    three = forest([0.0, 2.0, float("nan"), 1.0], ["a", "b"])
    # Known rewards 0, 2, 1: mean 1, deviation sqrt(2/3); at ratio 1 the loss is minus the mean advantage of the known.
    assert float(objective.loss({"log_prob": three.old_log_prob}, three)) == pytest.approx(0.0, abs=1e-6)
    assert float(objective.advantage(three)[1, 0]) == 0.0


def test_advantages_are_clamped() -> None:
    objective = ddpo(adv_clip=0.5)
    assert objective.advantage(forest([0.0, 9.0], ["a"])).tolist() == [[-0.5, 0.5]]


def test_the_state_survives_a_checkpoint() -> None:
    objective, other = ddpo(), ddpo()
    objective.observe(forest([1.0, 2.0], ["a"]))
    other.load_state(objective.state())
    assert other.history == {"a": [1.0, 2.0]}


def test_loss_and_gradient_equal_those_of_a_second_implementation() -> None:
    objective = ddpo(clip=0.01, buffer=6, min_count=5, adv_clip=1.2)
    toy, behaviour, now = drawn(plan_of("fixed_tree"), rewards=[[0.5, 2.0, -1.0, 0.25], [1.0, 0.0, 0.0, 3.5]])
    earlier = now.rewards * 2 + 1
    kept: dict[str, deque[float]] = {prompt: deque(maxlen=6) for prompt in now.prompts}
    for rewards in (earlier, now.rewards):
        objective.observe(replace(now, rewards=rewards))
        for leaf, prompt in enumerate(now.leaf_prompts):
            kept[prompt].append(float(rewards[leaf]))
    v = leaf_values(toy, behaviour, now)
    parts = []
    for leaf, prompt in enumerate(now.leaf_prompts):
        known = list(kept[prompt])
        a = (float(now.rewards[leaf]) - np.mean(known)) / np.std(known)
        for t in range(2):
            ratio = torch.exp(v.log_prob[leaf, t] - v.old_log_prob[leaf, t])
            parts.append(-clipped(ratio, float(np.clip(a, -1.2, 1.2)), 0.01))
    check(toy, objective, now, *by_autograd(toy, torch.stack(parts).mean()))


def test_a_constant_added_to_every_reward_and_the_order_of_leaves_change_nothing() -> None:
    losses = []
    for shift, order in ((0.0, [0, 1]), (16.0, [0, 1]), (0.0, [1, 0])):
        objective = ddpo(min_count=3, clip=0.1)
        for rewards in ([0.25, 1.5], [-1.0, 2.0]):
            now = forest([r + shift for r in rewards], ["a"])
            objective.observe(now)
        moved = {"log_prob": now.old_log_prob + torch.tensor([0.05, -0.02])}
        turned = replace(now, leaf_edges=now.leaf_edges[order], rewards=now.rewards[order])
        losses.append(float(objective.loss(moved, turned)))
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)  # float32
    assert abs(losses[0]) > 1e-3
