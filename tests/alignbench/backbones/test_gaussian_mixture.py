"""The 2-D toy with a known solution: its samples, its density and the numbers it reports, against other computations."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from alignbench import UserError, load_backbone, load_scorer, run
from alignbench.backbones.gaussian_mixture import GaussianMixture, Residual, ResidualPerPrompt
from alignbench.backbones.mixture.known_target import KnownPoints, known_target
from alignbench.backbones.mixture.mixtures import as_images, from_images, noise_quadrature
from alignbench.backbones.mixture.scenarios import SCENARIOS, Bumps, world
from alignbench.backbones.mixture.tilted_flow import tilted_flow
from alignbench.config.run_config import load_config
from alignbench.rollouts.executor import sample
from alignbench.tasks import load_task

PROMPT = "equal_modes 1"


def backbone(**settings: object) -> GaussianMixture:
    torch.manual_seed(0)
    found = load_backbone("gaussian_mixture", device="cpu", **settings)
    assert isinstance(found, GaussianMixture)
    return found


def moved(size: float = 0.3, **settings: object) -> GaussianMixture:
    """A policy away from its base."""
    found = backbone(**settings)
    generator = torch.Generator().manual_seed(1)
    assert isinstance(found.residual, Residual)
    with torch.no_grad():
        for parameter in found.residual.net[-1].parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return found


@pytest.mark.parametrize(("network", "disturbed"), [("shared", True), ("per_prompt", False)])
def test_an_update_on_one_prompt_moves_the_others_in_a_shared_network(network: str, disturbed: bool) -> None:
    policy = backbone(network=network)
    c = policy.encode(["equal_modes 0", "equal_modes 1"])
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(2))
    sigma, first, second = torch.full((8,), 0.5), torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.long)
    with policy.reference():
        base = policy.velocity(x, sigma, c, second)
    assert torch.equal(policy.velocity(x, sigma, c, second), base)  # the residual is zero at the start
    optimizer = torch.optim.SGD(policy.trainable().parameters(), lr=1.0)
    for _ in range(2):  # the first step moves only the last layer, which is zero at the start
        optimizer.zero_grad()
        (policy.velocity(x, sigma, c, first) - 1).square().mean().backward()
        optimizer.step()
    assert not torch.equal(policy.velocity(x, sigma, c, first), base)
    assert torch.equal(policy.velocity(x, sigma, c, second), base) is not disturbed


def test_a_network_for_each_prompt_answers_rows_in_any_order() -> None:
    policy = backbone(network="per_prompt")
    assert isinstance(policy.residual, ResidualPerPrompt)
    with torch.no_grad():
        for i, network in enumerate(policy.residual.networks):
            assert isinstance(network, Residual)
            last = network.net[-1]
            assert isinstance(last, torch.nn.Linear)
            last.bias.fill_(float(i))
    c = policy.encode([f"equal_modes {i}" for i in range(4)])
    x, sigma = torch.zeros(5, 2), torch.full((5,), 0.5)
    group = torch.tensor([3, 0, 2, 3, 1])
    moved_by = policy.velocity(x, sigma, c, group)
    with policy.reference():
        moved_by = moved_by - policy.velocity(x, sigma, c, group)
    assert torch.allclose(moved_by[:, 0], torch.tensor([3.0, 0.0, 2.0, 3.0, 1.0]), atol=1e-5)  # float32 sums near 3


def test_samples_of_the_base_have_the_mixtures_moments() -> None:
    x = sample(backbone(), [PROMPT], 4000, 100, seed=0).double()
    base = world(PROMPT).base
    mean = (base.weights[:, None] * base.means).sum(0)
    # Radius 3 and deviation 0.45 in two dimensions; five standard errors.
    assert torch.allclose(x.mean(0), mean, atol=5 * 2.2 / 4000**0.5)
    assert float(x.square().sum(1).mean()) == pytest.approx(9 + 2 * 0.45**2, abs=0.25)
    nearest = torch.cdist(x, base.means).argmin(1)
    assert np.bincount(nearest, minlength=6) / 4000 == pytest.approx(1 / 6, abs=0.03)


def test_the_density_is_that_of_the_drawn_points() -> None:
    """Probabilities of squares by the exact density at points of a quadrature, against the share of samples in them."""
    policy = moved()
    noise, weights = noise_quadrature(2, points=200)
    x, log_density = policy.push_forward(PROMPT, noise)
    drawn = sample(policy, [PROMPT], 40_000, policy.default_steps, seed=3).double()
    for corner in ([-4.0, -4.0], [0.0, 0.0], [1.0, -3.0]):
        low = torch.tensor(corner, dtype=torch.float64)
        inside = ((x > low) & (x < low + 3)).all(1)
        share = float(((drawn > low) & (drawn < low + 3)).all(1).double().mean())
        assert float(weights[inside].sum()) == pytest.approx(share, abs=0.012)  # five standard errors of 40,000
    # Independently of the quadrature's weights: the density integrates to one over the plane.
    cells = torch.zeros(80, 80, dtype=torch.float64)
    counts = torch.zeros(80, 80, dtype=torch.float64)
    index = ((x + 8) / 0.2).long()
    here = ((index >= 0) & (index < 80)).all(1)
    place = index[here, 0] * 80 + index[here, 1]
    cells.view(-1).index_add_(0, place, log_density[here].exp())
    counts.view(-1).index_add_(0, place, torch.ones(int(here.sum()), dtype=torch.float64))
    mean_density = cells / counts.clamp(min=1)
    assert float(mean_density.sum() * 0.04) == pytest.approx(1.0, abs=0.03)  # cells of 0.2, means within them


def test_the_change_of_variables_is_that_of_finite_differences() -> None:
    policy = moved()
    z = torch.tensor([[0.3, -0.8]], dtype=torch.float64)
    _, log_density = policy.push_forward(PROMPT, z)
    h = 2e-3  # float32 states: smaller steps drown in rounding
    moves = torch.tensor([[h, 0], [-h, 0], [0, h], [0, -h]], dtype=torch.float64)
    ends = policy.push_forward(PROMPT, z + moves)[0]
    jacobian = torch.stack([(ends[0] - ends[1]) / (2 * h), (ends[2] - ends[3]) / (2 * h)], dim=1)
    expected = -0.5 * float(z.square().sum()) - math.log(2 * math.pi) - float(torch.linalg.slogdet(jacobian)[1])
    assert float(log_density[0]) == pytest.approx(expected, abs=5e-3)


def test_the_change_of_variables_holds_in_three_dimensions() -> None:
    policy = moved(dimension=3)
    z = torch.tensor([[0.3, -0.8, 0.5]], dtype=torch.float64)
    _, log_density = policy.push_forward("quadratic 1", z)
    h = 2e-3
    ends = [policy.push_forward("quadratic 1", z + sign * h * torch.eye(3, dtype=torch.float64))[0] for sign in (1, -1)]
    jacobian = (ends[0] - ends[1]).T / (2 * h)
    expected = -0.5 * float(z.square().sum()) - 1.5 * math.log(2 * math.pi) - float(torch.linalg.slogdet(jacobian)[1])
    assert float(log_density[0]) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("dimension", [2, 5])
def test_numbers_of_a_quadratic_reward_are_those_of_the_closed_form(dimension: int) -> None:
    policy = backbone(steps=64, beta=4.0, dimension=dimension)
    found = {name: float(m.values[0]) for name, m in policy.measure(["quadratic 2"]).items()}
    w = world("quadratic 2", dimension)
    x = w.base.sample(200_000, torch.Generator().manual_seed(0))
    reward = w.reward(x)
    weights = torch.softmax(4.0 * reward, 0)
    log_z = math.log(float(torch.exp(4.0 * reward).mean()))
    assert found["log_z"] == pytest.approx(log_z, abs=0.02)  # five standard errors
    assert found["target_reward"] == pytest.approx(float((weights * reward).sum()), abs=0.02)
    assert found["exact_reward"] == pytest.approx(float(reward.mean()), abs=0.03)  # and Euler steps
    assert found["kl_model_target"] == pytest.approx(log_z - 4.0 * float(reward.mean()), abs=0.1)
    assert found["kl_target_model"] == pytest.approx(4.0 * found["target_reward"] - log_z, abs=0.1)
    assert found["target_reached"] == pytest.approx(1.0, abs=0.1)
    # A model so near its base has little of what the target has.
    assert found["exact_reward"] <= found["best_reward_at_kl"] < found["target_reward"]


def test_scenarios_in_2_d_are_refused_in_other_dimensions() -> None:
    with pytest.raises(UserError, match="is only 2-D; in 3 dimensions use quadratic"):
        backbone(dimension=3).encode([PROMPT])


def test_a_run_in_more_than_two_dimensions(tmp_path: Path) -> None:
    options = {"backbone": "gaussian_mixture", "objective": "vargrad", "sampler": "independent", "task": "quadratic"}
    config = load_config(preset="smoke", options=options, sets=["backbone.dimension=4", "threads=1"])
    result = run(config, tmp_path / "run")
    assert result.metrics["kl_base"].final.value is not None
    assert not (tmp_path / "run" / "distributions.parquet").exists()


def test_the_base_is_near_its_mixture_and_nearer_with_more_steps() -> None:
    near, nearer = (float(backbone(steps=n, quadrature=60).measure([PROMPT])["kl_base"].values[0]) for n in (8, 64))
    assert 0 <= nearer < near / 5
    assert nearer < 2e-2


def test_numbers_of_the_base_model() -> None:
    policy = backbone(steps=64, beta=2.0, quadrature=80)
    found = {name: float(m.values[0]) for name, m in policy.measure([PROMPT]).items()}
    w = world(PROMPT)
    x = w.base.sample(200_000, torch.Generator().manual_seed(0))
    reward = w.reward(x)
    assert found["exact_reward"] == pytest.approx(float(reward.mean()), abs=0.01)  # Euler steps, and five standard errors
    # The target's expected reward by importance weights exp(beta R), and its divergence from the base.
    importance = torch.softmax(2.0 * reward, 0)
    assert found["target_reward"] == pytest.approx(float((importance * reward).sum()), abs=0.01)
    log_z = math.log(float(torch.exp(2.0 * reward).mean()))
    assert found["kl_target_model"] == pytest.approx(2.0 * found["target_reward"] - log_z, abs=0.02)
    assert found["kl_model_target"] == pytest.approx(log_z - 2.0 * found["exact_reward"], abs=0.02)
    # A small divergence buys sqrt(2 KL Var R) of reward at first order; that of the Euler steps is 0.013 here.
    bought = math.sqrt(2 * found["kl_base"] * float(reward.var()))
    assert found["best_reward_at_kl"] == pytest.approx(float(reward.mean()) + bought, abs=0.02)
    assert found["modes_covered"] == 1.0
    assert found["target_reached"] == pytest.approx(1.0, abs=0.01)


def test_a_model_that_draws_one_mode_covers_one_and_is_far_from_the_target() -> None:
    policy = backbone()
    good = world(PROMPT).base.means[1].float()  # the first of the good modes of prompt 1

    class Collapsed(torch.nn.Module):
        """Carries every noise to a small disc around one good mode."""

        def forward(self, x: torch.Tensor, sigma: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
            c = policy.encode([PROMPT])
            policy.active = False
            base = policy.velocity(x, sigma, c, torch.zeros(len(x), dtype=torch.long))
            policy.active = True
            # Straight lines to 0.3 z + mode: v = x_1 - x_0 with x = (1 - s) (0.3 x_1 + mode) + s x_1.
            noise = (x - (1 - sigma[:, None]) * good) / (0.3 + 0.7 * sigma[:, None])
            return 0.7 * noise - good - base

    policy.residual = Collapsed()  # type: ignore[assignment]
    found = {name: float(m.values[0]) for name, m in policy.measure([PROMPT]).items()}
    x, log_density = policy.push_forward(PROMPT, torch.zeros(1, 2, dtype=torch.float64))
    assert torch.allclose(x[0].float(), good, atol=1e-4)
    assert float(log_density[0]) == pytest.approx(-math.log(2 * math.pi * 0.09), abs=1e-3)
    assert found["modes_covered"] == pytest.approx(1 / 3)
    assert found["js_target"] > 0.3
    assert found["exact_reward"] > 0.8
    assert found["best_reward_at_kl"] > found["exact_reward"]


def test_the_numbers_of_a_moved_model_are_those_of_its_samples() -> None:
    """The studies' grid, with only 40 points in each direction, agrees with random noise."""
    policy = moved(0.1, quadrature=40)
    found = {name: float(m.values[0]) for name, m in policy.measure([PROMPT]).items()}
    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x, log_model = policy.push_forward(PROMPT, noise)
    w = world(PROMPT)
    apart = log_model - known_target(PROMPT, 2, policy.settings.beta).log_density(KnownPoints.of(w, x))
    for name, values in (
        ("kl_model_target", apart),
        ("kl_base", log_model - w.base.log_density(x)),
        ("exact_reward", w.reward(x)),
        # With r = q / p, JS is the mean of (log 2 - log(1 + r)) / 2 + r (log 2 - log(1 + 1 / r)) / 2.
        (
            "js_target",
            0.5 * (math.log(2) - torch.log1p(torch.exp(-apart)))
            + 0.5 * torch.exp(-apart) * (math.log(2) - torch.log1p(torch.exp(apart))),
        ),
    ):
        error = float(values.std()) / len(values) ** 0.5
        assert found[name] == pytest.approx(float(values.mean()), abs=5 * error + 0.01 * abs(found[name])), name
    assert found["kl_base"] > 0.1


