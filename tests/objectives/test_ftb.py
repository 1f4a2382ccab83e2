"""f-TB by hand, by autograd and by its limits."""

import math
from dataclasses import replace

import pytest
import torch

from alignbench import RolloutForest, load_objective
from tests.support.replays import two_splits

Y = torch.tensor([0.3, -1.2, 0.8, 2.0])


@pytest.fixture
def forest() -> RolloutForest:
    return two_splits([0.0, 1.0, 2.0, 3.0], [5.0] * 4)


def terms_of(forest: RolloutForest, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Terms by which leaf i of the first group has the path log-ratio y_i; the last edge belongs to its leaf alone."""
    log_ratio = torch.zeros_like(forest.old_log_prob)
    log_ratio[forest.leaf_edges[:4, 1]] = y
    return {"log_prob": log_ratio, "log_prob_reference": torch.zeros_like(log_ratio), "log_ratio_reference": log_ratio}


def by_hand(y: torch.Tensor, alpha: float) -> float:
    """min over C of the mean of L_alpha(y + C), by a fine search over C."""
    constants = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    t = y.double()[None] + constants[:, None]
    a = alpha - 1
    values = t**2 / 2 if a == 0 else (torch.exp(a * t) - 1) / a**2 - t / a
    return float(values.mean(1).min())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.75, 1.0, 1.2, 2.0])
def test_the_loss_is_the_divergence_at_the_best_log_z(forest: RolloutForest, alpha: float) -> None:
    loss = load_objective("ftb", beta=0.0, alpha=alpha).loss(terms_of(forest, Y), forest)
    # The search over C is fine to 1e-4, which enters squared; float32 over (alpha - 1)^2 = 0.04 at the least.
    assert float(loss) == pytest.approx(by_hand(Y, alpha), abs=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.75, 2.0])
def test_the_gradient_is_a_softmax_minus_one_over_k(forest: RolloutForest, alpha: float) -> None:
    y = Y.clone().requires_grad_()
    load_objective("ftb", beta=0.0, alpha=alpha).loss(terms_of(forest, y), forest).backward()
    expected = (torch.softmax((alpha - 1) * Y, 0) - 1 / 4) / (alpha - 1)
    assert y.grad is not None
    assert torch.allclose(y.grad, expected, atol=1e-6)


def test_at_alpha_one_it_is_half_of_vargrad(forest: RolloutForest) -> None:
    y = Y.clone().requires_grad_()
    own = load_objective("ftb", beta=1.5, alpha=1.0).loss(terms_of(forest, y), forest)
    other = load_objective("vargrad", beta=1.5).loss(terms_of(forest, y), forest)
    assert own.item() == pytest.approx(other.item() / 2)
    gradients = [torch.autograd.grad(loss, y, retain_graph=True)[0] for loss in (own, other)]
    assert torch.allclose(2 * gradients[0], gradients[1], atol=1e-6)


def test_alphas_near_one_pass_into_the_variance(forest: RolloutForest) -> None:
    losses = [float(load_objective("ftb", beta=0.0, alpha=a).loss(terms_of(forest, Y), forest)) for a in (0.99, 1.0, 1.01)]
    # The third cumulant enters with 0.01 / 6.
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[2] == pytest.approx(losses[1], rel=0.02)


def test_it_is_zero_on_the_target_whatever_alpha(forest: RolloutForest) -> None:
    z = torch.tensor([-3.0, -1.0, 1.0, 3.0]) / 5**0.5
    for alpha in (0.0, 0.75, 1.0, 2.0):
        loss = load_objective("ftb", beta=2.0, alpha=alpha).loss(terms_of(forest, 2 * z + 0.7), forest)
        assert float(loss) == pytest.approx(0.0, abs=1e-6)


def test_a_missed_leaf_weighs_more_the_smaller_alpha(forest: RolloutForest) -> None:
    missed, sizes = torch.tensor([-0.6, 0.1, 0.2, 0.3]), []
    for alpha in (0.0, 0.5, 0.75, 1.0, 1.2):
        y = missed.clone().requires_grad_()
        load_objective("ftb", beta=0.0, alpha=alpha).loss(terms_of(forest, y), forest).backward()
        assert y.grad is not None
        sizes.append(float(-y.grad[0]))  # above 0: its path is made more likely
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] > 0


def test_sharpness_tempers_the_exponential(forest: RolloutForest) -> None:
    loss = load_objective("ftb", beta=0.0, alpha=0.5, sharpness=0.25).loss(terms_of(forest, Y), forest)
    assert float(loss) == pytest.approx(by_hand(0.25 * Y, 0.5) / 0.25**2, abs=1e-5)


def test_alpha_is_annealed_over_the_training(forest: RolloutForest) -> None:
    objective = load_objective("ftb", alpha=0.75, alpha_end=1.25, beta=0.0)
    late = replace(forest, progress=0.5)
    assert objective.diagnostics(terms_of(forest, Y), late)["alpha"] == pytest.approx(1.0)
    assert float(objective.loss(terms_of(forest, Y), late)) == pytest.approx(float(Y.var(correction=0)) / 2)


def test_path_log_ratios_that_overflow_an_exponential_do_not_overflow_the_loss(forest: RolloutForest) -> None:
    y = (200 * Y).requires_grad_()
    loss = load_objective("ftb", beta=0.0, alpha=0.5).loss(terms_of(forest, y), forest)
    loss.backward()
    assert math.isfinite(loss.item())
    assert y.grad is not None
    assert bool(torch.isfinite(y.grad).all())


def test_without_a_reward_that_differs_nothing_is_learnt(forest: RolloutForest) -> None:
    forest.rewards = torch.full((8,), 0.5)
    y = Y.clone().requires_grad_()
    loss = load_objective("ftb").loss(terms_of(forest, y), forest)
    loss.backward()
    assert loss.item() == 0.0
    assert y.grad is not None
    assert torch.equal(y.grad, torch.zeros(4))
