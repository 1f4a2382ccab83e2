import math

import pytest
import torch

from alignbench import load_objective, rollout
from alignbench.training.engine import backward
from objectives.flowrl import FlowRL
from tests.support.by_hand import leaf_values, snapshot
from tests.support.toys import PROMPTS, ToyBackbone, hand_made_forest, tree

NAN = math.nan
LN2 = math.log(2)


def flowrl(**settings: object) -> FlowRL:
    objective = load_objective("flowrl", **settings)
    assert isinstance(objective, FlowRL)
    return objective


def test_loss_by_hand() -> None:
    # z = (-1, 1). Path means of log p - log p_ref: (.2 + .4) / 2 = .3 and (.2 + .6) / 2 = .4.
    forest = hand_made_forest([[0.0, 2.0]], [[0, 1], [0, 2]], [0.2, 0.4, 0.6])
    terms = {"log_prob": torch.tensor([0.2, 0.4, 0.6]), "log_prob_reference": torch.zeros(3)}
    objective = flowrl(beta=2.0)
    with torch.no_grad():
        objective.log_z.fill_(0.5)
    # .5 + .3 + 2 and .5 + .4 - 2; the ratio is 1.
    assert objective.loss(terms, forest).item() == pytest.approx((2.8**2 + 1.1**2) / 2, abs=1e-5)  # float32


def test_the_ratio_weighs_without_gradient_and_can_be_kept_in_bounds() -> None:
    forest = hand_made_forest([[0.0, 2.0]], [[0], [1]], [0.0, 0.0])
    log_prob = torch.tensor([LN2, 0.0], requires_grad=True)
    terms = {"log_prob": log_prob, "log_prob_reference": torch.zeros(2)}
    loss = flowrl(beta=1.0, ratio_clip=None).loss(terms, forest)
    # Residuals ln 2 + 1 and -1, weights 2 and 1.
    assert loss.item() == pytest.approx((2 * (LN2 + 1) ** 2 + 1) / 2, abs=1e-5)  # float32
    torch.autograd.backward(loss)
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == pytest.approx([2 * (LN2 + 1), -1.0], abs=1e-5)
    bounded = flowrl(beta=1.0).loss(terms, forest)  # to 1 +- 0.2, as in the paper
    assert bounded.item() == pytest.approx((1.2 * (LN2 + 1) ** 2 + 1) / 2, abs=1e-5)


def test_groups_without_spread_and_missing_rewards_have_no_part() -> None:
    forest = hand_made_forest([[1.0, 1.0, 1.0], [0.0, NAN, 2.0]], [[i] for i in range(6)], [0.0] * 6)
    log_prob = torch.zeros(6, requires_grad=True)
    loss = flowrl(beta=1.0).loss({"log_prob": log_prob, "log_prob_reference": torch.zeros(6)}, forest)
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(1.0, abs=1e-6)
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == pytest.approx([0, 0, 0, 1, 0, -1], abs=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 3, None])
def test_gradients_of_policy_and_log_z_are_those_of_plain_autograd(micro_batch: int | None) -> None:
    toy = ToyBackbone()
    toy.nudge(0.1)
    behaviour = snapshot(toy)
    forest = rollout(toy, PROMPTS, tree(5, (1, 3), children=2), seed=4)
    rewards = [[0.5, 2.0, -1.0, 0.25], [1.0, 0.0, 0.0, 3.5]]
    forest.rewards = torch.tensor(rewards).flatten()
    toy.nudge(0.05, seed=2)
    objective = flowrl(beta=2.0, ratio_clip=0.05)
    found = backward(toy, objective, forest, micro_batch=micro_batch)

    v = leaf_values(toy, behaviour, forest)
    log_z = torch.zeros((), requires_grad=True)
    parts = []
    for g, group in enumerate(rewards):
        average = sum(group) / 4
        deviation = math.sqrt(sum((r - average) ** 2 for r in group) / 4)
        for i, r in enumerate(group):
            leaf = 4 * g + i
            weight = min(max(math.exp(v.log_prob[leaf].sum().item() - v.old_log_prob[leaf].sum().item()), 0.95), 1.05)
            move = (v.log_prob[leaf] - v.log_prob_reference[leaf]).mean()
            parts.append(weight * (log_z + move - 2.0 * (r - average) / deviation) ** 2)
    loss = torch.stack(parts).mean()
    *gradients, of_log_z = torch.autograd.grad(loss, [*toy.net.parameters(), log_z])
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(toy.gradient(), torch.cat([g.flatten() for g in gradients]), atol=1e-5)  # gradients of about 1
    assert objective.log_z.grad is not None
    assert float(objective.log_z.grad) == pytest.approx(float(of_log_z), abs=1e-5)


def test_a_constant_added_to_rewards_and_the_order_of_leaves_change_nothing() -> None:
    paths, old = [[0, 1], [0, 2], [3, 4], [3, 5]], [0.2, 0.4, 0.6, 0.1, 0.3, 0.0]
    terms = {"log_prob": torch.tensor(old) + 0.05, "log_prob_reference": torch.tensor([0.1] * 6)}
    loss = flowrl(beta=1.0).loss(terms, hand_made_forest([[0.0, 2.0], [1.0, 4.0]], paths, old)).item()
    for rewards, order in (([[16.0, 18.0], [17.0, 20.0]], [0, 1, 2, 3]), ([[2.0, 0.0], [4.0, 1.0]], [1, 0, 3, 2])):
        other = hand_made_forest(rewards, [paths[i] for i in order], old)
        assert flowrl(beta=1.0).loss(terms, other).item() == pytest.approx(loss, abs=1e-5)  # float32
