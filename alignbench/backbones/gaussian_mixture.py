"""gaussian_mixture: points in the plane instead of pictures; the base model, its target and every divergence are known.

The base velocity is the closed form of a Gaussian mixture, one for each prompt (`alignbench.scenarios`). A residual network
that starts at zero is what training moves. Since the sampler is a chain of Euler steps x -> x + (sigma' - sigma) v(x), the
density of what it draws is exact: log p(x_0) = log N(z) - sum_t log |det(I + (sigma' - sigma) dv/dx)|. With the noise z on a
quadrature grid, so are the divergences to the target q(x) = p_base(x) exp(beta R(x)) / Z.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import brentq
from scipy.stats.qmc import MultivariateNormalQMC
from torch import Tensor, nn

from alignbench import Backbone, UserError, flow
from alignbench.backbone import BackboneSettings, Law, Measured
from alignbench.mixtures import EXTENT, as_pictures, divergences, midpoints, mixture_velocity, noise_quadrature
from alignbench.scenarios import PROMPTS_EACH, World, world

FREQUENCIES = (1.0, 2.0, 4.0)
FEATURES = 64
"""Random Fourier features of the position, of unit frequency deviation."""
GRID = 240
"""Points of the grid over the plane in each direction, on which Z and the best reward are computed."""
LAW_POINTS = 4096
"""Of a law that is kept for pictures."""
TARGET_GRID = 160
"""Points of the grid in each direction of a target that is."""
NEXT_TO_NOTHING = 1e-2
"""Of the mean mass of that grid's points."""
MODE_SHARE = 0.05
"""A mode counts where the target has at least this share of its mass."""
COVERED = 0.25
"""It is covered where the model has at least this part of the target's mass there."""


@dataclass(frozen=True)
class Conditioning:
    """Mixtures and numbers of P prompts: weights, stds [P, M], means [P, M, 2], one-hot numbers [P, PROMPTS_EACH]."""

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

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        directions = torch.randn(2, FEATURES, generator=torch.Generator().manual_seed(0))
        self.register_buffer("directions", directions, persistent=False)
        sizes = [2 + 2 * FEATURES + 1 + 2 * len(FREQUENCIES) + PROMPTS_EACH, *[hidden] * layers]
        inner = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())]
        last = nn.Linear(hidden, 2)
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


class GaussianMixture(Backbone):
    class Settings(BackboneSettings):
        hidden: int = Field(64, ge=1)
        """Width of the residual network."""
        layers: int = Field(1, ge=1)
        """Its hidden layers."""
        steps: int = Field(16, ge=1)
        """Euler steps of evaluation samples."""
        beta: float = Field(4.0, ge=0)
        """Inverse temperature of the target that the model is compared with, on raw rewards."""
        quadrature: int = Field(60, ge=10, multiple_of=2)
        """Points in each direction of the grid of noise on which densities are computed; even, since an odd number puts
        points on lines of symmetry, where noise goes to no mode and the density is not that of their surroundings."""

    settings: Settings
    latent_shape = (2,)
    dtype = torch.float32
    guidance = 1.0
    pictorial = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        if settings.guidance not in (None, 1.0):
            raise UserError("gaussian_mixture has no unconditional model, so guidance must be 1")
        self.device = settings.torch_device
        self.default_steps = settings.steps
        self.residual = Residual(settings.hidden, settings.layers).to(self.device)
        self.active = True

    def sigmas(self, steps: int) -> Tensor:
        return flow.sigmas(steps)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        mixtures = [world(prompt).base for prompt in prompts]
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
        return as_pictures(latents)

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
        """Where the Euler steps carry noise [N, 2], and the exact log-density of what they draw there; float64."""
        c = self.encode([prompt])
        group = torch.zeros(len(noise), dtype=torch.long, device=self.device)
        sigmas = self.sigmas(self.default_steps)
        x = noise.float().to(self.device)
        log_density = -0.5 * noise.square().sum(1) - math.log(2 * math.pi)
        for t in range(self.default_steps):
            dt = float(sigmas[t + 1] - sigmas[t])
            sigma = torch.full((len(x),), float(sigmas[t]), device=self.device)
            x = x.detach().requires_grad_()
            v = self.velocity(x, sigma, c, group)
            rows = [torch.autograd.grad(v[:, i].sum(), x, retain_graph=i == 0)[0] for i in range(2)]
            jacobian = torch.eye(2, dtype=torch.float64) + dt * torch.stack(rows, dim=1).double().cpu()
            log_density = log_density - torch.linalg.slogdet(jacobian)[1]
            x = (x + dt * v).detach()
        return x.double().cpu(), log_density

    def measure(self, prompts: Sequence[str]) -> dict[str, Measured]:
        """Exact divergences, coverage and rewards of each prompt, by quadrature over the noise."""
        noise, weights = noise_quadrature(2, self.settings.quadrature)
        found = [_measure(world(p), truth(p, self.settings.beta), weights, *self.push_forward(p, noise)) for p in prompts]
        return {
            name: Measured(np.array([f[name] for f in found]), higher_is_better)
            for name, higher_is_better in DIRECTIONS.items()
        }

    def law(self, prompt: str) -> Law:
        """Where the Euler steps carry `LAW_POINTS` points of equal mass of the noise."""
        noise = MultivariateNormalQMC(np.zeros(2), rng=np.random.default_rng(0)).random(LAW_POINTS)
        x = torch.from_numpy(noise).float().to(self.device)
        c, group = self.encode([prompt]), torch.zeros(LAW_POINTS, dtype=torch.long, device=self.device)
        sigmas = self.sigmas(self.default_steps)
        with torch.no_grad():
            for sigma, sigma_next in pairwise(sigmas.tolist()):
                x = x + (sigma_next - sigma) * self.velocity(x, torch.full_like(x[:, 0], sigma), c, group)
        points = x.double().cpu()
        mode = world(prompt).base.log_joint(points).argmax(1)
        return Law(points.numpy(), np.full(LAW_POINTS, 1 / LAW_POINTS), mode.numpy())

    def target(self, prompt: str) -> Law:
        """On a grid over the plane, without the points that hold next to nothing."""
        w, known = world(prompt), truth(prompt, self.settings.beta)
        points, cell = midpoints(2, TARGET_GRID, EXTENT)
        mass = torch.exp(known.log_target(w, points)) * cell
        kept = mass > NEXT_TO_NOTHING / len(mass)
        mode = w.base.log_joint(points).argmax(1)
        return Law(points[kept].numpy(), (mass[kept] / mass[kept].sum()).numpy(), mode[kept].numpy())


