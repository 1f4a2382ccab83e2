"""gaussian_mixture: points in the plane instead of images; the base model, its target and every divergence are known.

The base velocity is the closed form of a Gaussian mixture, one for each prompt (`alignbench.backbones.mixture.scenarios`). A
residual network that starts at zero is what training moves. Since the sampler is a chain of Euler steps
x -> x + (sigma' - sigma) v(x), the density of what it draws is exact: log p(x_0) = log N(z) - sum_t log |det(I + (sigma' -
sigma) dv/dx)|. With the noise z on a quadrature grid, so are the divergences to the target q(x) = p_base(x) exp(beta R(x)) / Z.
In other dimensions than two the noise is quasi-random, and what is an integral over q an average with weights q / p.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import brentq
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
from alignbench.backbones.mixture.mixtures import (
    EXTENT,
    Mixture,
    as_images,
    divergences,
    js_of_masses,
    midpoints,
    mixture_velocity,
    noise_quadrature,
)
from alignbench.backbones.mixture.scenarios import PROMPTS_EACH, Quadratic, World, world
from alignbench.backbones.mixture.tilted_flow import SIGMAS, optimal_velocity
from alignbench.statistics import best_of_n_mass

FREQUENCIES = (1.0, 2.0, 4.0)
FEATURES = 64
"""Random Fourier features of the position, of unit frequency deviation."""
GRID = 240
"""Points of the grid over the plane in each direction, on which Z and the best reward are computed."""
POINTS = 4096
"""Of a distribution that is kept for images, and of the noise in more than two dimensions."""
TARGET_GRID = 160
"""Points of the grid in each direction of a target that is."""
NEXT_TO_NOTHING = 1e-2
"""Of the mean mass of that grid's points."""
NOISE_NODES = 31
"""Values of a scorer's noise, at the nodes of Gauss-Hermite quadrature."""
NO_MASS = 1e-30
"""Of a cell of the other grid, below which it is left out of divergences."""


@dataclass(frozen=True)
class Conditioning:
    """Mixtures and numbers of P prompts: weights, stds [P, M], means [P, M, d], one-hot numbers [P, PROMPTS_EACH]."""

    weights: Tensor
    means: Tensor
    stds: Tensor
    number: Tensor


