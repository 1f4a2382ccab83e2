from statistics import mean, pvariance
from typing import Any

import pytest
import torch
from torch import Tensor

from alignbench import RolloutForest, UserError, load_objective
from alignbench.backbones.mixture.scenarios import world
from alignbench.backbones.mixture.tilted_flow import tilted_flow
from alignbench.rollouts.terms import Velocities
from objectives.crd import CRD
from tests.support.final_images import forest_of, gaussian_velocity, rows_at, velocity_of
from tests.support.replays import REWARDS, by_autograd, check, drawn, plan_of
from tests.support.toys import PROMPTS, ToyBackbone, two_groups_of_three

EXACT: dict[str, Any] = {
    "anchor": "reference", "weight": "exact", "per": "image", "times": "uniform",
    "reward_scale": "raw", "adv_clip": 1e6, "kl_beta": 0.0,
}  # fmt: skip
"""Settings with which the fixed point is the tilted target."""


@pytest.fixture
def forest() -> RolloutForest:
    return two_groups_of_three(ToyBackbone(), [0.0, 1.0, 2.0, 0.3, 0.3, 0.3])


def crd(**settings: Any) -> CRD:
    objective = load_objective("crd", **settings)
    assert isinstance(objective, CRD)
    return objective


def test_loss_by_hand(forest: RolloutForest) -> None:
    z = torch.tensor([0.2, 0.5, -0.1, 9.0, 8.0, 7.0])
    terms = {"implicit_reward": z, "velocity_distance": torch.arange(6.0)}
    # The second group's rewards are equal: its z say nothing. R~ is -1, 0, 1.
    objective = crd(beta=0.5, kl_beta=0.1, kl_floor=0.02, reward_scale="raw", adv_clip=2.0)
    residuals = [0.2 - 0.2 + 0.5, 0.5 - 0.2, -0.1 - 0.2 - 0.5]
    held = [0.02 + 0.08 * r for r in (0.25, 0.5, 0.75, 0.5, 0.5, 0.5)]
    expected = mean(r * r for r in residuals) / 1.0 + mean(h * d for h, d in zip(held, range(6), strict=True))
    assert float(objective.loss(terms, forest)) == pytest.approx(expected, rel=1e-5)


def test_its_value_is_the_groups_variance_over_two_beta(forest: RolloutForest) -> None:
    z = torch.tensor([0.2, 0.5, -0.1, 1.0, 2.0, 3.0]).requires_grad_()
    forest.rewards = torch.tensor([0.0, 1.0, 2.0, 1.0, 5.0, 0.0])
    objective = crd(beta=0.5, kl_beta=0.0, reward_scale="raw", adv_clip=100.0)
    loss = objective.loss({"implicit_reward": z}, forest)
    rewards = forest.rewards.tolist()
    imbalance = [float(v) - 0.5 * r for v, r in zip(z.detach(), rewards, strict=True)]
    assert float(loss.detach()) == pytest.approx((pvariance(imbalance[:3]) + pvariance(imbalance[3:])) / 2 / 1.0, rel=1e-5)
    loss.backward()
    centred = [v - mean(group) for group in (imbalance[:3], imbalance[3:]) for v in group]
    assert z.grad is not None
    # d/dz of (1 / (2 beta N)) sum residual^2, the mean held, is residual / (beta N).
    assert z.grad.tolist() == pytest.approx([c / 0.5 / 6 for c in centred], abs=1e-6)


def test_on_the_first_update_the_gradient_is_the_advantages_for_any_beta(forest: RolloutForest) -> None:
    for beta in (0.1, 3.0):
        z = torch.zeros(6).requires_grad_()
        crd(beta=beta, kl_beta=0.0).loss({"implicit_reward": z}, forest).backward()
        assert z.grad is not None
        # -R~ / N over the images of groups with distinct rewards.
        assert z.grad.tolist() == pytest.approx([1.5**0.5 / 3, 0, -(1.5**0.5) / 3, 0, 0, 0], abs=1e-6)


def test_the_implicit_reward_by_a_second_implementation(forest: RolloutForest) -> None:
    for weight in ("adaptive", "uniform", "exact"):
        objective = crd(weight=weight, times="uniform")
        rows = objective.rows(forest, 0)
        v, old, reference = (torch.randn(rows.x.shape, generator=torch.Generator().manual_seed(s)) for s in range(3))
        found = objective.terms(rows, Velocities(v, reference, old))["implicit_reward"]
        for n in range(len(rows)):
            s, values = float(rows.sigma[n]), []
            for velocity in (v[n], old[n]):
                error = velocity - rows.noise[n] + rows.x0[n]
                square, absolute = float((error**2).mean()), float(error.abs().mean())
                by_weight = {"adaptive": square / absolute, "uniform": square, "exact": (1 - s) / s * square * error.numel()}
                values.append(-by_weight[weight])
            assert float(found[n]) == pytest.approx(values[0] - values[1], rel=1e-3, abs=1e-4)


