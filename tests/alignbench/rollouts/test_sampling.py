"""Is sampling right? Data are Gaussian here, x_0 ~ N(m, s^2): the velocity is linear in closed form, so every plan's chain is
linear-Gaussian and the distribution of its leaves follows by a recursion over two numbers, without sampling."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignbench import Plan, Step, flow, load_objective, load_sampler, registry, rollout
from alignbench.config.run_config import load_config
from alignbench.rollouts.executor import sample
from alignbench.rollouts.plan import Rule
from alignbench.training.engine import backward
from tests.support.by_hand import gaussian_step
from tests.support.toys import PROMPTS, KnownFlow, ToyBackbone, chains, tree

COPIES = 64
"""Independent data points in one latent."""
MEANS, DEVIATIONS = (0.8, -0.5, 0.0), (0.3, 1.0, 1.7)
GROUPS = 512
RULES = [("sde", 0.7), ("dance", 0.7), ("cps", 0.7), ("sde", 0.3), ("dance", 0.3), ("cps", 0.3), ("memoryless", 1.0)]


def velocity_of(x: float, sigma: float, m: float, s: float) -> float:
    """E[x_1 - x_0 | x_sigma = x], by the regression of both on x: Cov(x_0, x) = (1 - sigma) s^2, Cov(x_1, x) = sigma."""
    variance = (1 - sigma) ** 2 * s**2 + sigma**2
    return (sigma - (1 - sigma) * s**2) / variance * (x - (1 - sigma) * m) - m


class GaussianFlow(KnownFlow):
    """COPIES points of three Gaussians in each latent, [COPIES, 3]; nothing to train."""

    name = "gaussian_flow"
    latent_shape = (COPIES, 3)
    default_steps = 6

    def sigmas(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: None, group: Tensor) -> Tensor:
        columns = [
            velocity_of(x[..., d], sigma[:, None], m, s)  # type: ignore[arg-type]
            for d, (m, s) in enumerate(zip(MEANS, DEVIATIONS, strict=True))
        ]
        return torch.stack(columns, dim=-1)  # type: ignore[arg-type]


def affine(step: Step, sigma: float, sigma_next: float, m: float, s: float) -> tuple[float, float, float]:
    """x_next = a x + b + std noise: (a, b, std) of one step of the chain."""

    def mean(x: float) -> tuple[float, float]:
        v = velocity_of(x, sigma, m, s)
        if not step.stochastic:
            return x + (sigma_next - sigma) * v, 0.0
        numbers = torch.tensor(x, dtype=torch.float64), torch.tensor(v, dtype=torch.float64)
        found, std = gaussian_step(step.rule, *numbers, sigma, sigma_next, step.eta)
        return float(found), std

    (b, std), (at_one, _) = mean(0.0), mean(1.0)
    return at_one - b, b, std


def distribution(plan: Plan, m: float, s: float) -> tuple[float, float]:
    """Mean and deviation of each leaf of the plan."""
    schedule = [1 - stop / plan.schedule_indices[-1] for stop in plan.schedule_indices]
    mean, variance = 0.0, 1.0
    for t, step in enumerate(plan.steps):
        a, b, std = affine(step, schedule[t], schedule[t + 1], m, s)
        mean, variance = a * mean + b, a**2 * variance + std**2
    return mean, math.sqrt(variance)


def covariance(plan: Plan, split: int, m: float, s: float) -> float:
    """Of two leaves that part at the given step."""
    schedule = [1 - stop / plan.schedule_indices[-1] for stop in plan.schedule_indices]
    shared = 1.0
    for t, step in enumerate(plan.steps):
        a, _, std = affine(step, schedule[t], schedule[t + 1], m, s)
        shared = a**2 * shared + (std**2 if t < split else 0.0)
    return shared


def z_scores(drawn: Tensor, plan: Plan) -> np.ndarray:
    """How many standard errors means, variances and covariances of drawn [N, 3] are off the plan's distribution; [9]."""
    x, n = drawn.double(), len(drawn)
    distributions = [distribution(plan, m, s) for m, s in zip(MEANS, DEVIATIONS, strict=True)]
    mean, deviation = torch.tensor(distributions, dtype=torch.float64).T
    standard = (x - mean) / deviation
    products = [(standard[:, i] * standard[:, j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    of_variance = (standard.square().mean(0) - 1) / math.sqrt(2)
    return np.asarray(torch.cat([standard.mean(0), of_variance, torch.stack(products)]) * math.sqrt(n))


WITHIN, BEYOND = 4.5, 8.0
"""Of the 1,500 z-scores here all are within 4.5 for 99 % of all seeds; a fault must stand clear of that."""


def chains_of_leaves(plan: Plan) -> list[Plan]:
    """The steps on the way to each image, as a rollout of its own."""
    made = []
    for point, _ in plan.ends:
        steps = tuple(replace(plan.moves[m].step, children=1) for m in plan.path_to(point))
        made += [Plan(steps)] * plan.branches_at(point)
    return made


def leaves(plan: Plan, seed: int = 0) -> Tensor:
    """[GROUPS, K, COPIES, 3]."""
    forest = rollout(GaussianFlow(), ["x"] * GROUPS, plan, seed=seed)
    return forest.leaf_latents.view(GROUPS, plan.leaves, COPIES, 3)


def ode(steps: int) -> Plan:
    return Plan((Step(),) * steps)


# --- the distribution of samples


@pytest.mark.parametrize("steps", [4, 8, 20, 50])
@pytest.mark.parametrize(("rule", "level"), RULES)
def test_samples_of_every_rule_have_the_mean_and_covariance_of_their_chain(rule: str, level: float, steps: int) -> None:
    plan = chains(steps, 1, rule, level)
    assert np.abs(z_scores(leaves(plan).reshape(-1, 3), plan)).max() < WITHIN


@pytest.mark.parametrize("steps", [4, 8, 20, 50])
def test_deterministic_samples_have_those_of_the_euler_chain(steps: int) -> None:
    assert np.abs(z_scores(leaves(ode(steps)).reshape(-1, 3), ode(steps))).max() < WITHIN
    drawn = sample(GaussianFlow(), ["x"], GROUPS, steps, seed=0)
    assert np.abs(z_scores(drawn.reshape(-1, 3), ode(steps))).max() < WITHIN


def test_another_rule_or_number_of_steps_would_be_seen() -> None:
    drawn = leaves(chains(8, 1, "sde", 0.7)).reshape(-1, 3)
    for other in (chains(8, 1, "dance", 0.7), chains(8, 1, "cps", 0.7), chains(6, 1, "sde", 0.7), ode(8)):
        assert np.abs(z_scores(drawn, other)).max() > BEYOND


@pytest.mark.parametrize(
    ("rule", "level", "orders"),
    # Euler's method is of first order. sde starts with a step that is as loud however short it is (std = a at sigma = 1) and
    # is forgotten only as the steps grow in number, so that its error falls more slowly, or changes sign on its way.
    [("ode", 0.0, (0.9, 1.1)), ("dance", 0.3, (0.9, 1.1)), ("dance", 0.7, (0.9, 1.2)), ("sde", 0.3, (0.9, 1.4))],
)
def test_the_deviation_of_samples_nears_that_of_the_data_as_steps_grow(
    rule: str, level: float, orders: tuple[float, float]
) -> None:
    for m, s in zip(MEANS, DEVIATIONS, strict=True):
        errors = []
        for steps in (4, 50, 100, 200):
            plan = ode(steps) if rule == "ode" else chains(steps, 1, rule, level)
            mean, deviation = distribution(plan, m, s)
            assert mean == pytest.approx(m)
            errors.append(abs(deviation / s - 1))
        assert errors[0] > errors[1] > errors[2] > errors[3]
        assert errors[1] < 0.05
        if rule != "dance" or s != DEVIATIONS[0]:  # there the error has all but gone at 50 steps
            assert orders[0] < math.log2(errors[2] / errors[3]) < orders[1]


def test_sde_at_its_default_level_is_within_3_percent_of_the_data_from_20_steps_on() -> None:
    for m, s in zip(MEANS, DEVIATIONS, strict=True):
        for steps in (20, 50, 200, 1000):
            assert distribution(chains(steps, 1, "sde", 0.7), m, s)[1] == pytest.approx(s, rel=0.03)
        assert distribution(chains(4, 1, "sde", 0.7), m, s)[1] < 0.9 * s


def test_cps_draws_too_little_spread_however_many_steps_it_takes() -> None:
    """Each of its steps replaces a part of the predicted noise that does not shrink with the step, but the predicted image
    is a mean, which spreads less than images do. The ODE, which it should agree with, has no such limit."""
    for m, s in zip(MEANS, DEVIATIONS, strict=True):
        short = [1 - distribution(chains(steps, 1, "cps", 0.7), m, s)[1] / s for steps in (50, 200, 1000)]
        assert short[0] > short[1] > short[2] > 0.14
        assert 1 - distribution(ode(1000), m, s)[1] / s < 0.003
        assert 1 - distribution(chains(1000, 1, "cps", 0.05), m, s)[1] / s < 0.003


@pytest.mark.parametrize(("steps", "variance"), [(10, 0.65), (25, 0.83), (100, 0.95)])
def test_memoryless_steps_draw_too_little_spread_which_more_steps_mend(steps: int, variance: float) -> None:
    # Data of N(0, 1): the variances of the ancestral chain whose last step is deterministic.
    assert distribution(chains(steps, 1, "memoryless", 1.0), 0.0, 1.0)[1] ** 2 == pytest.approx(variance, abs=0.006)


@pytest.mark.parametrize(
    ("steps", "memoryless", "root_two"),  # docs/samplers.md
    [(4, 0.63, 1.17), (8, 0.77, 1.01), (16, 0.87, 1.00), (64, 0.96, 1.00), (256, 0.99, 1.00)],
)
def test_the_documented_deviations_of_memoryless_noise(steps: int, memoryless: float, root_two: float) -> None:
    plans = chains(steps, 1, "memoryless", 1.0), chains(steps, 1, "sde", 2**0.5)
    assert [distribution(plan, 0.8, 1.0)[1] for plan in plans] == pytest.approx([memoryless, root_two], abs=0.006)


@pytest.mark.parametrize(
    ("steps", "documented"),  # docs/samplers.md: ode, dance, sde, cps
    [
        (4, (0.72, 0.80, 0.89, 0.65)), (8, (0.85, 0.90, 0.95, 0.74)), (16, (0.92, 0.95, 0.98, 0.79)),
        (64, (0.98, 0.99, 1.00, 0.83)), (256, (1.00, 1.00, 1.00, 0.85)),
    ],
)  # fmt: skip
def test_the_deviations_in_the_documentation(steps: int, documented: tuple[float, ...]) -> None:
    plans = (ode(steps), *(chains(steps, 1, rule, 0.7) for rule in ("dance", "sde", "cps")))
    assert [distribution(plan, 0.8, 1.0)[1] for plan in plans] == pytest.approx(documented, abs=0.006)


# --- trees


@pytest.mark.parametrize("name", registry.names("samplers"))
@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_every_leaf_of_every_sampler_has_the_law_of_a_rollout_on_its_own(name: str, progress: float) -> None:
    settings = load_config(preset="quick", options={"sampler": name}).sampler.settings
    plan = load_sampler(name, **settings).plan(progress, np.random.default_rng(0))
    drawn = leaves(plan)
    for k, chain in enumerate(chains_of_leaves(plan)):
        assert np.abs(z_scores(drawn[:, k].reshape(-1, 3), chain)).max() < WITHIN


def two_of_one_group(plan: Plan, one: int, other: int) -> tuple[Tensor, Tensor]:
    drawn = leaves(plan).double()
    mean = torch.tensor([distribution(ode(4), m, s)[0] for m, s in zip(MEANS, DEVIATIONS, strict=True)])
    return drawn[:, one].reshape(-1, 3) - mean, drawn[:, other].reshape(-1, 3) - mean


@pytest.mark.parametrize(
    ("strides", "pair", "shared_steps"),
    # Images of four steps: branches at step 0 (images 0, 1) and step 1 (2, 3). Two of one step share the trunk up to it, and
    # so do two of steps 0 and 1. With strides 1 and 2, images 0 and 2 are one branch, finished twice: they share its noise.
    [((1,), (0, 1), "root"), ((1,), (0, 2), "root"), ((1,), (2, 3), "root"), ((1, 2), (0, 2), "root and noise")],
)
def test_the_covariance_of_two_branches_of_a_trunk(strides: tuple[int, ...], pair: tuple[int, int], shared_steps: str) -> None:
    plan = load_sampler("trunk_tree", steps=4, roots=1, children=2, last_branch=1, strides=strides, rule="sde").plan(
        0.0, np.random.default_rng(0)
    )
    one, other = two_of_one_group(plan, *pair)
    every = chains_of_leaves(plan)
    for d, (m, s) in enumerate(zip(MEANS, DEVIATIONS, strict=True)):
        slopes = [gain(every[k], m, s) for k in pair]
        expected = slopes[0][0] * slopes[1][0]  # of the root, whose variance is 1
        if shared_steps == "root and noise":
            expected += slopes[0][1] * slopes[1][1]
        deviations = [distribution(every[k], m, s)[1] for k in pair]
        correlation = expected / (deviations[0] * deviations[1])
        error = math.sqrt((1 + correlation**2) / (GROUPS * COPIES))
        found = float((one[:, d] * other[:, d]).mean()) / (deviations[0] * deviations[1])
        assert found == pytest.approx(correlation, abs=WITHIN * error)


def gain(plan: Plan, m: float, s: float) -> tuple[float, float]:
    """How much the image of a chain with one stochastic step moves with its root, and with the noise of that step."""
    schedule = [1 - stop / plan.schedule_indices[-1] for stop in plan.schedule_indices]
    root, noise = 1.0, 0.0
    for t, step in enumerate(plan.steps):
        a, _, std = affine(step, schedule[t], schedule[t + 1], m, s)
        root, noise = a * root, a * noise + std
    return root, noise


def test_the_covariance_of_two_leaves_is_that_of_the_path_they_share() -> None:
    plan = tree(6, (1, 3, 4), rule="sde")
    drawn = leaves(plan).double()
    n = GROUPS * COPIES
    # Leaf 0 parts from leaf 9 at the first split, from leaf 3 at the second, from leaf 1 at the third.
    for other, split in ((9, 1), (3, 3), (1, 4)):
        for d, (m, s) in enumerate(zip(MEANS, DEVIATIONS, strict=True)):
            mean, deviation = distribution(plan, m, s)
            one, two = (drawn[:, k, :, d].flatten() - mean for k in (0, other))
            correlation = covariance(plan, split, m, s) / deviation**2
            error = math.sqrt((1 + correlation**2) / n)
            assert float((one * two).mean()) / deviation**2 == pytest.approx(correlation, abs=WITHIN * error)


def faulty(fault: str) -> Callable[..., flow.StepResult]:
    """`flow.unchecked_step` as an executor with that fault would call it at stochastic steps."""
    right = flow.unchecked_step
    earlier: list[Tensor] = []

    def draw(
        x: Tensor, velocity: Tensor, sigma: float, sigma_next: float, noise_level: float = 0.0, rule: Rule = "sde", **rest: Any
    ) -> flow.StepResult:
        if rule != "ode":
            if fault == "the noise of another step is used again":
                earlier.append(rest["noise"])
                rest["noise"] = earlier[0].repeat_interleave(len(x) // len(earlier[0]), 0)
            elif fault == "sigma_next is that of the step after":
                sigma_next -= sigma - sigma_next
            elif fault == "noise is a tenth too loud":
                rest["noise"] = 1.1 * rest["noise"]
            elif fault == "children share one noise":
                rest["noise"] = rest["noise"][::2].repeat_interleave(2, 0)
        return right(x, velocity, sigma, sigma_next, noise_level, rule, **rest)

    return draw


def off(plan: Plan) -> tuple[float, float]:
    """The largest z-score of any leaf's distribution, and that of the covariance of the first two leaves."""
    drawn = leaves(plan).double()
    mean, deviation = distribution(plan, MEANS[1], DEVIATIONS[1])
    correlation = covariance(plan, plan.splits[-1], MEANS[1], DEVIATIONS[1]) / deviation**2
    one, two = ((drawn[:, k, :, 1].flatten() - mean) / deviation for k in (0, 1))
    error = math.sqrt((1 + correlation**2) / len(one))
    of_distributions = max(float(np.abs(z_scores(drawn[:, k].reshape(-1, 3), plan)).max()) for k in range(plan.leaves))
    return of_distributions, abs(float((one * two).mean()) - correlation) / error


@pytest.mark.parametrize(
    ("fault", "seen_in"),
    [
        ("none", ()),
        ("noise is a tenth too loud", (0, 1)),
        ("sigma_next is that of the step after", (0, 1)),
        ("the noise of another step is used again", (0, 1)),
        ("children share one noise", (1,)),  # each of them still has its distribution
    ],
)
def test_faults_of_a_tree_would_be_seen(fault: str, seen_in: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignbench.rollouts.executor.flow.unchecked_step", faulty(fault))
    found = off(tree(6, (1, 3), rule="sde", children=2))
    for i in (0, 1):
        assert found[i] > BEYOND if i in seen_in else found[i] < WITHIN


# --- replay


@pytest.mark.parametrize("name", registry.names("samplers"))
@pytest.mark.parametrize("rule", ["sde", "cps", "dance"])
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_a_replay_finds_the_log_probs_of_the_rollout(name: str, rule: str, micro_batch: int | None) -> None:
    settings = load_config(preset="quick", options={"sampler": name}).sampler.settings
    toy = ToyBackbone()
    plan = load_sampler(name, **settings, rule=rule).plan(0.5, np.random.default_rng(0))
    forest = rollout(toy, PROMPTS, plan, seed=0)
    forest.rewards = torch.linspace(0, 1, len(forest.leaves))
    found = backward(toy, load_objective("grpo"), forest, micro_batch=micro_batch)
    assert found.rows == plan.replay_rows(2)
    assert found.terms["log_prob"].shape == forest.old_log_prob.shape
    # A velocity that is rounded in another order moves a log-prob of size 1 in the sixth decimal.
    assert torch.allclose(found.terms["log_prob"], forest.old_log_prob, atol=1e-5)
