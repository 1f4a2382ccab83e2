"""The exact gradient of path divergences, by hand for Gaussian paths and against many rollouts of the toy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alignbench import Plan, Step, UserError, flow, load_backbone, rollout
from alignbench.backbone import Backbone
from alignbench.backbones.mixture.mixtures import as_images
from alignbench.backbones.mixture.scenarios import world
from alignbench.diagnosis.exact_gradient import Paths, mean_gradient
from alignbench.objective import Divergence
from alignbench.rollouts.terms import EdgeRows, edge_terms


class Drift(Backbone):
    """The velocity is a constant of two parameters, theta; that of the base model is 0.

    Of two steps, the memoryless one from sigma 1 to 0.5 leads to x' ~ N((x - theta) / 2, 0.25), and the last one to
    x' - theta / 2.
    """

    name = "drift"
    latent_shape = (2,)
    device = torch.device("cpu")
    dtype = torch.float32
    default_steps = 2

    def __init__(self, theta: Sequence[float] = (0.0, 0.0)) -> None:
        self.net = nn.ParameterList([nn.Parameter(torch.tensor(theta))])
        self.active = True

    def sigmas(self, steps: int) -> Tensor:
        return flow.sigmas(steps)

    def encode(self, prompts: Sequence[str]) -> None:
        return None

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: object, group: Tensor) -> Tensor:
        return self.net[0].expand(len(x), 2) if self.active else torch.zeros_like(x)

    def decode(self, latents: Tensor) -> np.ndarray:
        return as_images(latents)

    def trainable(self) -> nn.Module:
        return self.net

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.active = False
        try:
            yield
        finally:
            self.active = True


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_the_gradient_of_every_divergence_of_one_gaussian_step_with_a_linear_reward(alpha: float) -> None:
    theta, slope, beta, kl = torch.tensor([0.4, -0.3]), torch.tensor([1.0, 0.5], dtype=torch.float64), 0.7, 1.5
    paths = Paths(Drift(theta.tolist()), "a", 2, lambda latents: latents.double() @ slope)
    # Both the log-ratio and the reward are linear in x', so the weight exp((alpha - 1) y) moves its Gaussian by
    # (alpha - 1) (kl delta - beta slope / 4), with delta = -theta / 2; divided by (alpha - 1) that does not depend on alpha.
    # grad = (kl delta - beta slope / 4) / 0.25 * (-1 / 2) = kl theta + beta slope / 2.
    found = mean_gradient([paths], Divergence("", beta, kl, alpha), [1.0])
    assert found.tolist() == pytest.approx((kl * theta + beta * slope / 2).tolist(), rel=1e-4)
    assert abs(paths.lost) < 1e-9


def test_the_reward_counts_in_the_unit_of_the_target_and_prompts_are_averaged() -> None:
    paths = [Paths(Drift(), prompt, 2, lambda latents: latents[:, 0].double()) for prompt in "ab"]
    assert mean_gradient(paths, Divergence("", 1.0, 0.0), [2.0, 4.0]).tolist() == pytest.approx([1.5, 0.0], abs=1e-6)


def test_without_the_base_model_only_the_reward_has_a_gradient() -> None:
    """The deviations of the steps are fixed, and with them the entropy of a path."""
    paths = Paths(Drift([0.4, -0.3]), "a", 2, lambda latents: latents[:, 1].double())
    found = mean_gradient([paths], Divergence("", 2.0, relative_to_base=False), [1.0])
    assert found.tolist() == pytest.approx([0.0, 1.0], abs=1e-4)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_gradient_of_a_moved_policy_is_that_of_many_rollouts(alpha: float) -> None:
    torch.manual_seed(0)
    policy, prompt, steps, beta = load_backbone("gaussian_mixture", hidden=4), "quadratic 0", 4, 1.0
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    divergence = Divergence("", beta, alpha=alpha)
    score = world(prompt).reward
    exact = mean_gradient([Paths(policy, prompt, steps, lambda x: score(x.double()))], divergence, [1.0])

    plan = Plan((*[Step("memoryless", 1.0)] * (steps - 1), Step()), roots=1500)
    estimates = []
    for seed in range(10):
        forest = rollout(policy, [prompt], plan, seed, reduction="sum")
        rows = EdgeRows.of(forest)
        conditioning = policy.encode([prompt])
        with policy.reference():
            base = policy.velocity(rows.x, rows.sigma, conditioning, rows.group).detach()
        terms = edge_terms(rows, policy.velocity(rows.x, rows.sigma, conditioning, rows.group), base)
        y = forest.path_sum(terms["log_ratio_reference"]).detach()[0] - beta * score(forest.leaf_latents.double())
        slope = alpha - 1
        weights = y - y.mean() if slope == 0 else (len(y) * torch.softmax(slope * y, 0) - 1) / slope
        loss = (weights * forest.path_sum(terms["log_ratio"])[0]).mean()
        estimates.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))]))
    drawn = torch.stack(estimates)
    error = drawn.std(0).norm() / len(drawn) ** 0.5
    assert float((drawn.mean(0) - exact).norm()) < 2 * float(error)
    assert float(exact.norm()) > 5 * float(error)


def test_steps_too_short_for_the_grid_and_a_policy_that_leaves_it_are_refused() -> None:
    with pytest.raises(UserError, match=r"too short for the grid of an exact gradient; lower sampler\.steps"):
        Paths(Drift(), "a", 200, lambda latents: latents[:, 0].double())
    with pytest.raises(UserError, match=r"carries .*% of its states beyond \+-8, so the exact gradient is unknown"):
        Paths(Drift([40.0, 0.0]), "a", 2, lambda latents: latents[:, 0].double())
