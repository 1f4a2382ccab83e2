"""The checks of a model's folder, which `check --backbone DIR` runs besides those of every pair."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from alignbench.authoring.checking import ROUNDING, CheckResult, Outcome, Subject
from alignbench.backbones.diffusers_folder import COMPARED_STEPS, DiffusersFolder
from alignbench.errors import UserError
from alignbench.rollouts.executor import sample
from alignbench.rollouts.noise import group_keys, normal

SEED = 5
GREY_LEVELS = {torch.float32: 0.5, torch.bfloat16: 8.0, torch.float16: 4.0}
"""Largest mean difference of two images that rounding may cause, in grey levels of 255; a pipeline also rounds its states."""


def run_checks(subject: Subject) -> Iterator[CheckResult]:
    """Runs all checks of the folder, one after the other, and yields their results."""
    policy, prompts = subject.policy, list(subject.prompts)
    if not isinstance(policy, DiffusersFolder):
        return
    for name, check in CHECKS.items():
        holds, detail = check(policy, prompts)
        yield CheckResult(name=name, holds=holds, detail=detail, required=True)


def _schedule(policy: DiffusersFolder, prompts: list[str]) -> Outcome:
    """Sigma falls from 1 to 0."""
    sigmas = policy.sigmas(policy.default_steps)
    holds = float(sigmas[0]) == 1 and float(sigmas[-1]) == 0 and bool((sigmas.diff() < 0).all())
    return holds, f"{policy.default_steps} steps from 1 to 0, the last from {float(sigmas[-2]):.3g}"


def _pipeline(policy: DiffusersFolder, prompts: list[str]) -> Outcome:
    """Deterministic sampling draws what the folder's own pipeline draws from the same noise."""
    noise = normal([("evaluation", SEED, *key, 0) for key in group_keys(prompts)], policy.latent_shape).to(policy.device)
    try:
        theirs = policy.drawn_by_pipeline(prompts, noise)
    except UserError as error:
        return None, str(error)
    ours = policy.decode(sample(policy, prompts, 1, COMPARED_STEPS, seed=SEED))
    off = float(np.abs(ours.astype(int) - theirs).mean())
    return off <= GREY_LEVELS[policy.dtype], f"{COMPARED_STEPS} steps, mean difference {off:.2g} grey levels"


def _rows(policy: DiffusersFolder, prompts: list[str]) -> Outcome:
    """A row's velocity depends neither on the other rows nor on the other prompts."""
    together = _velocities(policy, prompts)
    alone = torch.cat([_velocities(policy, [prompt], first=i) for i, prompt in enumerate(prompts)])
    off = float((together - alone).norm() / alone.norm())
    return off < ROUNDING.get(policy.dtype, 1e-4), f"relative difference {off:.0e}"


def _gradients(policy: DiffusersFolder, prompts: list[str]) -> Outcome:
    """A gradient reaches the trained weights of every block."""
    reached: dict[str, bool] = {}
    with _moved(policy):
        policy.trainable().zero_grad()
        _velocities(policy, prompts, grad=True).square().sum().backward()
        for name, parameter in policy.trainable().named_parameters():
            if parameter.requires_grad:
                block = ".".join(name.split(".")[:2])
                nonzero = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
                reached[block] = reached.get(block, False) or nonzero
        policy.trainable().zero_grad()
    missed = [block for block, is_reached in reached.items() if not is_reached]
    return not missed, f"{len(reached) - len(missed)} of {len(reached)} blocks" + (f", not {missed[0]}" if missed else "")


def _reference(policy: DiffusersFolder, prompts: list[str]) -> Outcome:
    """The reference is the base model, however far the policy has moved."""
    with policy.reference():
        base = _velocities(policy, prompts)
    with _moved(policy):
        moved = _velocities(policy, prompts)
        with policy.reference():
            off = float((_velocities(policy, prompts) - base).abs().max())
    return off == 0 and not torch.equal(moved, base), f"largest difference {off:.0e} after the policy moved"


def _velocities(policy: DiffusersFolder, prompts: list[str], *, first: int = 0, grad: bool = False) -> Tensor:
    """The velocity of one state for each prompt, at sigmas that differ; `first` is the number of the first state."""
    numbers = range(first, first + len(prompts))
    x = normal([("check", i) for i in numbers], policy.latent_shape).to(policy.device)
    sigma = torch.tensor([0.9 / (1 + i) for i in numbers], device=policy.device)
    with torch.set_grad_enabled(grad):
        return policy.velocity(x, sigma, policy.encode(prompts), torch.arange(len(prompts), device=policy.device))


@contextmanager
def _moved(policy: DiffusersFolder) -> Iterator[None]:
    """Moves the policy away from the base model inside this context."""
    kept = [p.detach().clone() for p in policy.parameters()]
    generator = torch.Generator().manual_seed(SEED)
    try:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(policy.parameters(), kept, strict=True):
                parameter.copy_(value)


CHECKS: dict[str, Callable[[DiffusersFolder, list[str]], Outcome]] = {
    "schedule": _schedule,
    "same as the pipeline": _pipeline,
    "rows are independent": _rows,
    "gradients reach all blocks": _gradients,
    "reference": _reference,
}
