import math

import pytest
import torch

from alignbench import load_objective, rollout
from alignbench.training.engine import backward
from objectives.ppo import PPO
from tests.support.by_hand import clipped, leaf_values, snapshot
from tests.support.toys import LATENT, PROMPTS, ToyBackbone, hand_made_forest, tree

NAN = math.nan
LN2 = math.log(2)


def ppo(**settings: object) -> PPO:
    objective = load_objective("ppo", **settings)
    assert isinstance(objective, PPO)
    objective.prepare(LATENT, torch.device("cpu"))
    return objective


def knowing(mean: float, deviation: float, **settings: object) -> PPO:
    """With the running statistics of rewards set."""
    objective = ppo(**settings)
    objective.load_state({"count": 4, "mean": mean, "square": 4 * deviation**2})
    return objective


def test_advantages_by_hand() -> None:
    # R = 3 of mean 1 and deviation 2 is 1; V = 0.5, 0.2: deltas -0.3 and 0.8; lambda = 0.5.
    forest = hand_made_forest([[3.0]], [[0, 1]], [0.0, 0.0])
    a = knowing(1.0, 2.0, gae_lambda=0.5).advantage(torch.tensor([[0.5, 0.2]]), forest)
    assert a.tolist()[0] == pytest.approx([-0.3 + 0.5 * 0.8, 0.8], abs=1e-6)  # float32


def test_lambda_one_is_the_reward_minus_the_value() -> None:
    forest = hand_made_forest([[0.5, -1.0]], [[0, 1], [0, 2]], [0.0] * 3)
    values = torch.tensor([[0.1, 0.3], [0.1, -0.4]])
    a = knowing(0.0, 1.0, gae_lambda=1.0).advantage(values, forest)
    assert a.flatten().tolist() == pytest.approx([0.4, 0.2, -1.1, -0.6], abs=1e-6)  # float32


def test_loss_by_hand() -> None:
    forest = hand_made_forest([[0.0, 2.0]], [[0], [1]], [0.0, 0.0])
    log_prob = torch.tensor([0.0, LN2], requires_grad=True)
    value = torch.tensor([0.5, 0.0], requires_grad=True)
    # R = -1, 1; A = -1.5, 1: mean -.25, deviation 1.25, standardised -1 and 1. Ratios 1 and 2, the latter clipped at 1.2.
    loss = knowing(1.0, 1.0, clip=0.2, value_weight=0.5).loss({"log_prob": log_prob, "value": value}, forest)
    error = 0.5 * (1.5**2 + 1.0**2)
    assert loss.item() == pytest.approx(((1 - 1.2) + error) / 2, abs=1e-6)  # float32
    torch.autograd.backward(loss)
    assert log_prob.grad is not None
    assert value.grad is not None
    assert log_prob.grad.tolist() == pytest.approx([0.5, 0.0], abs=1e-6)
    # The target carries no gradient: 0.5 * 2 (V - R) / 2.
    assert value.grad.tolist() == pytest.approx([0.75, -0.5], abs=1e-6)


def test_a_missing_reward_moves_nothing() -> None:
    forest = hand_made_forest([[0.0, 2.0, NAN]], [[0], [1], [2]], [0.0] * 3)
    log_prob, value = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    torch.autograd.backward(knowing(1.0, 1.0).loss({"log_prob": log_prob, "value": value}, forest))
    for tensor in (log_prob, value):
        assert tensor.grad is not None
        assert tensor.grad[2] == 0
        assert bool((tensor.grad[:2] != 0).all())


def test_equal_rewards_that_the_critic_foresees_move_nothing() -> None:
    forest = hand_made_forest([[2.0, 2.0]], [[0], [1]], [0.0] * 2)
    log_prob, value = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    torch.autograd.backward(knowing(2.0, 1.0).loss({"log_prob": log_prob, "value": value}, forest))
    for tensor in (log_prob, value):
        assert tensor.grad is not None
        assert tensor.grad.tolist() == [0.0, 0.0]


def test_a_constant_added_to_every_reward_and_the_order_of_leaves_change_nothing() -> None:
    terms = {"log_prob": torch.tensor([0.05, -0.1, 0.0]), "value": torch.tensor([0.3, 0.1, -0.4])}
    losses = []
    for rewards, order in (([0.0, 2.0, 5.0], [0, 1, 2]), ([16.0, 18.0, 21.0], [0, 1, 2]), ([5.0, 0.0, 2.0], [2, 0, 1])):
        objective = ppo(clip=0.08)
        forest = hand_made_forest([rewards], [[i] for i in order], [0.0] * 3)
        objective.observe(forest)
        losses.append(objective.loss(terms, forest).item())
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)  # float32


