"""Log-likelihoods estimated from final images: by hand, as log-densities, and in every objective on paths."""

from statistics import mean, pstdev
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignbench import Objective, RolloutForest, UserError, load_objective, load_sampler, rollout
from alignbench.config.run_config import ElboConfig
from alignbench.objective import with_elbo
from alignbench.rollouts.elbo import elbo_forest, elbo_rows, elbo_terms
from alignbench.rollouts.terms import Velocities
from alignbench.training.engine import backward
from tests.support.final_images import forest_of, gaussian_velocity
from tests.support.replays import REWARDS, TRAINING, by_autograd, check, drawn, plan_of
from tests.support.toys import PROMPTS, ToyBackbone, two_groups_of_three

ON_PATHS = [name for name in TRAINING if load_objective(name).on_paths and not load_objective(name).needs_steps]
PLAIN: dict[str, dict[str, Any]] = {"gardo": {"step_weight": "none", "kl": "exact"}}
"""Settings without a meaning for the steps of a path."""


def elbo(name: str, options: dict[str, Any] | None = None, **settings: Any) -> Objective:
    return with_elbo(load_objective(name, **PLAIN.get(name, {}), **settings), ElboConfig(**(options or {})))


@pytest.fixture
def forest() -> RolloutForest:
    return two_groups_of_three(ToyBackbone(), [0.0, 1.0, 2.0, 0.3, 0.3, 0.3])


