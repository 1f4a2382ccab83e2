from math import exp, log
from typing import Any

import pytest
import torch

from alignbench import RolloutForest, load_objective
from alignbench.engine import backward
from alignbench.terms import Velocities
from objectives.dpo import DPO
from tests.toys import ToyBackbone, two_groups_of_three


@pytest.fixture
def policy() -> ToyBackbone:
    return ToyBackbone()


@pytest.fixture
def forest(policy: ToyBackbone) -> RolloutForest:
    return two_groups_of_three(policy, [0.5, 0.1, 0.9, 0.3, 0.3, 0.3])


def dpo(**settings: Any) -> DPO:
    objective = load_objective("dpo", **settings)
    assert isinstance(objective, DPO)
    return objective


def test_the_best_and_the_worst_of_a_group_form_the_pair_and_ties_form_none(forest: RolloutForest) -> None:
    winners, losers = dpo().pairs(forest)
    assert winners.tolist() == [2]
    assert losers.tolist() == [1]


def test_all_pairs_with_a_margin(forest: RolloutForest) -> None:
    winners, losers = dpo(pairs="all", margin=0.45).pairs(forest)
    assert list(zip(winners.tolist(), losers.tolist(), strict=True)) == [(2, 1)]
    winners, losers = dpo(pairs="all").pairs(forest)
    assert set(zip(winners.tolist(), losers.tolist(), strict=True)) == {(0, 1), (2, 1), (2, 0)}


def test_missing_rewards_form_no_pair(forest: RolloutForest) -> None:
    forest.rewards = torch.tensor([0.5, float("nan"), 0.9, float("nan"), 0.3, float("nan")])
    winners, losers = dpo().pairs(forest)
    assert (winners.tolist(), losers.tolist()) == ([2], [0])


def test_both_of_a_pair_get_the_same_noise_and_time(forest: RolloutForest) -> None:
    rows = dpo(pairs="all", draws=2).rows(forest, 0)
    half = len(rows) // 2
    assert len(rows) == 12
    assert torch.equal(rows.noise[:half], rows.noise[half:])
    assert torch.equal(rows.sigma[:half], rows.sigma[half:])
    assert len(set(rows.sigma[:half].tolist())) == half


def test_the_first_loss_is_log_two_and_the_implicit_accuracy_a_half(policy: ToyBackbone, forest: RolloutForest) -> None:
    objective = dpo(pairs="all", draws=3)
    found = backward(policy, objective, forest)
    assert found.loss == pytest.approx(log(2), abs=1e-6)
    assert objective.diagnostics(found.terms, forest)["implicit_accuracy"] == 0.5
    assert sum(float(p.grad.abs().sum()) for p in policy.parameters() if p.grad is not None) > 0


def test_loss_by_hand(forest: RolloutForest) -> None:
    terms = {"error": torch.tensor([0.9, 1.2]), "error_reference": torch.tensor([1.0, 1.0])}
    # The winner's error fell by 0.1 and the loser's rose by 0.2: the lead is 5 x 0.3 = 1.5 at beta 10.
    assert float(dpo(beta=10.0).loss(terms, forest)) == pytest.approx(log(1 + exp(-1.5)), abs=1e-6)


def test_the_error_is_that_of_the_velocity(policy: ToyBackbone, forest: RolloutForest) -> None:
    objective = dpo()
    rows = objective.rows(forest, 0)
    velocity = torch.zeros_like(rows.x)
    target = rows.noise - forest.leaf_latents[rows.leaf]
    assert torch.allclose(objective.terms(rows, Velocities(velocity, velocity))["error"], target.square().flatten(1).mean(1))
    s = rows.sigma.view(-1, 1, 1, 1)
    assert torch.allclose(rows.x, (1 - s) * forest.leaf_latents[rows.leaf] + s * rows.noise)


def test_a_rollout_without_pairs_teaches_nothing(policy: ToyBackbone, forest: RolloutForest) -> None:
    forest.rewards = torch.ones(6)
    found = backward(policy, dpo(), forest)
    assert (found.loss, found.rows) == (0.0, 0)
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("micro_batch", [1, 3, None])
def test_the_gradient_does_not_depend_on_the_micro_batch(forest: RolloutForest, micro_batch: int | None) -> None:
    def gradient(size: int | None) -> torch.Tensor:
        fresh = ToyBackbone()
        backward(fresh, dpo(pairs="all", draws=2), forest, micro_batch=size)
        return torch.cat([p.grad.flatten() for p in fresh.parameters() if p.grad is not None])

    assert torch.allclose(gradient(micro_batch), gradient(None), atol=1e-6)


def test_another_update_draws_other_noise(forest: RolloutForest) -> None:
    assert not torch.equal(dpo().rows(forest, 0).noise, dpo().rows(forest, 1).noise)