def test_running_statistics_are_those_of_all_rewards_and_survive_a_checkpoint() -> None:
    objective, other = ppo(), ppo()
    seen = [[1.0, 4.0, NAN], [2.0, NAN, NAN], [NAN, NAN, NAN], [9.0, 0.5, 3.0]]
    for rewards in seen:
        objective.observe(hand_made_forest([rewards], [[0], [1], [2]], [0.0] * 3))
    other.load_state(objective.state())
    everything = torch.tensor([1.0, 4.0, 2.0, 9.0, 0.5, 3.0], dtype=torch.float64)
    for found in (objective, other):
        assert found.mean == pytest.approx(float(everything.mean()))
        assert found.square / found.count == pytest.approx(float(everything.var(correction=0)))


@pytest.mark.parametrize("micro_batch", [1, 3, None])
def test_gradients_of_policy_and_critic_are_those_of_plain_autograd(micro_batch: int | None) -> None:
    toy = ToyBackbone()
    behaviour = snapshot(toy)
    forest = rollout(toy, PROMPTS, tree(5, (1, 3), children=2), seed=4)
    forest.rewards = torch.tensor([0.5, 2.0, -1.0, 0.25, 1.0, 0.0, 0.0, 3.5])
    toy.nudge(0.05, seed=2)
    torch.manual_seed(0)
    objective = ppo(clip=0.01, gae_lambda=0.7)
    objective.observe(forest)
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    found = backward(toy, objective, forest, micro_batch=micro_batch)

    v = leaf_values(toy, behaviour, forest)
    mean, deviation = forest.rewards.mean(), forest.rewards.std(correction=0)
    values, advantages = [], []
    for leaf in range(8):
        states = forest.states[forest.rows[forest.edge_row[forest.leaf_edges[leaf]]]]
        sigmas = forest.edge_sigma[forest.leaf_edges[leaf]]
        features = [[*x.mean((1, 2)), *x.std((1, 2), correction=0), s] for x, s in zip(states, sigmas, strict=True)]
        values.append(objective.critic(torch.tensor(features))[:, 0])
        first, second = values[-1].detach().tolist()
        end = float((forest.rewards[leaf] - mean) / deviation) - second
        advantages.append([second - first + 0.7 * end, end])
    a = torch.tensor(advantages)
    z = (a - a.mean()) / a.std(correction=0)
    parts = []
    for leaf in range(8):
        for t in range(2):
            ratio = torch.exp(v.log_prob[leaf, t] - v.old_log_prob[leaf, t])
            target = values[leaf][t].detach() + a[leaf, t]
            parts.append(0.5 * (values[leaf][t] - target) ** 2 - clipped(ratio, float(z[leaf, t]), 0.01))
    loss = torch.stack(parts).mean()
    expected = torch.autograd.grad(loss, [*toy.net.parameters(), *objective.parameters()])
    assert found.loss == pytest.approx(loss.item(), abs=1e-6, rel=1e-5)
    got = [p.grad for p in (*toy.net.parameters(), *objective.parameters())]
    for mine, other in zip(got, expected, strict=True):
        assert mine is not None
        assert torch.allclose(mine, other, atol=2e-6)  # float32 sums over other splits of the rows


def test_the_critic_learns_to_foresee_the_reward() -> None:
    toy = ToyBackbone()
    forest = rollout(toy, PROMPTS, tree(5, (1, 3), children=2), seed=4)
    parents = forest.states[forest.rows[forest.edge_row[forest.leaf_edges[:, -1]]]]
    forest.rewards = parents[:, 0].mean((1, 2))  # what the critic can read from the last stochastic state
    torch.manual_seed(0)
    objective = ppo(gae_lambda=1.0, value_weight=1.0)
    objective.observe(forest)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.02)
    explained = []
    for _ in range(150):
        optimizer.zero_grad()
        found = backward(toy, objective, forest)
        explained.append(objective.diagnostics(found.terms, forest)["explained_variance"])
        optimizer.step()
    assert explained[0] == pytest.approx(0.0, abs=1e-6)  # it starts at a constant
    assert explained[-1] > 0.5