@dataclass(frozen=True)
class Truth:
    """What is known of a world and its target p_base exp(beta R) / Z, on a grid over the plane.

    Attributes:
        log_base, reward: float64 [GRID ** 2]. cell: size of a cell of the grid.
        mode_mass: the target's, [M]. target_reward: its expected reward.
    """

    beta: float
    cell: float
    log_base: Tensor
    reward: Tensor
    log_z: float
    mode_mass: Tensor
    target_reward: float

    def log_target(self, w: World, x: Tensor) -> Tensor:
        """Log-density of the target, [N], at x [N, 2]."""
        return w.base.log_density(x) + self.beta * w.reward(x) - self.log_z


@cache
def truth(prompt: str, beta: float) -> Truth:
    """Of one prompt's world."""
    w, (grid, cell) = world(prompt), midpoints(2, GRID, EXTENT)
    log_joint, reward = w.base.log_joint(grid), w.reward(grid)
    log_base = torch.logsumexp(log_joint, -1)
    log_z = float(torch.logsumexp(log_base + beta * reward, 0)) + math.log(cell)
    target = torch.exp(log_base + beta * reward - log_z) * cell
    mass = torch.zeros(len(w.base.weights), dtype=torch.float64).index_add(0, log_joint.argmax(1), target)
    return Truth(beta, cell, log_base, reward, log_z, mass, float((target * reward).sum()))


DIRECTIONS: dict[str, bool | None] = {
    "kl_model_target": False,
    "kl_target_model": False,
    "js_target": False,
    "target_reached": True,
    "kl_base": None,
    "modes_covered": True,
    "exact_reward": True,
    "exact_true_reward": True,
    "log_z": None,
    "target_reward": None,
    "best_reward_at_kl": None,
}


def _measure(w: World, known: Truth, weights: Tensor, x: Tensor, log_model: Tensor) -> dict[str, float]:
    """The numbers of one prompt, from a quadrature of the model: points x of weight w with their log-density."""
    log_joint, reward = w.base.log_joint(x), w.reward(x)
    apart = divergences(weights, log_model, known.log_target(w, x))
    kl_base = float((weights * (log_model - torch.logsumexp(log_joint, -1))).sum())
    of_model = torch.zeros_like(known.mode_mass).index_add(0, log_joint.argmax(1), weights)
    counts = known.mode_mass >= MODE_SHARE
    covered = (of_model >= COVERED * known.mode_mass) & counts
    return {
        "kl_model_target": apart.kl_model_target,
        "kl_target_model": apart.kl_target_model,
        "js_target": apart.js,
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
    """The largest expected reward of any law at this KL divergence to the base: that of the tilt with that divergence."""

    def tilt(beta: float) -> tuple[float, float]:
        log_w = known.log_base + beta * known.reward
        log_z = torch.logsumexp(log_w, 0)
        expected = float((torch.exp(log_w - log_z) * known.reward).sum())
        return expected, beta * expected - float(log_z) - math.log(known.cell)

    if kl <= 0:
        return tilt(0.0)[0]
    largest = 200.0
    if tilt(largest)[1] <= kl:
        return tilt(largest)[0]
    return tilt(float(brentq(lambda beta: tilt(beta)[1] - kl, 0.0, largest)))[0]
