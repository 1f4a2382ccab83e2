from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor

from alignbench import RolloutForest, load_objective
from alignbench.backbones.mixture.scenarios import world
from alignbench.backbones.mixture.tilted_flow import tilted_flow
from alignbench.rollouts.terms import Velocities
from objectives.ram import RAM
from tests.support.final_images import forest_of, gaussian_velocity, rows_at, velocity_of
from tests.support.replays import REWARDS, by_autograd, check, drawn, plan_of
from tests.support.toys import PROMPTS, ToyBackbone, two_groups_of_three

SAMPLES = 200_000


@pytest.fixture
def forest() -> RolloutForest:
    return two_groups_of_three(ToyBackbone(), [0.0, 1.0, 2.0, 0.3, 0.3, 0.3])


def ram(**settings: Any) -> RAM:
    objective = load_objective("ram", **settings)
    assert isinstance(objective, RAM)
    return objective


def descent(objective: RAM, forest: RolloutForest, v: Tensor, reference: Tensor, rows: Any) -> Tensor:
    """D / 2 times the negative gradient of the summed loss on v: target - v of each row."""
    at = v.clone().requires_grad_()
    terms = objective.terms(rows, Velocities(at, reference, None))
    (objective.loss(terms, forest) * len(rows) * v[0].numel() / 2).backward()
    assert at.grad is not None
    return -at.grad


def test_the_gradient_by_hand(forest: RolloutForest) -> None:
    objective = ram(beta=3.0, reward_scale="raw")
    rows = objective.rows(forest, 0)
    v, reference = (torch.randn(rows.x.shape, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    reward = torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0])[rows.leaf].view(-1, 1, 1, 1)
    expected = reference + 3 * reward * (rows.noise - rows.x0 - v) - v
    assert torch.allclose(descent(objective, forest, v, reference, rows), expected, atol=1e-5)  # float32


