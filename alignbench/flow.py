"""Rectified-flow maths: sigma schedules, one denoising step by each rule, and its Gaussian log-density.

Convention: x_sigma = (1 - sigma) x_0 + sigma x_1 with x_1 ~ N(0, I); sigma falls from 1 (noise) to 0 (picture);
velocity v = x_1 - x_0, so x_0 = x - sigma v and x_1 = x + (1 - sigma) v. Everything is computed in float32, whatever
the model's dtype.
"""

from math import exp, pi
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from alignbench.errors import NonFiniteError

if TYPE_CHECKING:
    from alignbench.rollouts.plan import Rule

Reduction = Literal["mean", "sum"]


class StepResult(NamedTuple):
    """Next states and what they were drawn from; batch first, latent dimensions after."""

    x_next: Tensor
    log_prob: Tensor
    mean: Tensor
    std: Tensor


def sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """The schedule of `steps` denoising steps, sigma, float32 [steps + 1] from 1 to 0.

    t = linspace(1, 0); sigma = shift t / (1 + (shift - 1) t) (Esser et al. 2024, eq. 23).
    """
    t = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    return (shift * t / (1 + (shift - 1) * t)).float()


def dynamic_shift(
    tokens: int,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    exponential: bool = True,
) -> float:
    """`shift` of a schedule that follows the picture's size: exp(mu), mu linear in its tokens (FLUX.1).

    Args:
        tokens: of the picture, as the transformer sees it.
        base_shift, max_shift: mu at `base_tokens` and at `max_tokens`.
        exponential: False for mu itself.
    """
    mu = base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)
    return exp(mu) if exponential else mu


def moments(
    x: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    eta: float | Tensor,
    rule: "Rule",
) -> tuple[Tensor, Tensor]:
    """Mean [B, ...] and standard deviation (broadcast over the latent dimensions) of one step.

    ode    mean = x + (sigma_next - sigma) v, std = 0
    sde    Flow-GRPO (Liu et al. 2025): std_t = a sqrt(sigma / (1 - sigma)); at sigma = 1 the denominator takes
           sigma_next instead, which bounds the first step
    cps    coefficients-preserving sampling: std = sigma_next sin(eta pi / 2)
    dance  DanceGRPO (Xue et al. 2025): std = eta sqrt(sigma - sigma_next)

    Args:
        x: states at `sigma`; velocity: the model's output there, same shape.
        sigma, sigma_next: floats, or one value for each batch row.
        eta: a or eta of the rule; must be 0 only with "ode".
    """
    x, velocity = x.float(), velocity.float()
    sigma, sigma_next, level = (_column(value, x) for value in (sigma, sigma_next, eta))
    dt = sigma_next - sigma
    if rule == "ode":
        return x + dt * velocity, torch.zeros_like(sigma)
    if rule == "sde":
        std_t = level * torch.sqrt(sigma / (1 - torch.where(sigma >= 1, sigma_next, sigma)))
        drift = std_t**2 / (2 * sigma)
        mean = x * (1 + drift * dt) + velocity * (1 + drift * (1 - sigma)) * dt
        return mean, std_t * torch.sqrt(-dt)
    x0, x1 = x - sigma * velocity, x + (1 - sigma) * velocity
    if rule == "cps":
        std = sigma_next * torch.sin(level * (pi / 2))
        return (1 - sigma_next) * x0 + torch.sqrt(sigma_next**2 - std**2) * x1, std
    if rule == "dance":
        score = -(x - (1 - sigma) * x0) / sigma**2
        return x + dt * velocity - 0.5 * level**2 * score * dt, level * torch.sqrt(-dt)
    raise ValueError(f"unknown step rule {rule!r}")


def unchecked_step(
    x: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    eta: float | Tensor,
    rule: "Rule",
    *,
    noise: Tensor | None = None,
    reduction: Reduction = "mean",
) -> StepResult:
    """`step` without its checks, which would wait for the device."""
    mean, std = moments(x, velocity, sigma, sigma_next, eta, rule)
    if rule == "ode":
        return StepResult(mean, mean.new_zeros(mean.shape[0]), mean, std)
    drawn = torch.randn_like(mean) if noise is None else noise.float()
    x_next = mean + std * drawn
    return StepResult(x_next, log_prob(x_next, mean, std, reduction=reduction), mean, std)


