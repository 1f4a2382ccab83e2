"""The flow to the target, against closed forms, finite differences, and what its own ODE draws."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from alignbench.backbones.mixture.known_target import known_target
from alignbench.backbones.mixture.mixtures import EXTENT, Mixture, js_of_masses, midpoints, mixture_velocity
from alignbench.backbones.mixture.scenarios import Quadratic, world
from alignbench.backbones.mixture.tilted_flow import LOCAL, OptimalVelocity, TiltedFlow, optimal_velocity, tilted_flow

ON_THE_PLANE, AROUND_THE_STATE = (1.0, 0.6, 0.2, 0.1), (LOCAL / (1 + LOCAL), 0.03)
"""Sigmas at which one grid or the other is used."""


def tensor(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def one_gaussian(mean: float, std: float) -> Mixture:
    return Mixture(tensor(1.0), tensor([mean, 0.0]), tensor(std))


def base_velocity(mixture: Mixture, x: Tensor, sigma: float) -> Tensor:
    expanded = (mixture.weights.expand(len(x), -1), mixture.means.expand(len(x), -1, -1), mixture.stds.expand(len(x), -1))
    return mixture_velocity(x, torch.full((len(x),), sigma, dtype=torch.float64), *expanded)


def states(sigma: float, count: int = 40) -> Tensor:
    return world("equal_modes 1").base.at(sigma).sample(count, torch.Generator().manual_seed(3))


def hidden(reward: Quadratic) -> TiltedFlow:
    """The flow for a reward whose form it does not know, so that it integrates on grids."""
    return TiltedFlow(world("quadratic 1").base, lambda x: reward(x), 3.0)


def test_one_gaussian_with_a_quadratic_reward_is_the_flow_to_another_gaussian() -> None:
    # N(1, 0.5^2) times exp(-2 (k / 2) |x - c|^2) with k = 1.5, c = (-1, 0): precision 4 + 3, mean (4 - 3) / 7.
    flow = TiltedFlow(one_gaussian(1.0, 0.5), Quadratic(1.5, tensor(-1.0, 0.0)), 2.0)
    x, sigma = tensor([0.3, -0.8]), 0.4
    variance, mean = 1 / 7, 1 / 7
    # With x_sigma = 0.6 x_0 + 0.4 x_1: E[x_0 | x] = mean + 0.6 var (x - 0.6 mean) / (0.36 var + 0.16), likewise E[x_1 | x].
    total = 0.36 * variance + 0.16
    expected = [(0.4 - 0.6 * variance) * (coordinate - 0.6 * m) / total - m for coordinate, m in ((0.3, mean), (-0.8, 0.0))]
    assert flow.velocity(x, sigma)[0].tolist() == pytest.approx(expected)
    # Z = E exp(-1.5 |x - c|^2) = (1 + 3 / 4)^-1 exp(-1.5 * 4 / (1 + 3 / 4)), in two dimensions.
    assert flow.log_z == pytest.approx(-math.log(1.75) - 6 / 1.75)


@pytest.mark.parametrize("sigma", [*ON_THE_PLANE, *AROUND_THE_STATE])
def test_the_grids_agree_with_the_closed_form_of_a_quadratic_reward(sigma: float) -> None:
    w = world("quadratic 1")
    assert isinstance(w.reward, Quadratic)
    exact, on_grids, x = TiltedFlow(w.base, w.reward, 3.0), hidden(w.reward), states(sigma)
    assert on_grids.target is None
    assert torch.allclose(on_grids.velocity(x, sigma), exact.velocity(x, sigma), atol=1e-6)
    assert torch.allclose(on_grids.log_expectation(x, sigma), exact.log_expectation(x, sigma), atol=1e-8)


@pytest.mark.parametrize("sigma", [*ON_THE_PLANE, *AROUND_THE_STATE])
def test_without_a_tilt_the_velocity_is_that_of_the_base_model(sigma: float) -> None:
    w, x = world("unequal_modes 1"), states(sigma)
    flow = TiltedFlow(w.base, w.reward, 0.0)
    assert torch.allclose(flow.velocity(x, sigma), base_velocity(w.base, x, sigma), atol=1e-6)
    assert torch.allclose(flow.log_expectation(x, sigma), torch.zeros(len(x), dtype=torch.float64), atol=1e-8)


@pytest.mark.parametrize("sigma", [0.8, 0.3, 0.05])
@pytest.mark.parametrize("name", ["equal_modes", "narrow_peak", "quadratic"])
def test_the_drift_is_the_gradient_of_the_expected_tilt_by_finite_differences(name: str, sigma: float) -> None:
    w, x, step = world(f"{name} 1"), states(sigma, 20), 1e-4
    flow = TiltedFlow(w.base, w.reward, 4.0)
    moves = step * torch.eye(2, dtype=torch.float64)
    gradient = torch.stack(
        [(flow.log_expectation(x + e, sigma) - flow.log_expectation(x - e, sigma)) / (2 * step) for e in moves], dim=1
    )
    expected = base_velocity(w.base, x, sigma) - sigma / (1 - sigma) * gradient
    assert torch.allclose(flow.velocity(x, sigma), expected, atol=1e-3, rtol=1e-4)


def test_log_z_is_that_of_the_grid_of_the_reward() -> None:
    for prompt in ("equal_modes 0", "quadratic 2"):
        assert tilted_flow(prompt, 2, 4.0).log_z == pytest.approx(known_target(prompt, 2, 4.0).log_z, abs=1e-10)


def test_the_ode_of_the_optimal_velocity_draws_the_target() -> None:
    flow, w, beta = tilted_flow("unequal_modes 2", 2, 4.0), world("unequal_modes 2"), 4.0
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for sigma, sigma_next in pairwise(torch.linspace(1, 0, 41).tolist()):
        x = x + (sigma_next - sigma) * flow.velocity(x, sigma)
    grid, cell = midpoints(2, 200, EXTENT)
    target = torch.exp(w.base.log_density(grid) + beta * w.reward(grid) - flow.log_z) * cell
    of_grid, of_samples = w.base.log_joint(grid).argmax(1), w.base.log_joint(x).argmax(1)
    modes = torch.zeros(6, dtype=torch.float64)
    expected, drawn = modes.index_add(0, of_grid, target), torch.bincount(of_samples, minlength=6) / len(x)
    # 2000 samples over six modes have a divergence of about 5 / (8 * 2000) from their distribution.
    assert js_of_masses(drawn.double(), expected) < 1e-3
    assert float(js_of_masses(w.base.weights, expected)) > 0.05  # the base model's are far away
    error = float(w.reward(x).std()) / len(x) ** 0.5
    assert float(w.reward(x).mean()) == pytest.approx(float((target * w.reward(grid)).sum()), abs=4 * error + 0.01)


def test_far_from_every_mode_the_velocity_is_finite() -> None:
    flow = tilted_flow("many_modes 0", 2, 4.0)
    far = tensor([40.0, -35.0], [7.9, 7.9])
    for sigma in (0.09, 0.5, 1.0):
        assert torch.isfinite(flow.velocity(far, sigma)).all()


def test_velocities_are_compared_under_the_targets_own_distribution() -> None:
    for dimension, prompt in ((2, "unequal_modes 0"), (4, "quadratic 0")):
        optimal = optimal_velocity(prompt, dimension, 4.0, 0.5)
        assert float(optimal.weights.sum()) == pytest.approx(1.0)
        assert optimal.error(optimal.velocity) == 0.0
        # x_0.5 = (x_0 + x_1) / 2 has half the mean of the target.
        w, mean = world(prompt, dimension), (optimal.weights[:, None] * optimal.states).sum(0)
        if isinstance(w.reward, Quadratic):
            target = w.base.tilted(4.0, w.reward.curvature, w.reward.centre)[0]
            expected = 0.5 * (target.weights[:, None] * target.means).sum(0)
            assert torch.allclose(mean, expected, atol=0.05)  # 2048 samples
        else:
            grid, cell = midpoints(2, 200, EXTENT)
            mass = torch.exp(w.base.log_density(grid) + 4.0 * w.reward(grid)) * cell
            assert torch.allclose(mean, 0.5 * (mass[:, None] * grid).sum(0) / mass.sum(), atol=1e-4)


def test_an_error_of_the_velocity_is_its_weighted_mean_square() -> None:
    optimal = OptimalVelocity(tensor([0.0, 0.0], [1.0, 0.0]), tensor(0.75, 0.25), tensor([1.0, 1.0], [2.0, 0.0]))
    # Distances (3, 4) and (0, 1): 0.75 * 25 + 0.25 * 1.
    assert optimal.error(tensor([4.0, 5.0], [2.0, 1.0])) == pytest.approx(19.0)
