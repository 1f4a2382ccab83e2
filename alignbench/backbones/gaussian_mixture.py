"""gaussian_mixture: 2-D points instead of images; the base model, its target and every divergence are known.

The base velocity is the closed form of a Gaussian mixture, one for each prompt (`alignbench.backbones.mixture.scenarios`).
Training changes a residual network, whose output is zero at the start. Sampling is a chain of Euler steps
x -> x + (sigma' - sigma) v(x), so the density of a sample x_0 that came from the noise z is known:

    log p(x_0) = log N(z; 0, I) - sum_t log |det(I + (sigma' - sigma) dv/dx)|

With z on a quadrature grid, the divergences to the target q(x) = p_base(x) exp(beta R(x)) / Z are computed instead of being
estimated. In more than two dimensions z is quasi-random, and integrals over q are averages with weights q / p.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from scipy.stats.qmc import MultivariateNormalQMC
from torch import Tensor, nn

from alignbench import Backbone, UserError, flow
from alignbench.backbone import (
    COVERED,
    MODE_SHARE,
    BackboneSettings,
    KnownDistributions,
    Measured,
    PointDistribution,
    Tilt,
)
from alignbench.backbones.mixture.known_target import KnownPoints, KnownTarget, known_grid, known_target
from alignbench.backbones.mixture.mixtures import (
    EXTENT,
    as_images,
    divergences,
    js_of_masses,
    midpoints,
    mixture_velocity,
    noise_quadrature,
)
from alignbench.backbones.mixture.scenarios import PROMPTS_EACH, Quadratic, World, check_prompt, world
from alignbench.backbones.mixture.tilted_flow import SIGMAS, optimal_velocity
from alignbench.errors import NonFiniteError
from alignbench.statistics import best_of_n_mass

FREQUENCIES = (1.0, 2.0, 4.0)
"""Frequencies of the features of sigma, in half turns over the schedule."""
FEATURES = 64
"""Number of random Fourier features of the position; their frequencies are standard normal."""
POINTS = 4096
"""Number of points of a distribution that a run records, and of the noise in more than two dimensions."""
TARGET_GRID = 160
"""Number of grid points in each direction of a target that a run records."""
SMALLEST_POINT_MASS = 1e-2
"""Points of that grid with a smaller mass, relative to the mean mass of a point, are left out of the record."""
SMALLEST_CELL_MASS = 1e-30
"""Cells of the grid of `known_target` with a smaller mass are left out of divergences."""
NOISE_NODES = 31
"""Number of values of a scorer's noise, at the nodes of Gauss-Hermite quadrature."""


