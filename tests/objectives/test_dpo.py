from dataclasses import replace
from math import exp, log
from typing import Any

import pytest
import torch

from alignbench import RolloutForest, load_objective, rollout
from alignbench.rollouts.terms import Velocities
from alignbench.training.engine import backward
from objectives.dpo import DPO
from tests.support.replays import by_autograd, check, drawn, plan_of
from tests.support.toys import PROMPTS, ToyBackbone, chains, two_groups_of_three


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


def test_loss_and_gradient_equal_those_of_a_second_implementation() -> None:
    toy, _, drawn_forest = drawn(plan_of("dynamic_tree"))
    objective = dpo(pairs="all", margin=0.5, beta=3.0)
    rows = objective.rows(drawn_forest, 0)
    inputs = rows.x, rows.sigma, toy.encode(PROMPTS)[rows.group]
    policy, reference = toy.net(*inputs), toy.frozen(*inputs)
    error = [((v - (rows.noise - rows.x0)) ** 2).mean((1, 2, 3)) for v in (policy, reference)]
    place = {(int(leaf), float(sigma)): n for n, (leaf, sigma) in enumerate(zip(rows.leaf, rows.sigma, strict=True))}
    parts = []
    for (winner, sigma), w in place.items():
        for (loser, other), n in place.items():
            # The two of a pair share their time, which no other pair has.
            if sigma == other and drawn_forest.rewards[winner] > drawn_forest.rewards[loser]:
                lead = [e[w] - e[n] for e in error]
                parts.append(torch.log1p(torch.exp(1.5 * (lead[0] - lead[1]))))
    # Of 0.5, 2, -1, 0.25 all pairs but 0.5 and 0.25 are 0.5 apart or more, one exactly; of 1, 0, 0, 3.5 all but the two zeros.
    assert len(parts) == 5 + 5
    check(toy, objective, drawn_forest, *by_autograd(toy, torch.stack(parts).mean()))


def test_pairs_are_the_same_in_any_order_of_leaves_and_at_any_level_of_rewards(forest: RolloutForest) -> None:
    def images(of: RolloutForest) -> set[tuple[int, int]]:
        return {(int(of.leaves[w]), int(of.leaves[n])) for w, n in zip(*dpo(pairs="all").pairs(of), strict=True)}

    order = torch.tensor([2, 0, 1, 5, 3, 4])
    turned = replace(forest, leaves=forest.leaves[order], rewards=forest.rewards[order])
    assert images(turned) == images(replace(forest, rewards=forest.rewards + 16)) == images(forest)
    assert len(images(forest)) == 3


def test_updates_take_disjoint_parts_of_the_pairs(policy: ToyBackbone) -> None:
    forest = rollout(policy, [f"prompt {g}" for g in range(5)], chains(3, 2), seed=0)
    forest.rewards = torch.tensor([0.0, 1.0] * 5)
    objective = dpo(parts=2, draws=3)
    winners = [objective.rows(forest, update).leaf.chunk(2)[0].tolist() for update in range(3)]
    assert [len(part) for part in winners] == [9, 6, 9]
    assert set(winners[0]) | set(winners[1]) == {1, 3, 5, 7, 9}
    assert winners[2] == winners[0]
    assert winners[0] != dpo(parts=2, draws=3).rows(replace(forest, iteration=1), 0).leaf.chunk(2)[0].tolist()
    # The images of a pair stay together.
    first, second = objective.rows(forest, 1).leaf.chunk(2)
    assert torch.equal(first, second + 1)


def test_another_update_draws_other_noise(forest: RolloutForest) -> None:
    assert not torch.equal(dpo().rows(forest, 0).noise, dpo().rows(forest, 1).noise)
