from math import exp
from statistics import mean, pstdev
from typing import Any

import pytest
import torch
from torch import Tensor

from alignbench import RolloutForest, load_objective
from alignbench.rollouts.terms import Velocities
from alignbench.training.engine import backward
from objectives.awm import AWM
from objectives.nft import NFT
from tests.support.replays import REWARDS, by_autograd, check, drawn, plan_of
from tests.support.toys import PROMPTS, ToyBackbone, two_groups_of_three

WEIGHTS = ["uniform", "sigma", "sigma_squared", "huber", "ghuber", "adaptive"]


@pytest.fixture
def forest() -> RolloutForest:
    return two_groups_of_three(ToyBackbone(), [0.0, 1.0, 2.0, 0.3, 0.3, 0.3])


def awm(**settings: Any) -> AWM:
    objective = load_objective("awm", **settings)
    assert isinstance(objective, AWM)
    return objective


def velocities(objective: AWM, forest: RolloutForest, seed: int = 1) -> tuple[Any, Tensor]:
    rows = objective.rows(forest, 0)
    return rows, torch.randn(rows.x.shape, generator=torch.Generator().manual_seed(seed))


def test_the_advantage_is_a_share_of_the_largest_by_the_batchs_deviation(forest: RolloutForest) -> None:
    rewards = [0.0, 1.0, 2.0, 0.3, 0.3, 0.3]
    expected = [(r - 1) / pstdev(rewards) / 5 for r in rewards[:3]]
    assert awm().advantage(forest)[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert awm().advantage(forest)[1].tolist() == [0.0, 0.0, 0.0]
    # The group's standardised rewards are -sqrt 1.5, 0, sqrt 1.5, beyond a clip of 1.
    assert awm(std="group", adv_clip=1.0).advantage(forest)[0].tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_likelihood_by_a_second_implementation(forest: RolloutForest, weight: str) -> None:
    objective = awm(weight=weight)
    rows, v = velocities(objective, forest)
    found = objective.likelihood(rows, v)
    for n in range(len(rows)):
        s, error = float(rows.sigma[n]), v[n] - rows.noise[n] + rows.x0[n]
        e, absolute = float((error**2).mean()), float(error.abs().mean())
        by_weight = {
            "uniform": e,
            "sigma": s * e,
            "sigma_squared": s * s * e,
            "huber": s * e**0.5,
            "ghuber": 4 * s * (e**0.25 - 1e-10**0.25),
            "adaptive": s * e / absolute,
        }
        assert float(found[n]) == pytest.approx(-by_weight[weight], rel=1e-4)


def test_loss_by_hand(forest: RolloutForest) -> None:
    terms = {
        "likelihood": torch.tensor([-1.0, -2.0]),
        "advantage": torch.tensor([1.0, -0.5]),
        "velocity_distance": torch.tensor([1.0, 3.0]),
        "ema_distance": torch.tensor([2.0, 4.0]),
    }
    # rho = 1: -(1 - 0.5) / 2; then 0.1 of 2 and 0.5 of 3.
    assert float(awm(kl_beta=0.1, ema_beta=0.5).loss(terms, forest)) == pytest.approx(-0.25 + 0.2 + 1.5)
    # Against the average rho is e^0.2 and e^-0.3, clipped to 1.1 and 0.9 where that is worse.
    terms["likelihood_old"] = torch.tensor([-1.2, -1.7])
    expected = -(1.1 - 0.5 * max(exp(-0.3), 0.9)) / 2
    assert float(awm(kl_beta=0.0, ema_beta=0.0, ratio="average", clip=0.1).loss(terms, forest)) == pytest.approx(expected)


def test_the_gradient_by_hand_is_the_advantage_times_that_of_the_weighted_error(forest: RolloutForest) -> None:
    """d/dv of sigma^2 e is 2 sigma^2 (v - Y) / D; for the generalised Huber weight it is sigma e^(-3/4) times that of e."""
    for weight in ("sigma_squared", "ghuber"):
        objective = awm(weight=weight, kl_beta=0.0, ema_beta=0.0)
        rows, v = velocities(objective, forest)
        at = v.clone().requires_grad_()
        objective.loss(objective.terms(rows, Velocities(at)), forest).backward()
        error = v - rows.noise + rows.x0
        e = error.square().mean((1, 2, 3), keepdim=True)
        sigma = rows.sigma.view(-1, 1, 1, 1)
        factor = sigma**2 if weight == "sigma_squared" else sigma * e**-0.75
        a = objective.advantage(forest).flatten()[rows.leaf].view(-1, 1, 1, 1)
        assert at.grad is not None
        assert torch.allclose(at.grad, a * factor * 2 * error / v[0].numel() / len(rows), atol=1e-6)  # float32


def test_the_first_update_is_nfts_without_a_lag_up_to_its_weight(forest: RolloutForest) -> None:
    """With the weight of nft's code it is exactly a fifth, since the advantage is divided by its clip."""
    common: dict[str, Any] = {"std": "batch", "kl_beta": 0.0}
    nft = load_objective("nft", beta=0.3, **common)
    assert isinstance(nft, NFT)
    rows, v = velocities(awm(), forest)
    gradients: dict[str, Tensor] = {}
    for name, objective in {"nft": nft, **{w: awm(weight=w, ema_beta=0.0, **common) for w in WEIGHTS}}.items():
        at = v.clone().requires_grad_()
        objective.loss(objective.terms(rows, Velocities(at, None, v)), forest).backward()
        assert at.grad is not None
        gradients[name] = at.grad.flatten(1)
    assert torch.allclose(5 * gradients["adaptive"], gradients["nft"], atol=1e-7, rtol=1e-5)
    learns = gradients["nft"].norm(dim=1) > 0
    assert learns.tolist() == [True, False, True, False, False, False]
    for weight in WEIGHTS:
        cosine = torch.cosine_similarity(gradients[weight][learns], gradients["nft"][learns])
        assert cosine.tolist() == pytest.approx([1.0, 1.0], abs=1e-5)  # float32


def test_equal_rewards_pull_the_policy_to_its_average_and_cost_rows_for_that_alone(forest: RolloutForest) -> None:
    forest.rewards[:] = 1.0
    objective = awm(kl_beta=0.0)
    rows, v = velocities(objective, forest)
    average = velocities(objective, forest, seed=2)[1]
    at = v.clone().requires_grad_()
    objective.loss(objective.terms(rows, Velocities(at, None, average)), forest).backward()
    assert at.grad is not None
    assert torch.allclose(at.grad, 2 * (v - average) / v.numel(), atol=1e-7)
    assert len(awm(kl_beta=0.0, ema_beta=0.0).rows(forest, 0)) == 0


def test_the_average_lags_as_published_and_draws_only_if_it_is_the_ratios(forest: RolloutForest) -> None:
    assert [awm().behaviour_ema_decay(n) for n in (0, 100, 300, 900)] == pytest.approx([0, 0.1, 0.3, 0.3])
    assert awm().needs.behaviour_is_ema
    assert awm().needs.policy_draws_rollouts
    assert not awm(ratio="average").needs.policy_draws_rollouts
    assert not awm(ema_beta=0.0).needs.behaviour


def test_loss_and_gradient_equal_those_of_a_second_implementation() -> None:
    toy, behaviour, forest = drawn(plan_of("dynamic_tree"))
    objective = awm(weight="sigma", draws=2, kl_beta=0.3, ema_beta=0.7)
    rows = objective.rows(forest, 1)
    every = [r for group in REWARDS for r in group]
    loss = torch.zeros(())
    for n in range(len(rows)):
        g, k = divmod(int(rows.leaf[n]), 4)
        a = (REWARDS[g][k] - mean(REWARDS[g])) / pstdev(every) / 5
        s, image = rows.sigma[n], forest.states[forest.leaves[rows.leaf[n]]]
        at = ((1 - s) * image + s * rows.noise[n])[None], s[None], toy.encode(PROMPTS[g : g + 1])
        v, old, reference = toy.net(*at)[0], behaviour(*at)[0].detach(), toy.frozen(*at)[0].detach()
        f = -s * ((v - rows.noise[n] + image) ** 2).mean()
        policy = -a * torch.exp(f - f.detach())
        held = 0.3 * ((v - reference) ** 2).mean() + 0.7 * ((v - old) ** 2).mean()
        loss = loss + (policy + held) / len(rows)
    old_parameters = [p.detach().clone() for p in behaviour.parameters()]
    check(toy, objective, forest, *by_autograd(toy, loss), update=1, old=old_parameters)


def test_the_average_costs_rows_once_it_is_another_model(forest: RolloutForest) -> None:
    policy = ToyBackbone()
    assert backward(policy, awm(kl_beta=0.0), forest).forward_rows == 6
    old = [p.detach().clone() for p in policy.parameters()]
    assert backward(policy, awm(kl_beta=0.0), forest, behaviour=old).forward_rows == 12