@dataclass(frozen=True)
class Conditioning:
    """The mixtures and numbers of P prompts.

    Attributes:
        weights: float32 [P, M].
        means: float32 [P, M, d].
        stds: float32 [P, M].
        number: float32 [P, PROMPTS_EACH], the one-hot number of each prompt.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    number: Tensor


class Residual(nn.Module):
    """A network that corrects the velocity, from x, sigma and the prompt's number. Its output is zero at the start.

    Positions enter through fixed random Fourier features. Without them the network hardly distinguishes neighbouring modes in
    the first thousands of updates.
    """

    directions: Tensor

    def __init__(self, dimension: int, hidden: int, layers: int) -> None:
        super().__init__()
        directions = torch.randn(dimension, FEATURES, generator=torch.Generator().manual_seed(0))
        self.register_buffer("directions", directions, persistent=False)
        sizes = [dimension + 2 * FEATURES + 1 + 2 * len(FREQUENCIES) + PROMPTS_EACH, *[hidden] * layers]
        inner = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())]
        last = nn.Linear(hidden, dimension)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*inner, last)

    def forward(self, x: Tensor, sigma: Tensor, number: Tensor) -> Tensor:
        """Computes the correction, [B, d], for x [B, d], sigma [B] and one-hot numbers [B, PROMPTS_EACH]."""
        angles = sigma[:, None] * torch.tensor(FREQUENCIES, device=x.device, dtype=x.dtype) * math.pi
        places = x @ self.directions
        waves = [torch.sin(places), torch.cos(places), torch.sin(angles), torch.cos(angles)]
        row = torch.cat([x / 3, sigma[:, None], number, *waves], dim=1)
        answer: Tensor = self.net(row)
        return answer


class ResidualPerPrompt(nn.Module):
    """A `Residual` for each of the prompts of a scenario."""

    def __init__(self, dimension: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(Residual(dimension, hidden, layers) for _ in range(PROMPTS_EACH))

    def forward(self, x: Tensor, sigma: Tensor, number: Tensor) -> Tensor:
        """Computes the correction of each row with the network of its prompt; see `Residual.forward`."""
        prompts = number.argmax(1)
        correction = torch.zeros_like(x)
        for prompt, network in enumerate(self.networks):
            rows = (prompts == prompt).nonzero()[:, 0]
            if len(rows):
                correction = correction.index_copy(0, rows, network(x[rows], sigma[rows], number[rows]))
        return correction


class GaussianMixture(Backbone, KnownDistributions):
    """Flow matching on a Gaussian mixture with a closed-form velocity, corrected by a small network."""

    class Settings(BackboneSettings):
        dimension: int = Field(2, ge=2)
        """Dimension of the space; only the task `quadratic` has more than two."""
        hidden: int = Field(64, ge=1)
        """Width of the residual network."""
        layers: int = Field(1, ge=1)
        """Number of hidden layers of the residual network."""
        network: Literal["shared", "per_prompt"] = "shared"
        """Which network corrects the velocity. shared: one network that is conditioned on the prompt, so that learning one
        prompt affects the others. per_prompt: a network for each prompt, all of the same size."""
        steps: int = Field(16, ge=1)
        """Number of Euler steps of evaluation samples."""
        beta: float = Field(4.0, ge=0)
        """Inverse temperature of the target that the model is compared with, on raw rewards."""
        quadrature: int = Field(60, ge=10, multiple_of=2)
        """Number of points in each direction of the grid of noise on which densities are computed in two dimensions. It is
        even, because an odd number puts points on lines of symmetry: noise there goes to no mode, and its density differs from
        that around it."""

    settings: Settings
    dtype = torch.float32
    guidance = 1.0

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        if settings.guidance not in (None, 1.0):
            raise UserError("gaussian_mixture has no unconditional model, so guidance must be 1")
        self.latent_shape = (settings.dimension,)
        self.device = settings.torch_device
        self.default_steps = settings.steps
        sizes = (settings.dimension, settings.hidden, settings.layers)
        self.residual = (ResidualPerPrompt(*sizes) if settings.network == "per_prompt" else Residual(*sizes)).to(self.device)
        self.active = True

    def sigmas(self, steps: int) -> Tensor:
        return flow.sigmas(steps)

    @classmethod
    def check_prompts(cls, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            check_prompt(prompt)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        mixtures = [world(prompt, self.settings.dimension).base for prompt in prompts]
        numbers = torch.tensor([int(prompt.split()[-1]) for prompt in prompts])
        if len({len(m.weights) for m in mixtures}) > 1:
            raise UserError("the prompts of one call must have mixtures with equal numbers of modes")
        stacked = [torch.stack([getattr(m, name) for m in mixtures]) for name in ("weights", "means", "stds")]
        weights, means, stds = (t.float().to(self.device) for t in stacked)
        return Conditioning(weights, means, stds, nn.functional.one_hot(numbers, PROMPTS_EACH).float().to(self.device))

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, group: Tensor) -> Tensor:
        c = conditioning
        base = mixture_velocity(x, sigma, c.weights[group], c.means[group], c.stds[group])
        return base + self.residual(x, sigma, c.number[group]) if self.active else base

    def decode(self, latents: Tensor) -> np.ndarray:
        return as_images(latents)

    def trainable(self) -> nn.Module:
        return self.residual

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def push_forward(self, prompt: str, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Carries noise to samples by Euler steps, with the exact log-density of each sample.

        Args:
            prompt: the prompt.
            noise: initial states, float64 [N, d].

        Returns:
            The samples, float64 [N, d], and their log-densities under the model, float64 [N].
        """
        c, d = self.encode([prompt]), self.settings.dimension
        group = torch.zeros(len(noise), dtype=torch.long, device=self.device)
        sigmas = self.sigmas(self.default_steps)
        x = noise.float().to(self.device)
        log_density = -0.5 * noise.square().sum(1) - 0.5 * d * math.log(2 * math.pi)
        for t in range(self.default_steps):
            dt = float(sigmas[t + 1] - sigmas[t])
            sigma = torch.full((len(x),), float(sigmas[t]), device=self.device)
            x = x.detach().requires_grad_()
            v = self.velocity(x, sigma, c, group)
            rows = [torch.autograd.grad(v[:, i].sum(), x, retain_graph=i < d - 1)[0] for i in range(d)]
            jacobian = torch.eye(d, dtype=torch.float64) + dt * torch.stack(rows, dim=1).double().cpu()
            log_density = log_density - torch.linalg.slogdet(jacobian)[1]
            x = (x + dt * v).detach()
        return x.double().cpu(), log_density

    def mixed_weights(self, weight: float) -> list[Tensor]:
        """The output layer of the residual network, which is zero at the start, times `weight`."""
        outputs = {p for module in self.residual.modules() if isinstance(module, Residual) for p in module.net[-1].parameters()}
        return [weight * p.detach() if p in outputs else p.detach().clone() for p in self.parameters()]

    def measure(self, prompts: Sequence[str], best_of: int = 1) -> dict[str, Measured]:
        """Computes divergences, mode coverage and expected rewards of each prompt, and the errors of its velocity."""
        noise, weights = self._noise()
        by_prompt = []
        for p in prompts:
            w = world(p, self.settings.dimension)
            target = known_target(p, self.settings.dimension, self.settings.beta)
            points, log_density = self.push_forward(p, noise)
            if not (points.isfinite().all() and log_density.isfinite().all()):
                raise NonFiniteError(f"the model's density for the prompt {p!r} is not finite")
            if best_of == 1:
                found = _measure(KnownPoints.of(w, points), target, weights, log_density)
                by_prompt.append(found | self._velocity_errors(p))
                continue
            best = best_of_mass(w, weights, points, best_of)
            kept = best > SMALLEST_CELL_MASS * weights  # elsewhere the log of the ratio is not finite
            log_best = log_density[kept] + torch.log(best[kept] / weights[kept])
            by_prompt.append(_measure(KnownPoints.of(w, points[kept]), target, best[kept], log_best))
        return {
            name: Measured(np.array([values[name] for values in by_prompt]), higher_is_better)
            for name, higher_is_better in DIRECTIONS.items()
            if name in by_prompt[0]
        }

    @torch.no_grad()
    def _velocity_errors(self, prompt: str) -> dict[str, float]:
        """The root mean square distance of the velocity to the optimal one, at each of `SIGMAS` and over all of them.

        The states are distributed as those of the flow to the target, so errors count where an optimal model would be.
        """
        c, squares = self.encode([prompt]), []
        for sigma in SIGMAS:
            optimal = optimal_velocity(prompt, self.settings.dimension, self.settings.beta, sigma)
            x = optimal.states.float().to(self.device)
            group = torch.zeros(len(x), dtype=torch.long, device=self.device)
            squares.append(optimal.error(self.velocity(x, torch.full_like(x[:, 0], sigma), c, group).cpu()))
        names = map(velocity_error_at, SIGMAS)
        errors = {name: math.sqrt(square) for name, square in zip(names, squares, strict=True)}
        return {"velocity_error": math.sqrt(sum(squares) / len(squares)), **errors}

    def _noise(self) -> tuple[Tensor, Tensor]:
        """The noise at which densities are computed, float64 [N, d], and its weights, [N]."""
        if self.settings.dimension == 2:
            return noise_quadrature(2, self.settings.quadrature)
        return _quasi_random(self.settings.dimension), torch.full((POINTS,), 1 / POINTS, dtype=torch.float64)

    def distribution(self, prompt: str, best_of: int = 1) -> PointDistribution | None:
        """Computes where `POINTS` points of noise with equal mass end; None in more than two dimensions."""
        if self.settings.dimension != 2:
            return None
        x = _quasi_random(2).float().to(self.device)
        c, group = self.encode([prompt]), torch.zeros(POINTS, dtype=torch.long, device=self.device)
        with torch.no_grad():
            for sigma, sigma_next in pairwise(self.sigmas(self.default_steps).tolist()):
                x = x + (sigma_next - sigma) * self.velocity(x, torch.full_like(x[:, 0], sigma), c, group)
        points, w = x.double().cpu(), world(prompt)
        mode, mass = w.base.log_joint(points).argmax(1), torch.full((POINTS,), 1 / POINTS, dtype=torch.float64)
        return PointDistribution(points.numpy(), best_of_mass(w, mass, points, best_of).numpy(), mode.numpy())

    def target_distribution(self, prompt: str) -> PointDistribution | None:
        """Computes the target on a 2-D grid, without points of negligible mass; None in more than two dimensions."""
        if self.settings.dimension != 2:
            return None
        w, target = world(prompt), known_target(prompt, 2, self.settings.beta)
        grid, cell = midpoints(2, TARGET_GRID, EXTENT)
        points = KnownPoints.of(w, grid)
        mass = torch.exp(target.log_density(points)) * cell
        kept = mass > SMALLEST_POINT_MASS / len(mass)
        mode = points.log_joint.argmax(1)
        return PointDistribution(grid[kept].numpy(), (mass[kept] / mass[kept].sum()).numpy(), mode[kept].numpy())

    def tilted(self, prompt: str, beta: float) -> Tilt:
        """Computes the target at any beta: in closed form for a quadratic reward, otherwise on a 2-D grid.

        Samples of a target on a grid are uniform within a cell, which is chosen by its mass.
        """
        d = self.settings.dimension
        w, own_target = world(prompt, d), known_target(prompt, d, self.settings.beta)
        reward, kl = own_target.tilt(beta)
        if isinstance(w.reward, Quadratic):
            mixture, _ = w.base.tilted(beta, w.reward.curvature, w.reward.centre)
            return Tilt(reward, kl, {}, lambda count, rng: mixture.sample(count, rng).float())
        grid, cell = known_grid(prompt)
        log_density = grid.log_base + beta * grid.reward
        log_density = log_density - torch.logsumexp(log_density, 0) - math.log(cell)
        mass = torch.exp(log_density) * cell

        def draw(count: int, rng: torch.Generator) -> Tensor:
            chosen = grid.x[torch.multinomial(mass, count, replacement=True, generator=rng)]
            within = torch.rand(chosen.shape, generator=rng, dtype=torch.float64) - 0.5
            return (chosen + math.sqrt(cell) * within).float()

        kept = mass > SMALLEST_CELL_MASS  # elsewhere the ratio to another density overflows
        metrics = _measure(grid.at(kept), own_target, mass[kept], log_density[kept])
        return Tilt(reward, kl, {**metrics, "kl_base": kl, "exact_reward": reward}, draw)