class Residual(nn.Module):
    """A correction of the velocity from (x, sigma, prompt); zero at the start.

    Positions enter through fixed random Fourier features: without them the first thousands of updates can hardly tell
    one mode from its neighbour.
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
        prompts = number.argmax(1)
        correction = torch.zeros_like(x)
        for prompt, network in enumerate(self.networks):
            rows = (prompts == prompt).nonzero()[:, 0]
            if len(rows):
                correction = correction.index_copy(0, rows, network(x[rows], sigma[rows], number[rows]))
        return correction


class GaussianMixture(Backbone, KnownDistributions):
    class Settings(BackboneSettings):
        dimension: int = Field(2, ge=2)
        """Of the space; more than two for the task `quadratic`."""
        hidden: int = Field(64, ge=1)
        """Width of the residual network."""
        layers: int = Field(1, ge=1)
        """Its hidden layers."""
        network: Literal["shared", "per_prompt"] = "shared"
        """shared: one network, conditioned on the prompt, so that the prompts' solutions disturb one another.
        per_prompt: a network for each prompt, of the same size."""
        steps: int = Field(16, ge=1)
        """Euler steps of evaluation samples."""
        beta: float = Field(4.0, ge=0)
        """Inverse temperature of the target that the model is compared with, on raw rewards."""
        quadrature: int = Field(60, ge=10, multiple_of=2)
        """Points in each direction of the grid of noise on which densities are computed; even, since an odd number puts
        points on lines of symmetry, where noise goes to no mode and the density is not that of their surroundings."""

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

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        mixtures = [world(prompt, self.settings.dimension).base for prompt in prompts]
        numbers = torch.tensor([int(prompt.split()[-1]) for prompt in prompts])
        if len({len(m.weights) for m in mixtures}) > 1:
            raise UserError("prompts of one call must have mixtures of equally many modes")
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
        """Where the Euler steps carry noise [N, d], and the exact log-density of what they draw there; float64."""
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
        """Divergences, coverage and rewards of each prompt, from its density at points of the noise, and errors of its
        velocity."""
        noise, weights = self._noise()
        found = []
        for p in prompts:
            w, known = world(p, self.settings.dimension), truth(p, self.settings.dimension, self.settings.beta)
            points, log_density = self.push_forward(p, noise)
            if best_of == 1:
                found.append(_measure(w, known, weights, points, log_density) | self._velocity_errors(p))
                continue
            best = best_of_mass(w, weights, points, best_of)
            kept = best > NO_MASS * weights  # elsewhere the log of the ratio is not finite
            log_best = log_density[kept] + torch.log(best[kept] / weights[kept])
            found.append(_measure(w, known, best[kept], points[kept], log_best))
        return {
            name: Measured(np.array([f[name] for f in found]), higher_is_better)
            for name, higher_is_better in DIRECTIONS.items()
            if name in found[0]
        }

    @torch.no_grad()
    def _velocity_errors(self, prompt: str) -> dict[str, float]:
        """The root mean square distance of the velocity to the target's, at each of `SIGMAS` and over all of them.

        States are those of the target's flow, so that an error counts where an optimal model would pass.
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
        """Points of the noise and their weights."""
        if self.settings.dimension == 2:
            return noise_quadrature(2, self.settings.quadrature)
        return _quasi_random(self.settings.dimension), torch.full((POINTS,), 1 / POINTS, dtype=torch.float64)

    def distribution(self, prompt: str, best_of: int = 1) -> PointDistribution | None:
        """Where the Euler steps carry `POINTS` points of equal mass of the noise; None in more than two dimensions."""
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
        """On a grid over the plane, without the points that hold next to nothing; None in more than two dimensions."""
        if self.settings.dimension != 2:
            return None
        w, known = world(prompt), truth(prompt, 2, self.settings.beta)
        points, cell = midpoints(2, TARGET_GRID, EXTENT)
        mass = torch.exp(known.log_target(w, points)) * cell
        kept = mass > NEXT_TO_NOTHING / len(mass)
        mode = w.base.log_joint(points).argmax(1)
        return PointDistribution(points[kept].numpy(), (mass[kept] / mass[kept].sum()).numpy(), mode[kept].numpy())

    def tilted(self, prompt: str, beta: float) -> Tilt:
        """The target in closed form for a quadratic reward, else on a grid over the plane, whose cells are drawn from."""
        d, at = self.settings.dimension, self.settings.beta
        w, known = world(prompt, d), truth(prompt, d, at)
        reward, kl = known.tilt(beta)
        if isinstance(w.reward, Quadratic):
            target, _ = w.base.tilted(beta, w.reward.curvature, w.reward.centre)
            return Tilt(reward, kl, {}, lambda count, rng: target.sample(count, rng).float())
        grid, cell = midpoints(2, GRID, EXTENT)
        log_density = w.base.log_density(grid) + beta * w.reward(grid)
        log_density = log_density - torch.logsumexp(log_density, 0) - math.log(cell)
        mass = torch.exp(log_density) * cell

        def draw(count: int, rng: torch.Generator) -> Tensor:
            chosen = grid[torch.multinomial(mass, count, replacement=True, generator=rng)]
            within = torch.rand(chosen.shape, generator=rng, dtype=torch.float64) - 0.5
            return (chosen + math.sqrt(cell) * within).float()

        kept = mass > NO_MASS  # elsewhere the ratio to another density overflows
        metrics = _measure(w, known, mass[kept], grid[kept], log_density[kept])
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
    """POINTS standard normal points that are more even than random ones, float64 [POINTS, d]."""
    return torch.from_numpy(MultivariateNormalQMC(np.zeros(dimension), rng=np.random.default_rng(0)).random(POINTS))


@dataclass(frozen=True)
class Truth:
    """What is known of a world and its target p_base exp(beta R) / Z.

    Attributes:
        mode_mass: the target's, [M]. target_reward: its expected reward.
        tilt: beta -> expected reward of p_base exp(beta R) / Z, and its KL divergence to the base.
    """

    beta: float
    log_z: float
    mode_mass: Tensor
    target_reward: float
    tilt: Callable[[float], tuple[float, float]]

    def log_target(self, w: World, x: Tensor) -> Tensor:
        """Log-density of the target, [N], at x [N, d]."""
        return w.base.log_density(x) + self.beta * w.reward(x) - self.log_z


