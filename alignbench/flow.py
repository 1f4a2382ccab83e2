"""Rectified-flow maths: sigma schedules, one denoising step by each rule, and its Gaussian log-density.

Convention: x_sigma = (1 - sigma) x_0 + sigma x_1 with x_1 ~ N(0, I). sigma falls from 1 (noise) to 0 (image). The velocity is
v = x_1 - x_0, so x_0 = x - sigma v and x_1 = x + (1 - sigma) v. Everything is computed in float32, whatever the model's dtype.
"""

from math import exp, pi
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from alignbench.errors import NonFiniteError

if TYPE_CHECKING:
    from alignbench.rollouts.plan import Rule

Reduction = Literal["mean", "sum"]
"""Whether a log-density is averaged or summed over the latent dimensions."""
SMALLEST_ERROR = 1e-5
"""The smallest mean absolute error that is divided by."""


class StepResult(NamedTuple):
    """The states after a step, and the distribution that they were drawn from; float32."""

    x_next: Tensor
    """The next states, [B, *latent]."""
    log_prob: Tensor
    """The log-density of each next state, [B]."""
    mean: Tensor
    """The mean of the step, [B, *latent]."""
    std: Tensor
    """The standard deviation of the step, which broadcasts over `mean`."""


def sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """Makes the schedule of `steps` denoising steps: t = linspace(1, 0), sigma = shift t / (1 + (shift - 1) t).

    Args:
        steps: the number of denoising steps, at least 1.
        shift: 1 spaces sigma evenly; a larger one spends more steps near the noise.

    Returns:
        float32 [steps + 1], from 1 to 0.

    Source: Esser et al. 2024 (arXiv 2403.03206), equation 23.
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
    """Computes the `shift` of a schedule that depends on the size of the image: exp(mu), with mu linear in the tokens.

    Args:
        tokens: the number of tokens that the transformer makes of an image.
        base_shift: mu at `base_tokens`.
        max_shift: mu at `max_tokens`.
        base_tokens: where mu is `base_shift`.
        max_tokens: where mu is `max_shift`.
        exponential: False to return mu itself.

    Source: the scheduler configuration of FLUX.1.
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
    """Computes the mean and the standard deviation of one denoising step.

        ode    mean = x + (sigma_next - sigma) v, std = 0
        sde    Flow-GRPO (Liu et al. 2025, arXiv 2505.05470): std = std_t sqrt(sigma - sigma_next) with
               std_t = eta sqrt(sigma / (1 - sigma)). At sigma = 1 the denominator uses sigma_next, which bounds the first step.
        cps    coefficients-preserving sampling: std = sigma_next sin(eta pi / 2)
        dance  DanceGRPO (Xue et al. 2025, arXiv 2505.07818): std = eta sqrt(sigma - sigma_next)
        memoryless
               the ancestral step: the distribution of x_sigma_next given x_sigma and the predicted x_0, which is the step of
               DDPM (Ho et al. 2020, arXiv 2006.11239). With c = (1 - sigma) sigma_next / (sigma (1 - sigma_next)) it is
               mean = (1 - sigma_next) x_0 + sigma_next c x_1, std = sigma_next sqrt(1 - c^2); eta is not used. At sigma = 1
               c is 0, so nothing of the initial noise remains. In the limit of small steps it is `sde` with eta = sqrt 2, the
               only noise for which images are independent of the initial noise (Domingo-Enrich et al. 2024, arXiv
               2409.08861).

    Args:
        x: the states at `sigma`, [B, *latent].
        velocity: the model's output at these states, the same shape.
        sigma: the position in the schedule, a float or one value for each row, [B].
        sigma_next: where the step ends, likewise.
        eta: how much noise the step draws, likewise (the paper of `sde` calls it a). It is 0 with "ode" and only with "ode".
        rule: the rule of the step.

    Returns:
        The mean, float32 [B, *latent], and the standard deviation, float32, which broadcasts over the latent dimensions.

    Raises:
        ValueError: the rule is unknown.
    """
    x, velocity = x.float(), velocity.float()
    sigma, sigma_next, eta = (_column(value, x) for value in (sigma, sigma_next, eta))
    dt = sigma_next - sigma
    if rule == "ode":
        return x + dt * velocity, torch.zeros_like(sigma)
    if rule == "sde":
        std_t = eta * torch.sqrt(sigma / (1 - torch.where(sigma >= 1, sigma_next, sigma)))
        drift = std_t**2 / (2 * sigma)
        mean = x * (1 + drift * dt) + velocity * (1 + drift * (1 - sigma)) * dt
        return mean, std_t * torch.sqrt(-dt)
    x0, x1 = x - sigma * velocity, x + (1 - sigma) * velocity
    if rule == "cps":
        std = sigma_next * torch.sin(eta * (pi / 2))
        return (1 - sigma_next) * x0 + torch.sqrt(sigma_next**2 - std**2) * x1, std
    if rule == "memoryless":
        c = (1 - sigma) * sigma_next / (sigma * (1 - sigma_next))
        return (1 - sigma_next) * x0 + sigma_next * c * x1, sigma_next * torch.sqrt(1 - c**2)
    if rule == "dance":
        score = -(x - (1 - sigma) * x0) / sigma**2
        return x + dt * velocity - 0.5 * eta**2 * score * dt, eta * torch.sqrt(-dt)
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
    """Takes the same step as `step`, without its checks, which would make the CPU wait for the device."""
    mean, std = moments(x, velocity, sigma, sigma_next, eta, rule)
    if rule == "ode":
        return StepResult(mean, mean.new_zeros(mean.shape[0]), mean, std)
    noise = torch.randn_like(mean) if noise is None else noise.float()
    x_next = mean + std * noise
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
    """Takes one denoising step, x_next = mean + std * noise, and computes the log-density of x_next.

    Args:
        x: the states at `sigma`, [B, *latent].
        velocity: the model's output at these states, the same shape.
        sigma: the position in the schedule, a float or one value for each row, [B].
        sigma_next: where the step ends, likewise.
        noise_level: eta, how much noise the step draws, likewise; see `moments`.
        rule: the rule of the step.
        noise: standard normal noise in the shape of `x`; None draws it from torch's global generator.
        reduction: whether the log-density is averaged or summed over the latent dimensions.

    Returns:
        The next states and their distribution. An ode step has log_prob 0 and std 0.

    Raises:
        NonFiniteError: a stochastic step has no density (eta is 0, or sigma_next is 0 with the rule cps or memoryless), or a
            value is not finite. The message names sigma, sigma_next and the velocity's dtype.
    """
    result = unchecked_step(x, velocity, sigma, sigma_next, noise_level, rule, noise=noise, reduction=reduction)
    if rule != "ode" and bool((result.std == 0).any()):
        raise NonFiniteError(
            f"a {rule} step {_between(sigma, sigma_next)} with eta {_number(noise_level)} has no density "
            f"(std 0, velocity {velocity.dtype}); use rule 'ode' for that step"
        )
    if not bool(torch.isfinite(result.x_next).all()):
        source = "velocity" if not bool(torch.isfinite(velocity).all()) else "next state"
        raise NonFiniteError(f"the {source} of the {rule} step {_between(sigma, sigma_next)} is not finite ({velocity.dtype})")
    return result


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Computes the Gaussian log-density of the next states.

    Args:
        x_next: the next states, [B, *latent].
        mean: the mean of the step, the same shape.
        std: the standard deviation of the step, which broadcasts over `mean`.
        reduction: whether the log-density is averaged (default) or summed over the latent dimensions.

    Returns:
        float32 [B].
    """
    x_next, mean, std = x_next.float(), mean.float(), std.float()
    density = -0.5 * ((x_next - mean) / std) ** 2 - torch.log(std) - 0.5 * torch.log(torch.tensor(2 * pi))
    return reduce_latent(density.expand_as(x_next), reduction)


def log_ratio(shift: Tensor, noise: Tensor, std: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Computes log p(x) / p_0(x) of two Gaussians with the same `std`, at x = mean_0 + std * noise.

    The result is (shift / std) . noise - |shift / std|^2 / 2. Unlike the difference of two values of `log_prob`, it is exact to
    rounding for latents of any size. A sum of float32 log-densities over D dimensions has an error of about 1e-7 D, which at
    10,000 dimensions is as large as the log-ratio of a small update.

    Args:
        shift: mean - mean_0, [B, *latent]. It is best computed from the difference of the velocities: means are linear in
            (x, velocity), so `shift` is the mean that `moments` gives at x = 0 for that difference.
        noise: the standard normal noise that x was drawn with, the same shape.
        std: the standard deviation of both, which broadcasts over `shift`.
        reduction: whether the log-ratio is averaged (default) or summed over the latent dimensions.

    Returns:
        float32 [B].
    """
    scaled = shift.float() / std
    return reduce_latent(scaled * noise - 0.5 * scaled**2, reduction)