def best_of_mass(w: World, mass: Tensor, points: Tensor, n: int) -> Tensor:
    """The mass of points [N, d] where each draw is the best of n by the reward, with the noise of its scorer; float64 [N]."""
    if n == 1:
        return mass
    reward = w.reward(points).numpy()
    if not w.noise:
        return torch.from_numpy(best_of_n_mass(mass.numpy(), reward, n))
    at, chances = np.polynomial.hermite_e.hermegauss(NOISE_NODES)
    scores = reward[:, None] + w.noise * at
    of_score = mass.numpy()[:, None] * (chances / chances.sum())
    best = best_of_n_mass(of_score.ravel(), scores.ravel(), n)
    return torch.from_numpy(best.reshape(of_score.shape).sum(1))


def _quasi_random(dimension: int) -> Tensor:
    """Quasi-random standard normal points, which are more even than random ones, float64 [POINTS, d]."""
    return torch.from_numpy(MultivariateNormalQMC(np.zeros(dimension), rng=np.random.default_rng(0)).random(POINTS))


def velocity_error_at(sigma: float) -> str:
    """The name of the metric for the velocity's error at one sigma."""
    return f"velocity_error_{sigma:g}"


DIRECTIONS: dict[str, bool | None] = {
    "kl_model_target": False,
    "kl_target_model": False,
    "js_target": False,
    "js_modes": False,
    "js_within_modes": False,
    "target_reached": True,
    "kl_base": None,
    "modes_covered": True,
    "exact_reward": True,
    "exact_true_reward": True,
    "log_z": None,
    "target_reward": None,
    "best_reward_at_kl": None,
    # They say where the model's velocity is wrong, and judge no image.
    "velocity_error": None,
    **dict.fromkeys(map(velocity_error_at, SIGMAS)),
}
"""For each metric of `measure`, whether a higher value is better; None where neither direction is."""


