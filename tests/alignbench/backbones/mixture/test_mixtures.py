"""Mixtures against independent computations: sampling, quadrature, finite differences."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from alignbench.backbones.mixture.mixtures import (
    Mixture,
    as_images,
    divergences,
    from_images,
    mixture_velocity,
    noise_quadrature,
)

TWO = Mixture(
    torch.tensor([0.3, 0.7], dtype=torch.float64),
    torch.tensor([[-2.0, 0.0], [1.0, 1.5]], dtype=torch.float64),
    torch.tensor([0.5, 0.8], dtype=torch.float64),
)


def velocity(mixture: Mixture, x: torch.Tensor, sigma: float) -> torch.Tensor:
    n = len(x)
    return mixture_velocity(
        x,
        torch.full((n,), sigma, dtype=x.dtype),
        mixture.weights.expand(n, -1),
        mixture.means.expand(n, -1, -1),
        mixture.stds.expand(n, -1),
    )


def test_the_density_is_scipys() -> None:
    points = np.array([[0.0, 0.0], [-2.0, 0.3], [4.0, -1.0]])
    expected = 0.3 * stats.multivariate_normal([-2, 0], 0.25).pdf(points)
    expected = expected + 0.7 * stats.multivariate_normal([1, 1.5], 0.64).pdf(points)
    assert TWO.log_density(torch.from_numpy(points)).exp().numpy() == pytest.approx(expected, rel=1e-12)


def test_samples_have_the_mixtures_moments() -> None:
    x = TWO.sample(200_000, torch.Generator().manual_seed(0))
    mean = 0.3 * TWO.means[0] + 0.7 * TWO.means[1]
    spread = 0.3 * (0.25 + (TWO.means[0] - mean) ** 2) + 0.7 * (0.64 + (TWO.means[1] - mean) ** 2)
    # Five standard errors of deviations of about 1.6.
    assert torch.allclose(x.mean(0), mean, atol=0.018)
    assert torch.allclose(x.var(0), spread, atol=0.05)


def test_the_velocity_is_the_conditional_mean_of_noise_minus_picture() -> None:
    """By regression: among pairs that end near a point, the mean of x_1 - x_0."""
    generator = torch.Generator().manual_seed(1)
    x0 = TWO.sample(4_000_000, generator)
    x1 = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    x = 0.4 * x0 + 0.6 * x1
    for point in ([0.0, 0.0], [-0.8, 0.3], [0.7, 1.0]):
        here = torch.tensor(point, dtype=torch.float64)
        near = (x - here).norm(dim=1) < 0.05
        found = (x1 - x0)[near].mean(0)
        error = 5 * (x1 - x0)[near].std(0) / near.sum().sqrt() + 0.02  # sampling, and the size of the neighbourhood
        assert bool(((velocity(TWO, here[None], 0.6)[0] - found).abs() < error).all())


def test_the_velocity_carries_the_marginals() -> None:
    """The continuity equation d p / d sigma + div(p v) = 0, by central differences."""
    x = torch.tensor([[0.2, -0.3], [-1.0, 0.4], [1.3, 1.1]], dtype=torch.float64)
    sigma, h = 0.55, 1e-5
    change = (TWO.at(sigma + h).log_density(x).exp() - TWO.at(sigma - h).log_density(x).exp()) / (2 * h)
    divergence = torch.zeros_like(change)
    for i in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[i] = h
        flux = [TWO.at(sigma).log_density(y).exp() * velocity(TWO, y, sigma)[:, i] for y in (x + step, x - step)]
        divergence += (flux[0] - flux[1]) / (2 * h)
    assert torch.allclose(change, -divergence, atol=1e-8)


def test_at_pure_noise_the_velocity_points_from_the_mean() -> None:
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = 0.3 * TWO.means[0] + 0.7 * TWO.means[1]
    assert torch.allclose(velocity(TWO, x, 1.0), x - mean)


@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_a_quadratic_tilt_is_the_mixture_that_quadrature_finds(beta: float) -> None:
    centre = torch.tensor([0.5, -0.2], dtype=torch.float64)
    tilted, log_z = TWO.tilted(beta, 0.8, centre)

    def unnormalised(y: float, x: float) -> float:
        point = torch.tensor([x, y], dtype=torch.float64)
        return float(torch.exp(TWO.log_density(point) - beta * 0.4 * (point - centre).square().sum()))

    z, _ = integrate.dblquad(unnormalised, -6, 6, -6, 6, epsabs=1e-7)
    assert log_z == pytest.approx(math.log(z), abs=1e-5)
    point = torch.tensor([0.3, 0.9], dtype=torch.float64)
    assert float(tilted.log_density(point).exp()) == pytest.approx(unnormalised(0.9, 0.3) / z, rel=1e-5)
    assert float(tilted.weights.sum()) == pytest.approx(1.0)


def test_points_survive_as_images() -> None:
    points = torch.tensor([[0.0, -7.999], [3.14159, 7.5]])
    pictures = as_images(points)
    assert pictures.shape == (2, 1, 2, 3)
    assert pictures.dtype == np.uint8
    assert from_images(pictures) == pytest.approx(points.numpy(), abs=1.3e-4)  # half of 16 / 65535, and float32
    assert from_images(as_images(torch.tensor([[99.0]])))[0, 0] == pytest.approx(8.0)


def test_divergences_of_two_gaussians() -> None:
    """p = N(0, I), q = N(m, s^2 I) in two dimensions: KL(p || q) = 2 log s + (2 + |m|^2) / (2 s^2) - 1, and back."""
    z, weights = noise_quadrature(2, points=161)
    p = Mixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
    s, m = 0.8, torch.tensor([[0.6, -0.3]], dtype=torch.float64)
    q = Mixture(torch.ones(1, dtype=torch.float64), m, torch.tensor([s], dtype=torch.float64))
    found = divergences(weights, p.log_density(z), q.log_density(z))
    squared = 0.45
    assert found.kl_model_target == pytest.approx(2 * math.log(s) + (2 + squared) / (2 * s**2) - 1, abs=1e-5)
    assert found.kl_target_model == pytest.approx(-2 * math.log(s) + (2 * s**2 + squared) / 2 - 1, abs=1e-5)
    assert found.reached == pytest.approx(1.0, abs=1e-6)
    # Jensen-Shannon by plain Monte Carlo of the two distributions.
    generator = torch.Generator().manual_seed(0)

    def half(one: Mixture, other: Mixture) -> float:
        x = one.sample(400_000, generator).double()
        a, b = one.log_density(x), other.log_density(x)
        return float((a - torch.logaddexp(a, b) + math.log(2)).mean()) / 2

    assert found.js == pytest.approx(half(p, q) + half(q, p), abs=2e-3)  # about five standard errors


def test_equal_laws_have_no_divergence_and_disjoint_ones_all_of_it() -> None:
    z, weights = noise_quadrature(1, points=161)
    p = Mixture(torch.ones(1), torch.zeros(1, 1), torch.ones(1))
    far = Mixture(torch.ones(1), torch.full((1, 1), 40.0), torch.full((1,), 0.1))
    same = divergences(weights, p.log_density(z), p.log_density(z))
    assert (same.kl_model_target, same.kl_target_model, same.js) == pytest.approx((0, 0, 0), abs=1e-12)
    other = divergences(weights, p.log_density(z), far.log_density(z))
    assert other.reached == 0
    assert other.js == pytest.approx(math.log(2))
