from math import exp
from typing import Any

import pytest
import torch

from alignbench import RolloutForest, load_objective
from objectives.raft import RAFT
from tests.toys import ToyBackbone, two_groups_of_three


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


def test_only_pictures_with_weight_cost_a_model_row(forest: RolloutForest) -> None:
    assert len(raft(weights="top", draws=4).rows(forest, 0)) == 4
    assert len(raft().rows(forest, 0)) == 3


def test_loss_by_hand(forest: RolloutForest) -> None:
    terms = {"error": torch.tensor([1.0, 3.0, 5.0, 7.0])}
    # Two pictures of weight a half with two draws each, over two groups.
    assert float(raft(weights="top", top=2, draws=2).loss(terms, forest)) == pytest.approx((0.5 * 2 + 0.5 * 6) / 2)


def test_a_missing_reward_has_no_weight(forest: RolloutForest) -> None:
    forest.rewards[2] = float("nan")
    assert raft(weights="top").weights(forest)[0].tolist() == [0.0, 1.0, 0.0]