@cache
def truth(prompt: str, dimension: int, beta: float) -> Truth:
    """In closed form for a quadratic reward, else on a grid over the plane."""
    w = world(prompt, dimension)
    return _quadratic_truth(w.base, w.reward, beta) if isinstance(w.reward, Quadratic) else _truth_on_a_grid(w, beta)


def _quadratic_truth(base: Mixture, reward: Quadratic, beta: float) -> Truth:
    def tilt(beta: float) -> tuple[float, float]:
        distribution, log_z = base.tilted(beta, reward.curvature, reward.centre)
        return reward.mean(distribution), beta * reward.mean(distribution) - log_z

    target, log_z = base.tilted(beta, reward.curvature, reward.centre)
    return Truth(beta, log_z, target.weights, reward.mean(target), tilt)


def _truth_on_a_grid(w: World, beta: float) -> Truth:
    grid, cell = midpoints(2, GRID, EXTENT)
    log_joint, reward = w.base.log_joint(grid), w.reward(grid)
    log_base = torch.logsumexp(log_joint, -1)

    def tilted(beta: float) -> tuple[Tensor, float]:
        """Mass of each cell, and log Z."""
        log_w = log_base + beta * reward + math.log(cell)
        log_z = torch.logsumexp(log_w, 0)
        return torch.exp(log_w - log_z), float(log_z)

    def tilt(beta: float) -> tuple[float, float]:
        mass, log_z = tilted(beta)
        expected = float((mass * reward).sum())
        return expected, beta * expected - log_z

    mass, log_z = tilted(beta)
    of_mode = torch.zeros(len(w.base.weights), dtype=torch.float64).index_add(0, log_joint.argmax(1), mass)
    return Truth(beta, log_z, of_mode, tilt(beta)[0], tilt)


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
    "velocity_error": False,
    **dict.fromkeys(map(velocity_error_at, SIGMAS), False),
}


def _measure(w: World, known: Truth, weights: Tensor, x: Tensor, log_model: Tensor) -> dict[str, float]:
    """The numbers of one prompt, from a quadrature of the model: points x of weight w with their log-density."""
    log_joint, reward = w.base.log_joint(x), w.reward(x)
    apart = divergences(weights, log_model, known.log_target(w, x))
    kl_base = float((weights * (log_model - torch.logsumexp(log_joint, -1))).sum())
    of_model = torch.zeros_like(known.mode_mass).index_add(0, log_joint.argmax(1), weights)
    between = js_of_masses(of_model, known.mode_mass)
    counts = known.mode_mass >= MODE_SHARE
    covered = (of_model >= COVERED * known.mode_mass) & counts
    return {
        "kl_model_target": apart.kl_model_target,
        "kl_target_model": apart.kl_target_model,
        "js_target": apart.js,
        # The chain rule: the rest is the mean over modes, by their mass, of the divergence between the parts inside a mode.
        "js_modes": between,
        "js_within_modes": max(apart.js - between, 0.0),
        "target_reached": apart.reached,
        "kl_base": kl_base,
        "modes_covered": float(covered.sum() / counts.sum()),
        "exact_reward": float((weights * reward).sum()),
        "exact_true_reward": float((weights * w.true_reward(x)).sum()),
        "log_z": known.log_z,
        "target_reward": known.target_reward,
        "best_reward_at_kl": _best_reward(known, kl_base),
    }


def _best_reward(known: Truth, kl: float) -> float:
    """The largest expected reward of any distribution at this KL divergence to the base: that of the tilt with that
    divergence."""
    if kl <= 0:
        return known.tilt(0.0)[0]
    largest = 200.0
    if known.tilt(largest)[1] <= kl:
        return known.tilt(largest)[0]
    return known.tilt(float(brentq(lambda beta: known.tilt(beta)[1] - kl, 0.0, largest)))[0]
