from typing import Any

import numpy as np
import pytest
import torch

from alignbench import RolloutForest, load_objective, load_sampler, rollout
from objectives.ddpo import DDPO
from tests.toys import ToyBackbone


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