def random_like(x: Tensor, *seeds: int) -> list[Tensor]:
    return [torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def test_images_of_a_prompt_share_their_pairs_whose_sigmas_fall(forest: RolloutForest) -> None:
    rows = elbo_rows(forest, ElboConfig(draws=3))
    assert rows.leaf.tolist() == [leaf for leaf in range(6) for _ in range(3)]
    sigma, noise = rows.sigma.view(2, 3, 3), rows.noise.view(2, 3, 3, -1)
    # Three draws from three steps, each once.
    assert sigma.flatten(0, 1).tolist() == [pytest.approx([1.0, 0.8, 0.5])] * 6
    assert (noise == noise[:, :1]).all()
    assert not torch.equal(noise[0, 0], noise[1, 0])
    own = elbo_rows(forest, ElboConfig(draws=3, shared=False, times="schedule")).sigma
    assert len(own.unique()) == 18
    assert (own.view(6, 3).diff(dim=1) < 0).all()


def test_the_forest_has_a_path_of_the_same_sigmas_for_each_image(forest: RolloutForest) -> None:
    options = ElboConfig(draws=4, times="uniform", shared=False)
    seen, rows = elbo_forest(forest, options), elbo_rows(forest, options)
    assert seen.leaf_edges.tolist() == [[4 * leaf + j for j in range(4)] for leaf in range(6)]
    assert torch.equal(seen.edge_sigma, rows.sigma)
    assert torch.equal(seen.edge_group, rows.group)
    assert torch.equal(seen.states[seen.edge_child], rows.x0)
    assert (seen.groups, seen.group_size) == (2, 3)


@pytest.mark.parametrize("weight", ["adaptive", "uniform", "image", "exact"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_terms_by_hand(forest: RolloutForest, weight: Any, reduction: Any) -> None:
    forest.reduction = reduction
    rows = elbo_rows(forest, ElboConfig(draws=2, weight=weight, times="uniform"))
    v, old, reference = random_like(rows.x, 0, 1, 2)
    found = elbo_terms(rows, Velocities(v, reference, old))
    for n in range(len(rows)):
        s, target = float(rows.sigma[n]), rows.noise[n] - rows.x0[n]
        w = {
            "adaptive": s / float((old[n] - target).abs().mean()),
            "uniform": 1.0,
            "image": s * s,
            "exact": (1 - s) / (s + 1e-3),
        }

        def f(velocity: Tensor, about: Tensor = target, weight: float = w[weight]) -> float:
            squares = (velocity - about) ** 2
            return -weight / 2 * float(squares.mean() if reduction == "mean" else squares.sum())

        expected = {
            "log_prob": f(v[n]),
            "log_ratio": f(v[n]) - f(old[n]),
            "log_prob_reference": f(reference[n]),
            "log_ratio_reference": f(v[n]) - f(reference[n]),
            "kl": -f(v[n], reference[n]),
            "kl_behaviour": -f(v[n], old[n]),
            "drift_noise": f(v[n]) - f(old[n]) - f(v[n], old[n]),
        }
        assert {name: float(value[n]) for name, value in found.items()} == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_the_regulated_log_ratio_has_mean_zero_and_the_kl_is_a_mean_log_ratio() -> None:
    """For an exact behaviour policy, the model of N(0.5, 1), and any other velocity."""
    x0 = 0.5 + torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0))
    rows = elbo_rows(forest_of(x0, x0[:, 0]), ElboConfig(draws=1, times="uniform", weight="uniform", shared=False))
    old = gaussian_velocity(rows.x, rows.sigma, 0.5)
    terms = elbo_terms(rows, Velocities(old + 0.2 * rows.x, old - 0.3, old))
    for name, expected in (("drift_noise", 0.0), ("log_ratio", -float(terms["kl_behaviour"].mean()))):
        error = float(terms[name].std()) / len(rows) ** 0.5
        assert float(terms[name].mean()) == pytest.approx(expected, abs=4 * error)
    at_policy = elbo_terms(rows, Velocities(old, old - 0.3, old))
    error = float(at_policy["log_ratio_reference"].std()) / len(rows) ** 0.5
    assert float(at_policy["log_ratio_reference"].mean()) == pytest.approx(0.09, abs=4 * error)
    assert float(at_policy["kl"].mean()) == pytest.approx(0.09, rel=1e-4)


def test_with_the_exact_weight_differences_are_those_of_a_log_density() -> None:
    """For N(0, 2): log p(x) - log p(0) = -x^2 / 4. With the weight 1 it would be another multiple of x^2."""
    x0 = torch.tensor([[0.0], [1.0], [-2.0]])
    made = forest_of(x0, torch.arange(3.0))
    made.reduction = "sum"
    found = {}
    for weight in ("exact", "uniform"):
        options = ElboConfig(draws=40_000, weight=weight, times="uniform")
        rows, seen = elbo_rows(made, options), elbo_forest(made, options)
        v = gaussian_velocity(rows.x, rows.sigma, variance=2.0)
        f = seen.path_sum(elbo_terms(rows, Velocities(v, None, v))["log_prob"])[0]
        found[weight] = [float(f[1] - f[0]), float(f[2] - f[0])]
    assert found["exact"] == pytest.approx([-0.25, -1.0], rel=0.03)  # the Monte Carlo error
    assert abs(found["uniform"][1] / -1.0 - 1) > 0.1


def test_grpos_first_gradient_is_the_advantage_times_that_of_the_weighted_error(forest: RolloutForest) -> None:
    objective = elbo("grpo", {"draws": 2, "shared": False})
    rows: Any = objective.rows(forest, 0)
    (v,) = random_like(rows.x, 3)
    at = v.clone().requires_grad_()
    objective.loss(objective.terms(rows, Velocities(at, None, v)), forest).backward()
    error, sigma = v - rows.noise + rows.x0, rows.sigma.view(-1, 1, 1, 1)
    a = torch.tensor([-(1.5**0.5), 0.0, 1.5**0.5, 0.0, 0.0, 0.0])[rows.leaf].view(-1, 1, 1, 1)
    weight = sigma / error.abs().mean((1, 2, 3), keepdim=True)
    assert at.grad is not None
    # Mean over rows; the weight of a row is half, since two add up to a log-likelihood.
    assert torch.allclose(at.grad, a * weight * 2 * error / error[0].numel() / 2 / len(rows), atol=1e-6)


@pytest.mark.parametrize("ratio", ["plain", "path"])
def test_grpo_with_a_kl_penalty_equals_a_second_implementation(ratio: str) -> None:
    """The ratio `path` is that of V-GRPO: the errors of an image are averaged before the exponential."""
    toy, behaviour, forest = drawn(plan_of("independent"))
    objective = elbo("grpo", {"draws": 3, "weight": "image"}, clip=0.01, kl_beta=0.3, ratio=ratio)
    rows: Any = objective.rows(forest, 1)
    changes: list[list[Tensor]] = [[] for _ in forest.leaves]
    kl = torch.zeros(())
    for n in range(len(rows)):
        leaf = int(rows.leaf[n])
        s, image = rows.sigma[n], forest.states[forest.leaves[leaf]]
        at = ((1 - s) * image + s * rows.noise[n])[None], s[None], toy.encode([PROMPTS[leaf // 4]])
        v, old, reference = toy.net(*at)[0], behaviour(*at)[0].detach(), toy.frozen(*at)[0].detach()
        f, f_old = (-(s**2) * ((each - rows.noise[n] + image) ** 2).mean() / 3 for each in (v, old))
        changes[leaf].append(f - f_old)
        kl = kl + s**2 * ((v - reference) ** 2).mean() / 3 / len(rows)
    loss, clipped = 0.3 * kl, 0
    for leaf, change in enumerate(changes):
        g, k = divmod(leaf, 4)
        a = (REWARDS[g][k] - mean(REWARDS[g])) / pstdev(REWARDS[g])
        for log_ratio in change if ratio == "plain" else [sum(change)]:
            r = torch.exp(torch.as_tensor(log_ratio))
            both = -a * r, -a * r.clamp(0.99, 1.01)
            clipped += int(abs(float(r.detach()) - 1) > 0.01)
            loss = loss + torch.maximum(*both) / 8 / (3 if ratio == "plain" else 1)
    assert clipped > 0
    check(toy, objective, forest, *by_autograd(toy, loss), update=1, old=[p.detach() for p in behaviour.parameters()])


@pytest.mark.parametrize("name", ON_PATHS)
@pytest.mark.parametrize("sampler", ["independent", "dynamic_tree"])
def test_gradient_caching_is_autograd_for_every_objective_on_paths(name: str, sampler: str) -> None:
    toy, behaviour, forest = drawn(plan_of(sampler))
    old, gradients = [p.detach() for p in behaviour.parameters()], []
    for micro_batch in (None, 1, 3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            objective = elbo(name)
            objective.prepare(toy.latent_shape, toy.device)
        parameters = [*toy.parameters(), *objective.parameters()]
        for parameter in parameters:
            parameter.grad = None
        objective.observe(forest)
        found = backward(toy, objective, forest, update=1, micro_batch=micro_batch, behaviour=old)
        assert found.rows == len(forest.leaves) * 4
        gradients.append(torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]))
    size = float(gradients[0].abs().max())
    assert size > 0
    for gradient in gradients[1:]:
        assert float((gradient - gradients[0]).abs().max()) < 1e-5 * max(size, 1.0)


@pytest.mark.parametrize("name", ON_PATHS)
def test_without_noise_the_first_ratio_is_one_and_the_gradient_is_not_zero(name: str) -> None:
    plan = load_sampler("independent", steps=4, group_size=4, stochastic_share=0).plan(0.0, np.random.default_rng(0))
    toy = ToyBackbone()
    forest = rollout(toy, PROMPTS, plan, seed=0)
    forest.rewards = torch.tensor(REWARDS).flatten()
    forest.scores, forest.weights = {"main": forest.rewards}, {"main": 1.0}
    objective = elbo(name)
    objective.prepare(toy.latent_shape, toy.device)
    objective.observe(forest)
    found = backward(toy, objective, forest, on_policy=True)
    assert not found.terms["log_ratio"].any()
    assert float(toy.gradient().norm()) > 0


def test_images_that_are_not_trained_on_cost_no_row(forest: RolloutForest) -> None:
    forest.rewards[:3] = torch.tensor([0.0, 1.0, 2.0])  # the middle one and the second group have the advantage 0
    toy = ToyBackbone()
    toy.nudge(0.1)
    old = [p.detach().clone() for p in ToyBackbone().parameters()]
    gradients = []
    for zero_advantage, rows in (("keep", 24), ("drop", 8)):
        for parameter in toy.parameters():
            parameter.grad = None
        found = backward(toy, elbo("grpo", zero_advantage=zero_advantage), forest, update=1, behaviour=old)
        assert found.rows == rows
        gradients.append(toy.gradient())
    assert torch.allclose(gradients[1], 3 * gradients[0], atol=1e-6)  # means over 2 and 6 images


def test_what_needs_the_steps_of_a_path_is_refused_in_a_sentence() -> None:
    with pytest.raises(
        UserError, match="objective subtb relates the steps of a path to each other, and likelihood=elbo has none"
    ):
        elbo("subtb")
    with pytest.raises(UserError, match="credit=edge has a meaning only for the steps of a path"):
        elbo("grpo", credit="edge")


def test_an_objective_on_final_images_stays_as_it_is() -> None:
    nft = load_objective("nft")
    assert with_elbo(nft, ElboConfig()) is nft


def test_tempered_vargrads_zero_is_the_tilted_distribution_of_images() -> None:
    """With exact weights vargrad's imbalance vanishes at the tilted target: N(0,1) exp(x / 2) is N(1/2, 1)."""
    x0 = torch.tensor([[-1.0], [0.0], [0.5], [2.0]])
    made = forest_of(x0, x0[:, 0])
    made.reduction = "sum"
    objective = elbo("vargrad", {"draws": 40_000, "weight": "exact", "times": "uniform"}, beta=0.5, reward_scale="raw")
    rows: Any = objective.rows(made, 0)
    reference = gaussian_velocity(rows.x, rows.sigma)
    losses = []
    for m in (0.0, 0.5):
        v = gaussian_velocity(rows.x, rows.sigma, m)
        losses.append(float(objective.loss(objective.terms(rows, Velocities(v, reference, v)), made)))
    assert losses[0] == pytest.approx(float((0.5 * x0).var(correction=0)), rel=0.02)
    assert losses[1] < 1e-3 * losses[0]