def test_the_final_error_is_that_between_modes_and_that_within_them() -> None:
    policy = moved(0.1, quadrature=40)
    found = {name: float(m.values[0]) for name, m in policy.measure([PROMPT]).items()}
    w, known = world(PROMPT), known_target(PROMPT, 2, policy.settings.beta)
    noise, weights = policy._noise()
    x, log_model = policy.push_forward(PROMPT, noise)
    log_ratio = known.log_density(KnownPoints.of(w, x)) - log_model
    mode = w.base.log_joint(x).argmax(1)
    within = 0.0
    for k in range(6):
        here = mode == k
        p, ratio = weights[here], torch.exp(log_ratio[here])
        mass, target = float(p.sum()), float((p * ratio).sum())
        # Inside the mode: p / P against q / Q, and both against their mean by P and Q.
        p_inside, q_inside = 1 / mass, ratio / target
        middle = (mass * p_inside + target * q_inside) / (mass + target)
        within += 0.5 * mass * float((p / mass * torch.log(p_inside / middle)).sum())
        within += 0.5 * target * float((p * ratio / target * torch.log(q_inside / middle)).sum())
    assert found["js_within_modes"] == pytest.approx(within, abs=2e-3)
    assert found["js_modes"] + found["js_within_modes"] == pytest.approx(found["js_target"])
    assert min(found["js_within_modes"], found["js_modes"]) > 0.01