def test_the_gradient_is_that_of_two_squares_which_the_reward_weights(forest: RolloutForest) -> None:
    """|v - v_ref|^2 + beta R~ |v - Y|^2, the form of advantage-weighted matching with a reference."""
    objective = ram(beta=2.0)
    rows = objective.rows(forest, 0)
    v, reference = (torch.randn(rows.x.shape, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    at = v.clone().requires_grad_()
    weight = 2 * objective.target_reward(forest).flatten()[rows.leaf]
    distances = (at - reference).square().flatten(1).sum(1), (at - rows.noise + rows.x0).square().flatten(1).sum(1)
    (0.5 * (distances[0] + weight * distances[1]).sum()).backward()
    assert at.grad is not None
    assert torch.allclose(descent(objective, forest, v, reference, rows), -at.grad, atol=1e-5)  # float32


def test_equal_rewards_pull_to_the_base_model_and_missing_ones_have_no_row(forest: RolloutForest) -> None:
    forest.rewards[1] = torch.nan
    assert ram().rows(forest, 0).leaf.tolist() == [0, 2, 3, 4, 5]
    forest.rewards[:] = 1.0
    rows = ram().rows(forest, 0)
    v, reference = torch.zeros(rows.x.shape), torch.ones(rows.x.shape)
    assert torch.equal(descent(ram(), forest, v, reference, rows), reference)


def test_the_published_average_lags_and_draws_the_rollouts() -> None:
    objective = ram(centre="average")
    assert [objective.behaviour_ema_decay(n) for n in (0, 50, 900)] == pytest.approx([0, 0.5, 0.9])
    assert not objective.needs.policy_draws_rollouts
    assert not ram().needs.behaviour


def mean_descent(k: float, power: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """At the velocity of the tilted target N(0,1) exp(k x) (power 1) or N(0,1) exp(-k x^2) (power 2) and sigma 1/2.

    Returns:
        Target - v as a linear function of x: constant and slope, float64 [2]; their standard errors; and v - v_ref likewise.
    """
    m, variance = (k, 1.0) if power == 1 else (0.0, 1 / (1 + 2 * k))
    x0 = m + variance**0.5 * torch.randn(SAMPLES, 1, generator=torch.Generator().manual_seed(seed + 7))
    reward = x0[:, 0] if power == 1 else -(x0[:, 0] ** 2)
    forest = forest_of(x0, reward)
    rows = rows_at(forest, 0.5, seed)
    v, reference = gaussian_velocity(rows.x, 0.5, m, variance), gaussian_velocity(rows.x, 0.5)
    found = descent(ram(beta=k, reward_scale="raw"), forest, v, reference, rows).double()
    features = torch.cat([torch.ones_like(found), rows.x.double()], dim=1)
    inverse = torch.linalg.inv(features.T @ features)
    coefficients = inverse @ features.T @ found
    errors = torch.sqrt(torch.diag(inverse)) * (found - features @ coefficients).std()
    moved = inverse @ features.T @ (v - reference).double()
    return coefficients[:, 0], errors, moved[:, 0]


def test_the_tilted_gaussian_of_a_linear_reward_is_the_fixed_point() -> None:
    left, error, moved = mean_descent(0.5, power=1)
    # v* - v_ref = -k s / ((1 - s)^2 + s^2).
    assert moved.tolist() == pytest.approx([-0.5, 0.0], abs=1e-5)
    assert (left.abs() < 4 * error).all()
    assert (error < 0.01).all()


def test_of_a_quadratic_reward_the_fixed_point_lacks_a_term_of_second_order() -> None:
    """v* - v_ref = 2 k x / (1 + k), and the loss asks for 2 k x / (1 + k)^2: the rest is the path's remaining divergence."""
    for k, whole, asked in ((0.4, 0.5714, 0.4082), (0.1, 0.1818, 0.1653)):
        left, error, moved = mean_descent(k, power=2)
        assert float(moved[1]) == pytest.approx(whole, abs=1e-4)
        assert float(left[1] + moved[1]) == pytest.approx(asked, abs=4 * float(error[1]))
        assert float(error[1]) < 0.005
        assert float(left[1]) == pytest.approx(-2 * k**2 / (1 + k) ** 2, abs=4 * float(error[1]))


def test_with_the_path_cost_the_tilted_gaussian_is_the_fixed_point() -> None:
    k, count = 0.4, 20_000
    x0 = (1 / (1 + 2 * k)) ** 0.5 * torch.randn(count, 1, generator=torch.Generator().manual_seed(5))
    forest = forest_of(x0, -(x0[:, 0] ** 2))
    left = {}
    for path_cost in (False, True):
        objective = ram(beta=k, reward_scale="raw", path_cost=path_cost, times="uniform")
        rows = objective.rows(forest, 0)
        v, reference = gaussian_velocity(rows.x, rows.sigma, 0.0, 1 / (1 + 2 * k)), gaussian_velocity(rows.x, rows.sigma)
        slope = descent(objective, forest, v, reference, rows).double()[:count] / (2 if path_cost else 1)
        # The component along v* - v_ref, relative to it, by batches for its error.
        ratio = (slope * (v - reference)[:count]).view(50, -1).sum(1) / (v - reference)[:count].square().view(50, -1).sum(1)
        left[path_cost] = float(ratio.mean()), float(ratio.std()) / 50**0.5
    assert left[False][0] < -0.2
    assert abs(left[True][0]) < 4 * left[True][1]
    assert left[True][1] < 0.03


def test_with_the_path_cost_the_target_of_gaussian_mixture_is_the_fixed_point() -> None:
    """A mixture and a quadratic reward, whose target is a mixture again; the earlier test's component, in two dimensions."""
    prompt, beta, count = "quadratic 0", 2.0, 20_000
    w, target = world(prompt, 2), tilted_flow(prompt, 2, beta).target
    assert target is not None
    points = target.sample(count, torch.Generator().manual_seed(4)).float()
    forest, left = forest_of(points, w.reward(points.double())), {}
    for path_cost in (False, True):
        objective = ram(beta=beta, reward_scale="raw", path_cost=path_cost, times="uniform")
        rows = objective.rows(forest, 0)
        v, reference = (velocity_of(mixture, rows.x, rows.sigma) for mixture in (target, w.base))
        slope = descent(objective, forest, v, reference, rows).double()[:count] / (2 if path_cost else 1)
        moved = (v - reference)[:count]
        ratio = (slope * moved).view(50, -1).sum(1) / moved.square().view(50, -1).sum(1)
        left[path_cost] = float(ratio.mean()), float(ratio.std()) / 50**0.5
    assert abs(left[False][0]) > 5 * left[False][1]
    assert abs(left[True][0]) < 4 * left[True][1]


def test_the_noising_of_a_path_has_the_marginals_of_its_sigma(forest: RolloutForest) -> None:
    """x at sigma, from x_u by another noise, has mean (1 - sigma) x_0 and variance sigma^2; the states differ only in noise."""
    forest.states[:] = 2.0
    rows: Any = ram(draws=2000, path_cost=True, times="uniform").rows(forest, 0)
    half = len(rows) // 2
    assert (rows.sigma[half:] <= rows.sigma[:half]).all()
    assert torch.equal(rows.x[half:], rows.earlier[:half])
    noise = rows.noise[:half].flatten(1)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.01)


def test_loss_and_gradient_equal_those_of_a_second_implementation() -> None:
    toy, behaviour, forest = drawn(plan_of("dynamic_tree"))
    for centre in ("policy", "average"):
        objective = ram(beta=1.5, draws=2, centre=centre, reward_scale="raw")
        rows = objective.rows(forest, 1)
        loss = torch.zeros(())
        for n in range(len(rows)):
            g, k = divmod(int(rows.leaf[n]), 4)
            s, image = rows.sigma[n], forest.states[forest.leaves[rows.leaf[n]]]
            at = ((1 - s) * image + s * rows.noise[n])[None], s[None], toy.encode(PROMPTS[g : g + 1])
            v, reference = toy.net(*at)[0], toy.frozen(*at)[0]
            about = v if centre == "policy" else behaviour(*at)[0]
            target = reference + 1.5 * (REWARDS[g][k] - mean(REWARDS[g])) * (rows.noise[n] - image - about)
            loss = loss + ((v - target.detach()) ** 2).mean() / len(rows)
        old = [p.detach().clone() for p in behaviour.parameters()]
        check(toy, objective, forest, *by_autograd(toy, loss), update=1, old=old)


def test_with_the_path_cost_gradient_caching_is_autograd() -> None:
    toy, _, forest = drawn(plan_of("dynamic_tree"))
    objective = ram(draws=2, path_cost=True, times="uniform")
    rows: Any = objective.rows(forest, 1)
    condition = toy.encode(PROMPTS)[rows.group]
    v, reference = toy.net(rows.x, rows.sigma, condition), toy.frozen(rows.x, rows.sigma, condition).detach()
    loss = objective.loss(objective.terms(rows, Velocities(v, reference, None)), forest)
    check(toy, objective, forest, *by_autograd(toy, loss), rounding=1e-5, update=1)
