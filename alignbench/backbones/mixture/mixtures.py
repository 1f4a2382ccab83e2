"""Gaussian mixtures whose flow, reward-tilted target and divergences are known, for the backbone `gaussian_mixture`.

Scorers get a point as an image: `d` pixels in one row, each with the 16-bit fixed-point value of one coordinate in its red
(high) and green (low) bytes. Points can thus be scored like images of any backbone, with a resolution of 2.4e-4.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

EXTENT = 8.0
"""Largest absolute coordinate in an image; larger ones are clipped."""
LEVELS = 2**16 - 1


@dataclass(frozen=True)
class Mixture:
    """The mixture sum_m weights_m N(means_m, stds_m^2 I).

    Attributes:
        weights: float [M], with sum 1.
        means: float [M, d].
        stds: float [M].
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    @property
    def dimension(self) -> int:
        """The dimension d of the space."""
        return self.means.shape[1]

    def log_joint(self, x: Tensor) -> Tensor:
        """The log of weight times density of each component, [..., M], for x [..., d]."""
        squared = (x[..., None, :] - self.means).square().sum(-1)
        normaliser = self.dimension * (torch.log(self.stds) + 0.5 * math.log(2 * math.pi))
        return torch.log(self.weights) - squared / (2 * self.stds**2) - normaliser

    def log_density(self, x: Tensor) -> Tensor:
        """The log density, [...], for x [..., d]."""
        return torch.logsumexp(self.log_joint(x), -1)

    def at(self, sigma: float) -> "Mixture":
        """The distribution of x_sigma = (1 - sigma) x_0 + sigma x_1 with x_0 of this mixture and x_1 ~ N(0, I)."""
        scale = 1 - sigma
        return Mixture(self.weights, scale * self.means, torch.sqrt(scale**2 * self.stds**2 + sigma**2))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws points, [count, d]."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dimension, generator=generator, dtype=self.means.dtype)
        return self.means[chosen] + self.stds[chosen, None] * noise

    def tilted(self, beta: float, curvature: float, centre: Tensor) -> tuple["Mixture", float]:
        """The target p(x) exp(beta R(x)) / Z for R(x) = -(curvature / 2) |x - centre|^2, which is again a mixture; and log Z.

        Each component is multiplied by a Gaussian of precision k = beta curvature, which need not be normalised.
        """
        k = beta * curvature
        variance = self.stds**2
        precision = 1 / variance + k
        means = (self.means / variance[:, None] + k * centre) / precision[:, None]
        squared = (self.means - centre).square().sum(1)
        log_factor = -0.5 * self.dimension * torch.log(variance * precision) - 0.5 * k * squared / (1 + k * variance)
        log_weights = torch.log(self.weights) + log_factor
        log_z = torch.logsumexp(log_weights, 0)
        return Mixture(torch.exp(log_weights - log_z), means, precision.rsqrt()), float(log_z)


def mixture_velocity(x: Tensor, sigma: Tensor, weights: Tensor, means: Tensor, stds: Tensor) -> Tensor:
    """The velocity E[x_1 - x_0 | x_sigma = x] of the flow from noise to the mixture.

    Given a component, x_0 and x_1 are linear in x: with v = (1 - sigma)^2 s^2 + sigma^2 and r = x - (1 - sigma) mean,
    E[x_0 | x] = mean + (1 - sigma) s^2 r / v and E[x_1 | x] = sigma r / v; components mix by their posteriors.

    Args:
        x: [B, d].
        sigma: [B].
        weights, stds: [B, M], those of the mixture of each row.
        means: [B, M, d], those of the mixture of each row.
    """
    s, scale = sigma[:, None], (1 - sigma)[:, None]
    variance = scale**2 * stds**2 + s**2
    residual = x[:, None, :] - scale[..., None] * means
    log_joint = torch.log(weights) - residual.square().sum(-1) / (2 * variance) - 0.5 * x.shape[1] * torch.log(variance)
    posterior = torch.softmax(log_joint, dim=1)
    of_component = ((s - scale * stds**2) / variance)[..., None] * residual - means
    return (posterior[..., None] * of_component).sum(1)