def test_velocity_error_is_zero_at_the_optimum_and_else_the_distance() -> None:
    policy = backbone()
    flow = tilted_flow(PROMPT, 2, policy.settings.beta)

    class Optimal(torch.nn.Module):
        """The optimal velocity, plus (0.3, 0.4) at sigma 0.5."""

        def forward(self, x: torch.Tensor, sigma: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
            policy.active = False
            base = policy.velocity(x, sigma, policy.encode([PROMPT]), torch.zeros(len(x), dtype=torch.long))
            policy.active = True
            wrong = torch.tensor([0.3, 0.4]) * float(sigma[0] == 0.5)
            return flow.velocity(x.double(), float(sigma[0])).float() - base + wrong

    base = policy._velocity_errors(PROMPT)
    policy.residual = Optimal()  # type: ignore[assignment]
    found = policy._velocity_errors(PROMPT)
    assert found["velocity_error_0.5"] == pytest.approx(0.5, abs=1e-4)
    assert found["velocity_error"] == pytest.approx(0.25, abs=1e-4)  # the root of the mean square over four sigmas
    assert [found[f"velocity_error_{sigma}"] for sigma in ("0.25", "0.75", "1")] == pytest.approx([0, 0, 0], abs=1e-4)
    assert base["velocity_error"] > 0.5


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_is_a_task_of_four_prompts(name: str) -> None:
    task = load_task(name)
    assert task.train_prompts == task.eval_prompts == [f"{name} {i}" for i in range(4)]
    mixtures = [world(prompt).base for prompt in task.train_prompts]
    assert len({tuple(m.means.flatten().tolist()) for m in mixtures}) == 4
    assert all(float(m.weights.sum()) == pytest.approx(1.0) for m in mixtures)


def test_what_makes_each_scenario() -> None:
    """At the modes of the third prompt, in the order in which its rewards name them."""

    def of(name: str) -> tuple[list[float], list[float]]:
        w = world(f"{name} 2")
        order = [(j + 2) % len(w.base.means) for j in range(len(w.base.means))]
        return w.reward(w.base.means)[order].tolist(), w.base.weights[order].tolist()

    # Bumps of width 0.7 on modes 3 apart: neighbours add exp(-9.2) = 1e-4.
    assert of("equal_modes")[0] == pytest.approx([1, 0, 1, 0, 1, 0], abs=1e-3)
    assert of("unequal_modes")[0] == pytest.approx([1, 0.85, 0.7, 0.55, 0.4, 0.25], abs=1e-3)
    rewards, weights = of("rare_mode")
    assert (max(rewards), min(weights)) == pytest.approx((1.0, 0.02 / 1.02), abs=1e-3)
    assert rewards.index(max(rewards)) == weights.index(min(weights)) == 0
    rewards, weights = of("many_modes")
    assert len(rewards) == 27
    assert sum(reward > 0.99 for reward in rewards) == 9
    peak = world("narrow_peak 2").reward
    assert isinstance(peak, Bumps)
    at, aside = peak.centres[-1], peak.centres[-1] + torch.tensor([0.45, 0.0], dtype=torch.float64)
    # 1.6 at the top, next to nothing at three of its widths, and 0.002 of the broad bumps; these are half as high.
    assert [float(peak(x)) for x in (at, aside)] == pytest.approx([1.6, 1.6 * math.exp(-4.5)], abs=5e-3)
    assert of("narrow_peak")[0][::2] == pytest.approx([0.8] * 3, abs=1e-3)


def test_rewards_at_known_points() -> None:
    w = world("equal_modes 0")
    points = torch.cat([w.base.means[:2], torch.zeros(1, 2, dtype=torch.float64)])
    scores = load_scorer("scenario_reward").score(as_images(points), ["equal_modes 0"] * 3)
    # Modes 0, 2, 4 are good: at mode 0 its own bump and the tails of two others 3 sqrt 3 away; mode 1 is 3 from two of them,
    # and 6 from the third; the origin 3 from each.
    tail = [math.exp(-(d**2) / (2 * 0.7**2)) for d in (3 * 3**0.5, 3.0, 6.0)]
    assert scores == pytest.approx([1 + 2 * tail[0], 2 * tail[1] + tail[2], 3 * tail[1]], abs=1e-3)  # images' resolution


def test_noise_on_the_reward_is_a_function_of_the_point_and_has_its_deviation() -> None:
    points = as_images(world("noisy_reward 0").base.sample(4000, torch.Generator().manual_seed(0)))
    prompts = ["noisy_reward 0"] * 4000
    noisy, again = (load_scorer("scenario_reward").score(points, prompts) for _ in range(2))
    assert np.array_equal(noisy, again)
    true = load_scorer("scenario_reward", which="true_reward").score(points, prompts)
    assert (noisy - true).mean() == pytest.approx(0, abs=0.04)  # five standard errors of 0.5 over 4000
    assert (noisy - true).std() == pytest.approx(0.5, abs=0.03)


def test_the_proxy_likes_what_is_bad() -> None:
    w = world("proxy_reward 2")
    bad = w.base.means[3][None]
    assert float(w.reward(bad)[0]) > 1.2
    assert float(w.true_reward(bad)[0]) < -0.4


@pytest.mark.parametrize("prompt", ["equal_mods 1", "equal_modes", "equal_modes 4", "equal_modes one", "equal_modes -1"])
def test_prompts_of_no_world_are_refused(prompt: str) -> None:
    with pytest.raises(UserError, match="equal_mod"):
        backbone().encode([prompt])


def test_guidance_is_refused() -> None:
    with pytest.raises(UserError, match="guidance must be 1"):
        backbone(guidance=2.0)


def test_images_hold_the_points() -> None:
    latents = sample(backbone(), [PROMPT], 5, 4, seed=0)
    assert from_images(backbone().decode(latents)) == pytest.approx(latents.numpy(), abs=1.3e-4)


def test_a_policy_gradient_raises_the_reward_and_leaves_the_base(tmp_path: Path) -> None:
    config = load_config(
        preset="quick",
        options={"backbone": "gaussian_mixture", "objective": "grpo", "sampler": "independent", "iterations": 15},
        sets=[
            "save_images=false",
            "snapshots=0",
            "sampler.group_size=32",
            "threads=1",
            "backbone.quadrature=40",
            "task=unequal_modes",
        ],
    )
    metrics = run(config, tmp_path / "run").metrics
    for name in ("scenario_reward", "exact_reward", "kl_base"):
        change = metrics[name].difference  # exact, over four prompts that gain differently: an interval says little
        assert change.value is not None
        assert change.value > 0.05
