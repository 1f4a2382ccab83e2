"""Tilted weights, best-of-n and weighted sets, against enumeration and closed forms."""

from itertools import combinations
from math import comb, exp, log

import numpy as np
import pytest

from alignbench.backbones.mixture.mixtures import Mixture
from alignbench.frontier.tilt import (
    best_of_log_weights,
    draw_sets,
    effective_sample_size,
    kl_to_base,
    set_mean,
    tilted_kl,
    tilted_log_weights,
    tilted_mean,
    weighted_mean,
)

REWARDS = np.array([0.1, 0.9, 0.4, 0.4, np.nan, 0.7])


def test_weights_are_proportional_to_exp_beta_reward() -> None:
    weights = np.exp(tilted_log_weights(REWARDS, 3.0))
    expected = [0.0 if np.isnan(r) else exp(3 * r) for r in REWARDS]
    assert weights == pytest.approx(np.array(expected) / sum(expected))


def test_beta_zero_leaves_the_base_model() -> None:
    log_weights = tilted_log_weights(REWARDS, 0.0)
    assert effective_sample_size(log_weights) == pytest.approx(5)
    assert kl_to_base(log_weights) == pytest.approx(0, abs=1e-12)
    assert weighted_mean(REWARDS, log_weights) == pytest.approx(2.5 / 5)


def test_a_huge_beta_takes_the_best_sample_alone_without_overflow() -> None:
    log_weights = tilted_log_weights(REWARDS, 1e6)
    assert weighted_mean(REWARDS, log_weights) == pytest.approx(0.9)
    assert kl_to_base(log_weights) == pytest.approx(log(5))


def test_best_of_n_is_the_mean_of_the_maximum_over_all_subsets() -> None:
    known = REWARDS[~np.isnan(REWARDS)]
    for n in range(1, 6):
        maxima = [max(subset) for subset in combinations(known, n)]
        assert weighted_mean(REWARDS, best_of_log_weights(REWARDS, n)) == pytest.approx(np.mean(maxima))
        assert np.exp(best_of_log_weights(REWARDS, n)).sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="best of 6 needs at least 6 samples, got 5"):
        best_of_log_weights(REWARDS, 6)


def test_equal_rewards_share_their_chance_of_being_the_best() -> None:
    weights = np.exp(best_of_log_weights(REWARDS, 2))
    assert weights[2] == weights[3] == pytest.approx((1 / comb(5, 2) + 2 / comb(5, 2)) / 2)


def test_sets_are_drawn_with_the_product_of_their_weights() -> None:
    log_weights = tilted_log_weights(np.array([0.0, 1.0, 0.5, 2.0, 1.5]), 1.0)
    sets = draw_sets(log_weights, 3, 40_000, np.random.default_rng(0))
    assert (np.diff(sets, axis=1) > 0).all()
    products = {s: exp(sum(log_weights[list(s)])) for s in combinations(range(5), 3)}
    drawn, counts = np.unique(sets, axis=0, return_counts=True)
    for members, count in zip(drawn, counts, strict=True):
        share = products[tuple(members)] / sum(products.values())
        assert count / 40_000 == pytest.approx(share, abs=4 * (share / 40_000) ** 0.5)
    assert len(drawn) == 10


def test_samples_without_a_weight_are_in_no_set() -> None:
    sets = draw_sets(tilted_log_weights(REWARDS, 1.0), 5, 10, np.random.default_rng(0))
    assert (sets == [0, 1, 2, 3, 5]).all()
    with pytest.raises(ValueError, match="sets of 6 need as many samples with a weight, got 5"):
        draw_sets(tilted_log_weights(REWARDS, 1.0), 6, 1, np.random.default_rng(0))


def test_the_expected_diversity_of_k_images_is_unbiased_for_each_k() -> None:
    """Three kinds of images with rewards 0, 1, 2: the chance that K images of the target show m kinds is known."""
    beta, rng = 1.0, np.random.default_rng(1)
    rewards = np.array([0.0, 1.0, 2.0])
    target = np.exp(beta * rewards) / np.exp(beta * rewards).sum()
    for k in (2, 4, 8):
        expected = sum(1 - (1 - p) ** k for p in target)  # kinds among K independent images
        estimates = []
        for _ in range(300):
            kinds = rng.integers(3, size=64)
            sets = draw_sets(tilted_log_weights(rewards[kinds], beta), k, 100, rng)
            estimates.append(set_mean(np.array([float(len(set(kinds[s]))) for s in sets]), sets))
        # Four standard errors of 300 samplings.
        assert np.mean(estimates) == pytest.approx(expected, abs=4 * np.std(estimates) / 300**0.5)


def test_tilted_samples_of_a_mixture_have_its_tilts_closed_form_reward_and_kl() -> None:
    """A quadratic reward tilts a Gaussian mixture into another one, whose reward and KL are known."""
    import torch

    from alignbench.backbones.mixture.scenarios import Quadratic

    base = Mixture(
        torch.tensor([0.6, 0.4], dtype=torch.float64),
        torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64),
        torch.tensor([0.5, 0.7], dtype=torch.float64),
    )
    reward = Quadratic(1.0, torch.tensor([0.5, 0.5], dtype=torch.float64))
    rng = np.random.default_rng(0)
    which = rng.choice(2, size=100_000, p=base.weights.numpy())
    x = base.means.numpy()[which] + base.stds.numpy()[which, None] * rng.normal(size=(100_000, 2))
    rewards = reward(torch.from_numpy(x)).numpy()
    for beta in (0.5, 2.0):
        tilted, log_z = base.tilted(beta, reward.curvature, reward.centre)
        log_weights = tilted_log_weights(rewards, beta)
        # 100,000 samples; the reward's deviation is about 1.
        assert weighted_mean(rewards, log_weights) == pytest.approx(reward.mean(tilted), abs=0.02)
        assert kl_to_base(log_weights) == pytest.approx(beta * reward.mean(tilted) - log_z, abs=0.02)


def test_the_jackknife_takes_off_the_bias_of_few_samples() -> None:
    """Rewards 0 and 1 with probability 1/2: the tilt's mean reward and KL are known, and 12 samples see neither exactly."""
    beta, rng, count = 2.0, np.random.default_rng(0), 20_000
    p = exp(beta) / (1 + exp(beta))
    kl = p * log(2 * p) + (1 - p) * log(2 * (1 - p))
    rewards = rng.integers(2, size=(count, 12)).astype(float)
    log_weights = tilted_log_weights(rewards, beta)
    plain = np.array([[weighted_mean(r, w), kl_to_base(w)] for r, w in zip(rewards, log_weights, strict=True)])
    better = np.array([[tilted_mean(r, w), tilted_kl(w)] for r, w in zip(rewards, log_weights, strict=True)])
    biases = abs(plain.mean(0) - [p, kl]), abs(better.mean(0) - [p, kl])
    assert (biases[0] > 0.005).all()
    assert biases[1][0] < 0.4 * biases[0][0]
    assert biases[1][1] < 0.9 * biases[0][1]


def test_a_sample_with_all_the_weight_is_the_mean() -> None:
    log_weights = tilted_log_weights(np.array([0.0, 1.0, 2.0]), 1e4)
    assert tilted_mean(np.array([5.0, 6.0, 7.0]), log_weights) == 7.0
    assert tilted_kl(log_weights) == pytest.approx(log(3))
