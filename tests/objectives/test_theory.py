"""What the methods' papers and critics say of their fixed points and gradients, on distributions small enough to be known
exactly."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignbench import Objective, RolloutForest, load_objective
from alignbench.rollouts.terms import Terms
from tests.support.toys import hand_made_forest

BALANCES: list[tuple[str, dict[str, Any]]] = [
    *[
        ("tmpo", {"reference": "frozen", "advantage": form, "ratio": "none"})
        for form in ("log_ratio", "centred", "forward_kl", "squared")
    ],
    ("vargrad", {}),
]
"""Objectives whose fixed point is p_ref exp(beta R~)."""
ARM_REWARDS = [0.0, 1.0, 3.0, 0.5]
REFERENCE = [0.1, 0.4, 0.2, 0.3]


def made(name: str, **settings: Any) -> Objective:
    plain = {"beta_warmup": 0, "lambda_ref": 0.0} if name == "tmpo" else {}
    return load_objective(name, **plain, **settings)


def one_step(rewards: list[float] | Tensor, old: Tensor | None = None) -> RolloutForest:
    """One group of leaves with one stochastic step each."""
    values = torch.as_tensor(rewards).tolist()
    before = [0.0] * len(values) if old is None else old.tolist()
    return hand_made_forest([values], [[i] for i in range(len(values))], before)


def terms_of(log_prob: Tensor, reference: Tensor | None = None) -> Terms:
    reference = torch.zeros_like(log_prob) if reference is None else reference
    return {"log_prob": log_prob, "drift_noise": torch.zeros_like(log_prob), "log_prob_reference": reference.detach()}


def standardised(rewards: list[float]) -> Tensor:
    r = torch.tensor(rewards)
    return (r - r.mean()) / r.std(correction=0)


# ---------------------------------------------------------------------------------------------------- the target


def test_the_forward_kl_estimate_is_never_negative_and_zero_only_at_the_target() -> None:
    rng = np.random.default_rng(0)
    objective = made("tmpo", beta=1.7)
    for _ in range(50):
        rewards = rng.normal(size=9).tolist()
        at_target = 1.7 * standardised(rewards)
        for shift in (0.0, 3.0):
            found = objective.diagnostics(terms_of(at_target + shift), one_step(rewards))["kl_target_policy"]
            assert found == pytest.approx(0, abs=1e-6)  # float32
        away = torch.from_numpy(rng.normal(0, 0.3, size=9)).float()
        assert objective.diagnostics(terms_of(at_target + away), one_step(rewards))["kl_target_policy"] > 1e-4


@pytest.mark.parametrize(("name", "settings"), BALANCES)
def test_at_the_tilted_reference_nothing_is_left_to_learn(name: str, settings: dict[str, Any]) -> None:
    rewards, reference = [0.2, 0.9, 0.4, 0.1, 0.6], torch.tensor([0.3, -1.0, 0.7, 0.0, 2.0])
    at_target = (reference + 2.0 * standardised(rewards) - 0.6).requires_grad_()
    torch.autograd.backward(made(name, beta=2.0, **settings).loss(terms_of(at_target, reference), one_step(rewards)))
    assert at_target.grad is not None
    assert at_target.grad.abs().max() < 1e-6  # float32
    away = (at_target.detach() + torch.tensor([0.1, 0, 0, 0, -0.1])).requires_grad_()
    torch.autograd.backward(made(name, beta=2.0, **settings).loss(terms_of(away, reference), one_step(rewards)))
    assert away.grad is not None
    assert away.grad.abs().max() > 1e-3


@pytest.mark.parametrize(("name", "settings"), BALANCES)
def test_descent_ends_at_the_reference_tilted_by_the_reward(name: str, settings: dict[str, Any]) -> None:
    objective, reference = made(name, beta=1.5, **settings), torch.tensor(REFERENCE).log()
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        torch.autograd.backward(objective.loss(terms_of(torch.log_softmax(logits, 0), reference), one_step(ARM_REWARDS)))
        optimizer.step()
    target = torch.tensor(REFERENCE) * torch.exp(1.5 * standardised(ARM_REWARDS))
    expected = (target / target.sum()).tolist()
    assert torch.softmax(logits, 0).tolist() == pytest.approx(expected, abs=2e-3)  # Adam's last steps
    assert min(expected) > 0.005


@pytest.mark.parametrize(("name", "settings"), BALANCES)
def test_a_tree_is_tilted_given_its_first_noise_alone(name: str, settings: dict[str, Any]) -> None:
    """Two roots, equally likely, each a group of all its outcomes. No objective can make one root likelier than the other,
    so the fixed point differs from the tilted reference where one root leads to better outcomes."""
    references = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
    rewards = [0.0, 1.0, 3.0]
    objective, logits = made(name, beta=1.0, **settings), references.log().clone().requires_grad_()
    forest = hand_made_forest([rewards, rewards], [[i] for i in range(6)], [0.0] * 6)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        policy = torch.log_softmax(logits, 1)
        torch.autograd.backward(objective.loss(terms_of(policy.flatten(), references.log().flatten()), forest))
        optimizer.step()
    tilt = references * torch.exp(standardised(rewards))
    given_root = tilt / tilt.sum(1, keepdim=True)
    found = torch.softmax(logits, 1).detach()
    assert found.flatten().tolist() == pytest.approx(given_root.flatten().tolist(), abs=2e-3)  # Adam's last steps
    tilted = tilt.sum(0) / tilt.sum()
    assert float((found.mean(0) - tilted).abs().max()) > 0.05


def test_grpo_without_a_kl_ends_at_one_arm() -> None:
    objective = made("grpo", clip=0.2)
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor(REFERENCE).log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    rewards = torch.tensor(ARM_REWARDS)
    for _ in range(300):
        optimizer.zero_grad()
        policy = torch.log_softmax(logits, 0)
        drawn = torch.multinomial(policy.exp().detach(), 64, replacement=True, generator=generator)
        log_prob = policy[drawn]
        torch.autograd.backward(objective.loss(terms_of(log_prob), one_step(rewards[drawn], log_prob.detach())))
        optimizer.step()
    assert torch.softmax(logits, 0)[2] > 0.99


# ---------------------------------------------------------------------------------------------------- vargrad and tmpo


def gradients(rewards: list[float], s: Tensor) -> dict[str, Tensor]:
    """On s, by vargrad and by two forms of tmpo, all without a reference."""
    found = {}
    for label, name, settings in (
        ("vargrad", "vargrad", {"reference": "none"}),
        ("centred", "tmpo", {"advantage": "centred", "ratio": "none", "reference": "none"}),
        ("squared", "tmpo", {"advantage": "squared", "ratio": "none", "reference": "none"}),
    ):
        at = s.clone().requires_grad_()
        torch.autograd.backward(made(name, beta=2.0, **settings).loss(terms_of(at), one_step(rewards)))
        assert at.grad is not None
        found[label] = at.grad
    return found


def test_centred_tmpo_is_half_of_vargrad_everywhere() -> None:
    g = gradients([0.1, 0.8, 0.3, 0.5], torch.tensor([0.4, -1.0, 2.0, 0.1]))
    assert (2 * g["centred"]).tolist() == pytest.approx(g["vargrad"].tolist(), abs=1e-6)  # float32


def test_squared_tmpo_becomes_k_times_vargrad_as_the_group_becomes_uniform() -> None:
    rewards, direction = [0.1, 0.8, 0.3, 0.5], torch.tensor([0.4, -1.0, 2.0, 0.1])
    apart = []
    for size in (0.1, 0.01, 0.001):
        g = gradients(rewards, size * direction)
        apart.append(float((g["squared"] - 4 * g["vargrad"]).norm()))
    # The difference is 2 (p - 1/K) sum A, of first order in s.
    assert apart[0] > 0.1
    assert [apart[1] / apart[0], apart[2] / apart[1]] == pytest.approx([0.1, 0.1], abs=0.01)


# ---------------------------------------------------------------------------------------------------- the term -log p

GROUPS, LEAVES = 4000, 6


def drift(noise: Tensor, *, mean: float, behaviour: float, **settings: Any) -> tuple[float, float]:
    """Gradient on the mean of a Gaussian policy N(mean, 1) from tmpo's -log p term alone, with its standard error.

    beta = 0 makes q uniform, so that the rewards say nothing; the reference is N(0, 1).

    Args:
        noise: [GROUPS, LEAVES]; leaves are behaviour + noise.
    """
    objective = made("tmpo", beta=0.0, beta_start=0.0, ratio="none", **settings)
    x = behaviour + noise
    theta = torch.full((len(noise), 1), mean, requires_grad=True)
    log_prob, reference = -0.5 * (x - theta) ** 2, -0.5 * x**2
    any_reward = torch.arange(LEAVES).float().tolist()
    paths = [[i] for i in range(noise.numel())]
    forest = hand_made_forest([any_reward] * len(noise), paths, [0.0] * noise.numel())
    loss = objective.loss(terms_of(log_prob.flatten(), reference.flatten()), forest)
    torch.autograd.backward(loss)
    assert theta.grad is not None
    of_group = theta.grad[:, 0].double() * len(noise)
    return float(of_group.mean()), float(of_group.std() / len(of_group) ** 0.5)


@pytest.mark.parametrize("advantage", ["log_ratio", "centred"])
def test_on_policy_the_term_log_p_pulls_nowhere_on_average(advantage: str) -> None:
    noise = torch.randn(GROUPS, LEAVES, generator=torch.Generator().manual_seed(0))
    # Of fixed deviation, a mirrored group has the same p and the opposite gradients: with both, nothing is left.
    both = torch.cat([noise, -noise])
    pull, _ = drift(both, mean=0.7, behaviour=0.7, advantage=advantage)
    assert pull == pytest.approx(0, abs=1e-4)  # float32 sums of 48,000 terms
    pull, error = drift(noise, mean=0.7, behaviour=0.7, advantage=advantage)
    assert abs(pull) < 4 * error


def test_after_a_first_update_it_pulls_back_to_the_behaviour_policy() -> None:
    noise = torch.randn(GROUPS, LEAVES, generator=torch.Generator().manual_seed(1))
    for moved in (0.2, -0.2):
        pull, error = drift(noise, mean=0.7 + moved, behaviour=0.7, advantage="centred")
        # Descent moves the mean against the gradient. To first order the pull is moved * (K - 1) / K.
        assert pull == pytest.approx(moved * (LEAVES - 1) / LEAVES, abs=4 * error + 0.03)
        assert abs(pull) > 4 * error


def test_with_a_frozen_reference_it_pulls_to_the_reference_at_once() -> None:
    noise = torch.randn(GROUPS, LEAVES, generator=torch.Generator().manual_seed(2))
    for mean in (0.7, -0.3):
        pull, error = drift(noise, mean=mean, behaviour=mean, advantage="centred", reference="frozen")
        # A_i - mean A = -mean (eps_i - mean eps): the expected gradient is mean * (K - 1) / K.
        assert pull == pytest.approx(mean * (LEAVES - 1) / LEAVES, abs=4 * error)
        assert abs(pull) > 4 * error
