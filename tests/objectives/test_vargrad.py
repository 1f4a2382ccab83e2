from dataclasses import replace

import numpy as np
import pytest
import torch

from alignbench import RolloutForest, load_objective
from tests.support.by_hand import leaf_values
from tests.support.replays import REWARDS, by_autograd, check, drawn, plan_of, two_splits


@pytest.fixture
def forest() -> RolloutForest:
    return two_splits([0.0, 1.0, 2.0, 3.0], [5.0] * 4)


def test_loss_by_hand(forest: RolloutForest) -> None:
    # One group has no spread and has no part. In the other z = (-3, -1, 1, 3) / sqrt 5; with all log-densities equal
    # delta = -beta z, and the mean of z^2 is 1.
    terms = {"log_prob": torch.full_like(forest.old_log_prob, 0.7)}
    loss = load_objective("vargrad", beta=2.0, reference="none").loss(terms, forest)
    assert float(loss) == pytest.approx(4.0, abs=1e-5)


def test_it_is_zero_where_the_paths_match_the_target(forest: RolloutForest) -> None:
    objective = load_objective("vargrad", beta=1.0, reference="none")
    z = torch.tensor([-3.0, -1.0, 1.0, 3.0]) / 5**0.5
    log_prob = torch.zeros_like(forest.old_log_prob)
    log_prob[forest.leaf_edges[:4, 1]] = z + 0.25  # the last edge belongs to its leaf alone; a constant does not matter
    assert float(objective.loss({"log_prob": log_prob}, forest)) == pytest.approx(0.0, abs=1e-12)


def test_the_reference_cancels_what_the_policy_shares_with_it(forest: RolloutForest) -> None:
    torch.manual_seed(0)
    values = torch.randn_like(forest.old_log_prob)
    frozen = load_objective("vargrad", reference="frozen").loss({"log_prob": values, "log_prob_reference": values}, forest)
    flat = load_objective("vargrad", reference="none").loss({"log_prob": torch.zeros_like(values)}, forest)
    assert float(frozen) == pytest.approx(float(flat), abs=1e-6)


def test_the_gradient_is_twice_the_deviation(forest: RolloutForest) -> None:
    log_prob = torch.zeros_like(forest.old_log_prob).requires_grad_()
    load_objective("vargrad", beta=1.0, reference="none").loss({"log_prob": log_prob}, forest).backward()
    z = torch.tensor([-3.0, -1.0, 1.0, 3.0]) / 5**0.5
    assert log_prob.grad is not None
    # d/ds_i of (1/K) sum (delta - mean)^2 is (2/K) (delta_i - mean), K = 4 leaves that count.
    assert torch.allclose(log_prob.grad[forest.leaf_edges[:4, 1]], -2 / 4 * z, atol=1e-6)
    assert torch.equal(log_prob.grad[forest.leaf_edges[4:, 1]], torch.zeros(4))


@pytest.mark.parametrize("reference", ["none", "frozen"])
def test_loss_and_gradient_equal_those_of_a_second_implementation(reference: str) -> None:
    toy, behaviour, moved = drawn(plan_of("fixed_tree"))
    v = leaf_values(toy, behaviour, moved)
    variances = []
    for g, rewards in enumerate(REWARDS):
        z = (np.array(rewards) - np.mean(rewards)) / np.std(rewards)
        log_p = v.log_prob - v.log_prob_reference if reference == "frozen" else v.log_prob
        delta = torch.stack([log_p[4 * g + k].sum() - 1.5 * float(z[k]) for k in range(4)])
        variances.append(delta.var(correction=0))
    objective = load_objective("vargrad", beta=1.5, reference=reference)
    check(toy, objective, moved, *by_autograd(toy, torch.stack(variances).mean()))


def test_neither_a_constant_in_rewards_or_log_probs_nor_the_order_of_leaves_matters(forest: RolloutForest) -> None:
    objective, order = load_objective("vargrad"), torch.tensor([3, 1, 0, 2, 4, 5, 6, 7])
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(len(forest.old_log_prob), generator=generator) for _ in range(2))
    terms = {"log_prob": policy, "log_prob_reference": reference}
    loss = float(objective.loss(terms, forest))
    assert loss > 0.1
    turned = replace(forest, leaf_edges=forest.leaf_edges[order], rewards=forest.rewards[order])
    raised = {**terms, "log_prob": policy + 0.75}
    for other, of in ((terms, turned), (terms, replace(forest, rewards=forest.rewards + 16)), (raised, forest)):
        assert float(objective.loss(other, of)) == pytest.approx(loss, rel=1e-5)  # float32