def mean_square(difference: Tensor) -> Tensor:
    """Averages the squares over latent dimensions: [R, *latent] -> float32 [R]."""
    return reduce_latent(difference.float().square(), "mean")


def mean_absolute(difference: Tensor) -> Tensor:
    """Averages the absolute values over latent dimensions, without gradient, at least `SMALLEST_ERROR`: float32 [R]."""
    return reduce_latent(difference.detach().float().abs(), "mean").clamp(min=SMALLEST_ERROR)


def reduce_latent(values: Tensor, reduction: Reduction) -> Tensor:
    """Averages or sums over all dimensions but the first: [B, *latent] -> [B].

    Raises:
        ValueError: `reduction` is neither "mean" nor "sum".
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    flat = values.flatten(1)
    return flat.mean(1) if reduction == "mean" else flat.sum(1)


def _column(value: float | Tensor, x: Tensor) -> Tensor:
    """Turns a number, or one number for each row, into a float32 tensor that broadcasts over `x`."""
    tensor = torch.as_tensor(value, dtype=torch.float32, device=x.device)
    return tensor.reshape(-1, *([1] * (x.ndim - 1))) if tensor.ndim <= 1 else tensor


def _between(sigma: float | Tensor, sigma_next: float | Tensor) -> str:
    return f"from sigma {_number(sigma)} to {_number(sigma_next)}"


def _number(value: float | Tensor) -> str:
    numbers = sorted({round(float(v), 6) for v in torch.as_tensor(value).flatten()})
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}..{numbers[-1]}"