def _measure(points: KnownPoints, target: KnownTarget, weights: Tensor, log_model: Tensor) -> dict[str, float]:
    """The metrics of one prompt, from a quadrature of the model.

    Args:
        points: the points of the quadrature.
        target: the prompt's target.
        weights: the mass of each point, float64 [N].
        log_model: their log-density under the model, float64 [N].
    """
    apart = divergences(weights, log_model, target.log_density(points))
    kl_base = float((weights * (log_model - points.log_base)).sum())
    mode_mass = torch.zeros_like(target.mode_mass).index_add(0, points.log_joint.argmax(1), weights)
    between_modes = js_of_masses(mode_mass, target.mode_mass)
    counts = target.mode_mass >= MODE_SHARE
    covered = (mode_mass >= COVERED * target.mode_mass) & counts
    return {
        "kl_model_target": apart.kl_model_target,
        "kl_target_model": apart.kl_target_model,
        "js_target": apart.js,
        # By the chain rule the rest is the mean over modes, weighted by their mass, of the divergence inside a mode.
        "js_modes": between_modes,
        "js_within_modes": max(apart.js - between_modes, 0.0),
        "target_reached": apart.reached,
        "kl_base": kl_base,
        "modes_covered": float(covered.sum() / counts.sum()),
        "exact_reward": float((weights * points.reward).sum()),
        "exact_true_reward": float((weights * points.true_reward).sum()),
        "log_z": target.log_z,
        "target_reward": target.reward,
        "best_reward_at_kl": target.best_reward(kl_base),
    }