def step(
    x: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    noise_level: float | Tensor = 0.0,
    rule: "Rule" = "sde",
    *,
    noise: Tensor | None = None,
    reduction: Reduction = "mean",
) -> StepResult:
    """One denoising step: x_next = mean + std * noise, with the log-density of x_next.

    Args:
        noise: standard normal, the shape of `x`; drawn from torch's global generator where it is None.
        reduction: how the log-density is taken over latent dimensions.

    Returns:
        x_next and mean [B, ...], std (broadcastable), log_prob [B]; all float32. An ode step has log_prob 0 and std 0.

    Raises:
        NonFiniteError: naming sigma, sigma_next and the velocity's dtype, where a stochastic rule leaves no density
            (noise level 0, or cps at sigma_next = 0) or a value is not finite.
    """
    result = unchecked_step(x, velocity, sigma, sigma_next, noise_level, rule, noise=noise, reduction=reduction)
    if rule != "ode" and bool((result.std == 0).any()):
        raise NonFiniteError(
            f"a {rule} step {_between(sigma, sigma_next)} at noise level {_shown(noise_level)} has no density "
            f"(std 0, velocity {velocity.dtype}); use rule 'ode' for that step"
        )
    if not bool(torch.isfinite(result.x_next).all()):
        source = "velocity" if not bool(torch.isfinite(velocity).all()) else "next state"
        raise NonFiniteError(f"the {source} of the {rule} step {_between(sigma, sigma_next)} is not finite ({velocity.dtype})")
    return result


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Gaussian log-density of x_next, averaged (default) or summed over latent dimensions; float32 [B]."""
    x_next, mean, std = x_next.float(), mean.float(), std.float()
    density = -0.5 * ((x_next - mean) / std) ** 2 - torch.log(std) - 0.5 * torch.log(torch.tensor(2 * pi))
    return reduce_latent(density.expand_as(x_next), reduction)


def log_ratio(shift: Tensor, noise: Tensor, std: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """log p(x) / p_0(x) of two Gaussians of equal `std` at x = mean_0 + std * noise; averaged or summed over latent dimensions.

    (shift / std) . noise - |shift / std|^2 / 2. Unlike the difference of two values of `log_prob` it is exact to rounding at
    any size of the latents: a sum of float32 log-densities over D dimensions is known to about 1e-7 D alone, which at 10,000
    dimensions is as large as the log-ratio of a small update.

    Args:
        shift: mean - mean_0, [B, ...], best taken from the difference of velocities: means are linear in (x, velocity), so that
            it is the mean of `moments` at x = 0.
        noise: standard normal, the same shape.

    Returns:
        float32 [B].
    """
    scaled = shift.float() / std
    return reduce_latent(scaled * noise - 0.5 * scaled**2, reduction)


def reduce_latent(values: Tensor, reduction: Reduction) -> Tensor:
    """[B, ...] -> [B], mean or sum over everything but the batch."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    flat = values.flatten(1)
    return flat.mean(1) if reduction == "mean" else flat.sum(1)


def _column(value: float | Tensor, x: Tensor) -> Tensor:
    """A number, or one number for each batch row, as float32 that broadcasts over `x`."""
    tensor = torch.as_tensor(value, dtype=torch.float32, device=x.device)
    return tensor.reshape(-1, *([1] * (x.ndim - 1))) if tensor.ndim <= 1 else tensor


def _between(sigma: float | Tensor, sigma_next: float | Tensor) -> str:
    return f"from sigma {_shown(sigma)} to {_shown(sigma_next)}"


def _shown(value: float | Tensor) -> str:
    numbers = sorted({round(float(v), 6) for v in torch.as_tensor(value).flatten()})
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}..{numbers[-1]}"
