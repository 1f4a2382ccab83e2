from dataclasses import replace
from math import exp
from statistics import mean, pstdev
from typing import Any

import pytest
import torch

from alignbench import RolloutForest, load_objective
from objectives.raft import RAFT
from tests.support.replays import REWARDS, by_autograd, check, drawn, plan_of
from tests.support.toys import PROMPTS, ToyBackbone, two_groups_of_three


@pytest.fixture
def forest() -> RolloutForest:
    return two_groups_of_three(ToyBackbone(), [0.0, 1.0, 2.0, 0.3, 0.3, 0.3])


def raft(**settings: Any) -> RAFT:
    objective = load_objective("raft", **settings)
    assert isinstance(objective, RAFT)
    return objective


def test_softmax_weights_by_hand(forest: RolloutForest) -> None:
    z = 1.5**0.5  # the standardised reward of 0, 1, 2 is -sqrt 1.5, 0, sqrt 1.5
    total = exp(-z) + 1 + exp(z)
    weights = raft(beta=1.0).weights(forest)
    assert weights[0].tolist() == pytest.approx([exp(-z) / total, 1 / total, exp(z) / total], abs=1e-6)
    assert weights[1].tolist() == [0.0, 0.0, 0.0]


def test_top_weights_are_equal_among_the_best(forest: RolloutForest) -> None:
    assert raft(weights="top", top=2).weights(forest).tolist() == [[0.0, 0.5, 0.5], [0.0, 0.0, 0.0]]


def test_only_images_with_weight_cost_a_model_row(forest: RolloutForest) -> None:
    assert len(raft(weights="top", draws=4).rows(forest, 0)) == 4
    assert len(raft().rows(forest, 0)) == 3


def test_loss_by_hand(forest: RolloutForest) -> None:
    terms = {"error": torch.tensor([1.0, 3.0, 5.0, 7.0])}
    # Two images of weight a half with two draws each, over two groups.
    assert float(raft(weights="top", top=2, draws=2).loss(terms, forest)) == pytest.approx((0.5 * 2 + 0.5 * 6) / 2)


def test_a_missing_reward_has_no_weight(forest: RolloutForest) -> None:
    forest.rewards[2] = float("nan")
    assert raft(weights="top").weights(forest)[0].tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("weights", ["top", "softmax"])
def test_loss_and_gradient_equal_those_of_a_second_implementation(weights: str) -> None:
    toy, _, drawn_forest = drawn(plan_of("dynamic_tree"))
    objective = raft(weights=weights, beta=1.5, draws=2)
    rows = objective.rows(drawn_forest, 0)
    loss = torch.zeros(())
    for n in range(len(rows)):
        g, k = divmod(int(rows.leaf[n]), 4)
        z = [(r - mean(REWARDS[g])) / pstdev(REWARDS[g]) for r in REWARDS[g]]
        w = exp(1.5 * z[k]) / sum(exp(1.5 * other) for other in z) if weights == "softmax" else float(z[k] == max(z))
        image = drawn_forest.states[drawn_forest.leaves[rows.leaf[n]]]
        noised = (1 - rows.sigma[n]) * image + rows.sigma[n] * rows.noise[n]
        v = toy.net(noised[None], rows.sigma[n : n + 1], toy.encode(PROMPTS[g : g + 1]))[0]
        loss = loss + w * ((v - rows.noise[n] + image) ** 2).mean() / 2 / 2  # two draws, two groups
    check(toy, objective, drawn_forest, *by_autograd(toy, loss))


@pytest.mark.parametrize("weights", ["top", "softmax"])
def test_weights_follow_the_images_and_not_the_level_of_rewards(forest: RolloutForest, weights: str) -> None:
    objective, order = raft(weights=weights), torch.tensor([2, 0, 1, 5, 3, 4])
    found = objective.weights(forest).flatten()
    assert torch.allclose(objective.weights(replace(forest, rewards=forest.rewards[order])).flatten(), found[order], atol=1e-6)
    assert torch.allclose(objective.weights(replace(forest, rewards=forest.rewards + 16)).flatten(), found, atol=1e-6)


def test_a_rollout_of_equal_rewards_asks_the_model_nothing(forest: RolloutForest) -> None:
    for weights in ("top", "softmax"):
        assert len(raft(weights=weights).rows(replace(forest, rewards=torch.ones(6)), 0)) == 0
