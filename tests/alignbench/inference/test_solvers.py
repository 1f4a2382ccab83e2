"""Solvers on a velocity whose flow is known, and the noise that they share."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignbench import flow
from alignbench.inference import solvers
from alignbench.rollouts.executor import rollout, sample
from alignbench.rollouts.noise import evaluation_keys, group_keys, normal
from alignbench.rollouts.plan import Plan, Step
from tests.support.toys import PROMPTS, KnownFlow, ToyBackbone


class Growing(KnownFlow):
    """velocity(x) = x on an even schedule, so that the flow multiplies the noise by exp(-1)."""

    latent_shape = (3,)
    default_steps = 4

    def sigmas(self, steps: int) -> Tensor:
        return flow.sigmas(steps)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Any, group: Tensor) -> Tensor:
        return x


KEYS = group_keys(["a"])


def factor(solver: str, steps: int) -> float:
    """What the solver multiplies the noise by."""
    drawn = solvers.draw(Growing(), ["a"], KEYS, 2, steps=steps, seed=3, solver=solver)
    return float((drawn / normal(evaluation_keys(KEYS, 2, 3), (3,))).mean())


def test_each_solver_multiplies_by_its_polynomial() -> None:
    h = 0.25
    assert factor("euler", 4) == pytest.approx((1 - h) ** 4)
    assert factor("heun", 4) == pytest.approx((1 - h + h**2 / 2) ** 3 * (1 - h))
    x = [1.0, 1 - h]
    for _ in range(3):
        x.append(x[-1] - h * (1.5 * x[-1] - 0.5 * x[-2]))
    assert factor("ab2", 4) == pytest.approx(x[-1])


def test_the_error_of_ab2_falls_with_the_square_of_the_steps_and_eulers_does_not() -> None:
    ratio = {s: abs(factor(s, 20) - np.exp(-1)) / abs(factor(s, 40) - np.exp(-1)) for s in ("euler", "ab2")}
    assert ratio["euler"] == pytest.approx(2, abs=0.1)
    assert ratio["ab2"] == pytest.approx(4, abs=0.3)


def test_ab2_takes_account_of_steps_of_unequal_length() -> None:
    policy = ToyBackbone()  # its schedule is shifted
    sigmas = policy.sigmas(3).tolist()
    found = solvers.draw(policy, ["a"], KEYS, 1, steps=3, seed=0, solver="ab2")
    x = normal(evaluation_keys(KEYS, 1, 0), policy.latent_shape)
    before: tuple[Tensor, float] | None = None
    for s, s_next in pairwise(sigmas):
        with torch.no_grad():
            v = policy.velocity(x, torch.tensor([s]), policy.encode(["a"]), torch.tensor([0]))
        slope = torch.zeros_like(v) if before is None else (v - before[0]) / (s - before[1])  # along the path
        x, before = x + (s_next - s) * v + (s_next - s) ** 2 / 2 * slope, (v, s)
    assert torch.allclose(found, x, atol=1e-6)


def test_euler_is_the_evaluations_own_sampling_to_the_bit() -> None:
    policy = ToyBackbone()
    found = solvers.draw(policy, PROMPTS, group_keys(PROMPTS), 3, steps=5, seed=7)
    assert torch.equal(found, sample(policy, PROMPTS, 3, 5, 7))


@pytest.mark.parametrize("step", [Step("sde", 0.7), Step("memoryless", 1.0)], ids=lambda step: step.rule)
def test_with_noise_it_draws_as_a_rollout_of_stochastic_steps_does(step: Step) -> None:
    policy = ToyBackbone()
    found = solvers.draw(policy, ["a"], KEYS, 2000, steps=6, seed=0, solver=step.rule)
    plan = Plan((*[step] * 5, Step()), roots=2000)
    other = rollout(policy, ["a"], plan, 1).leaf_latents
    spread = other.std(0) / 2000**0.5
    assert bool(((found.mean(0) - other.mean(0)).abs() < 5 * 2**0.5 * spread).all())
    assert torch.allclose(found.std(0), other.std(0), rtol=0.1)


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "sde", "memoryless"])
def test_model_rows_are_counted_before_they_are_run(solver: str) -> None:
    policy = ToyBackbone()
    solvers.draw(policy, PROMPTS, group_keys(PROMPTS), 3, steps=5, seed=0, solver=solver, micro_batch=4)
    assert policy.rows == 6 * solvers.model_rows(solver, 5)