def test_the_average_lags_by_the_published_schedule_and_does_not_draw() -> None:
    assert [crd().behaviour_ema_decay(n) for n in (0, 50, 900)] == pytest.approx([0.25, 0.5, 0.999])
    assert crd().needs.behaviour_is_ema
    assert crd().needs.policy_draws_rollouts
    assert not crd(anchor="reference").needs.behaviour


def test_the_exact_weight_is_refused_for_times_that_are_not_uniform() -> None:
    with pytest.raises(UserError, match="weight=exact is a mean over sigma, which needs times=uniform, got times=schedule"):
        crd(weight="exact")


# ---------------------------------------------------------------------------------------------------- the fixed point


def test_at_the_tilted_target_the_exact_loss_and_its_gradient_vanish() -> None:
    """z is the log-density ratio of target and base up to log Z, so it equals beta R up to a constant of the group."""
    prompt, beta = "quadratic 0", 2.0
    w, target = world(prompt, 2), tilted_flow(prompt, 2, beta).target
    assert target is not None
    points = w.base.sample(6, torch.Generator().manual_seed(3)).float()
    made = forest_of(points, w.reward(points.double()))
    objective = crd(draws=8192, beta=beta, **EXACT)
    rows = objective.rows(made, 0)
    base = velocity_of(w.base, rows.x, rows.sigma)

    def at(v: Tensor) -> tuple[float, Tensor]:
        v = v.clone().requires_grad_()
        loss = objective.loss(objective.terms(rows, Velocities(v, base, None)), made)
        loss.backward()
        assert v.grad is not None
        return float(loss.detach()), v.grad

    spread = beta * float(w.reward(points.double()).std())
    assert spread > 1
    at_base, base_slope = at(base)
    at_target, target_slope = at(velocity_of(target, rows.x, rows.sigma))
    assert (2 * beta * at_base) ** 0.5 == pytest.approx(spread * (5 / 6) ** 0.5, rel=0.02)
    # What is left is the Monte Carlo error of 8,192 noises.
    assert (2 * beta * at_target) ** 0.5 < 0.05 * spread
    assert float(target_slope.norm()) < 0.1 * float(base_slope.norm())


def test_a_row_of_uniform_weight_moves_in_the_targets_direction_a_quarter_as_far() -> None:
    """For N(0,1) and R = x the row's fixed point is v - v_ref = -beta sigma / 2, the target's -beta sigma / (2 sigma^2 - 2
    sigma + 1)."""
    beta, sigma, samples = 0.1, 0.5, 200_000
    x0 = torch.randn(samples, 1, generator=torch.Generator().manual_seed(0))
    made = forest_of(x0, x0[:, 0])
    rows = rows_at(made, sigma, seed=1)
    reference = gaussian_velocity(rows.x, sigma)
    objective = crd(beta=beta, weight="uniform", anchor="reference", reward_scale="raw", kl_beta=0.0, adv_clip=100.0)

    def slope(moved: float) -> float:
        v = (reference + moved).requires_grad_()
        objective.loss(objective.terms(rows, Velocities(v, reference, None)), made).backward()
        assert v.grad is not None
        return float(v.grad.sum())

    own, targets = -beta * sigma / 2, -beta * sigma / (2 * sigma**2 - 2 * sigma + 1)
    assert abs(slope(own)) < 0.05 * abs(slope(0.0))
    assert slope(0.0) > 0 > slope(targets)


def test_loss_and_gradient_equal_those_of_a_second_implementation() -> None:
    toy, behaviour, forest = drawn(plan_of("dynamic_tree"))
    for per in ("row", "image"):
        objective = crd(beta=0.2, draws=2, per=per, weight="uniform", kl_beta=0.3, kl_floor=0.3, reward_scale="raw")
        rows = objective.rows(forest, 1)
        z: list[list[list[Tensor]]] = [[[] for _ in range(4)] for _ in PROMPTS]
        loss = torch.zeros(())
        for n in range(len(rows)):
            g, k = divmod(int(rows.leaf[n]), 4)
            s, image = rows.sigma[n], forest.states[forest.leaves[rows.leaf[n]]]
            at = ((1 - s) * image + s * rows.noise[n])[None], s[None], toy.encode(PROMPTS[g : g + 1])
            v, old, reference = toy.net(*at)[0], behaviour(*at)[0].detach(), toy.frozen(*at)[0].detach()
            e, e_old = (((each - rows.noise[n] + image) ** 2).mean() for each in (v, old))
            z[g][k].append(e_old - e)
            loss = loss + 0.3 * ((v - reference) ** 2).mean() / len(rows)
        for g in range(2):
            columns = (
                [[z[g][k][d] for k in range(4)] for d in range(2)] if per == "row" else [[sum(z[g][k]) / 2 for k in range(4)]]
            )
            for column in columns:
                y = [column[k] - 0.2 * REWARDS[g][k] for k in range(4)]
                centre = sum(y) / 4
                loss = loss + sum((each - centre) ** 2 for each in y) / 4 / 2 / len(columns) / (2 * 0.2)
        old_parameters = [p.detach().clone() for p in behaviour.parameters()]
        check(toy, objective, forest, *by_autograd(toy, loss), update=1, old=old_parameters)