def as_images(points: Tensor) -> np.ndarray:
    """Encodes points [B, d] as images, uint8 [B, 1, d, 3]; see the module's docstring."""
    scaled = ((points.detach().double().clamp(-EXTENT, EXTENT) + EXTENT) / (2 * EXTENT) * LEVELS).round()
    codes = scaled.cpu().numpy().astype(np.uint16)
    images = np.zeros((*codes.shape, 3), dtype=np.uint8)
    images[..., 0], images[..., 1] = codes >> 8, codes & 0xFF
    return images[:, None]


def from_images(images: np.ndarray) -> np.ndarray:
    """Decodes images from `as_images` to points, float64 [B, d], with an error of at most 1.3e-4."""
    codes = images[:, 0, :, 0].astype(np.float64) * 256 + images[:, 0, :, 1]
    return codes / LEVELS * (2 * EXTENT) - EXTENT


@dataclass(frozen=True)
class Divergences:
    """Divergences between the model p and the target q, in nats.

    Attributes:
        kl_model_target: KL(p || q).
        kl_target_model: KL(q || p), over points that p reaches.
        js: the Jensen-Shannon divergence, at most log 2.
        reached: share of the target's mass at points that p reaches on the quadrature; 1 if p covers q.
    """

    kl_model_target: float
    kl_target_model: float
    js: float
    reached: float


def divergences(weights: Tensor, log_model: Tensor, log_target: Tensor) -> Divergences:
    """Divergences from a quadrature of the model: points x_i with weights w_i (with sum 1), log p(x_i) and log q(x_i).

    With r = q / p: KL(p || q) = sum w log(1 / r), KL(q || p) = sum w r log r. Mass of q where there is no point counts as
    disjoint in the Jensen-Shannon divergence.

    Args:
        weights: w, [N].
        log_model: log p, [N].
        log_target: log q, [N].
    """
    log_r = log_target - log_model
    r = torch.exp(log_r)
    reached = float((weights * r).sum())
    half = torch.log1p(r) - math.log(2)  # log of (1 + r) / 2 = m / p
    js = 0.5 * float((weights * -half).sum()) + 0.5 * float((weights * r * (log_r - half)).sum())
    js += 0.5 * max(0.0, 1 - reached) * math.log(2)
    return Divergences(
        kl_model_target=float((weights * -log_r).sum()),
        kl_target_model=float((weights * r * log_r).sum()),
        js=min(max(js, 0.0), math.log(2)),
        reached=reached,
    )


def js_of_masses(one: Tensor, other: Tensor) -> float:
    """Computes the Jensen-Shannon divergence of two distributions over the same modes, [M] each, in nats."""
    middle = (one + other) / 2
    return 0.5 * float((torch.xlogy(one, one / middle) + torch.xlogy(other, other / middle)).nansum())


def midpoints(dimension: int, points: int, extent: float) -> tuple[Tensor, float]:
    """The midpoints of a grid over +- extent in each direction, float64 [points ** d, d], and the volume of a cell."""
    step = 2 * extent / points
    line = torch.arange(points, dtype=torch.float64) * step - extent + step / 2
    return torch.cartesian_prod(*[line] * dimension).view(-1, dimension), step**dimension


def noise_quadrature(dimension: int, points: int, extent: float = 5.5) -> tuple[Tensor, Tensor]:
    """The midpoints of a grid over +- extent in each direction, float64 [N, d], and their standard normal weights, [N].

    The weights are normalised: the mass beyond the extent, 4e-8 in each direction, is distributed over the grid.
    """
    grid, _ = midpoints(dimension, points, extent)
    weights = torch.exp(-0.5 * grid.square().sum(1))
    return grid, weights / weights.sum()
