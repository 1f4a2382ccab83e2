"""Each statistic of gradient estimates, by hand and on Gaussian estimates with a known mean."""

import math

import numpy as np
import pytest
import torch

from alignbench.diagnosis.gradient_statistics import (
    Products,
    bias_estimate,
    cosine,
    estimate,
    relative_bias,
    scale,
    signal_to_noise,
    square_of_mean,
)


def drawn(mean: list[float], std: float, count: int, seed: int = 0, dimension: int = 200) -> torch.Tensor:
    """Estimates whose mean has these first coordinates, with noise of total standard deviation `std`."""
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, dimension))) * std / math.sqrt(dimension)
    noise[:, : len(mean)] += torch.tensor(mean, dtype=torch.float64)
    return noise


def unit(dimension: int = 200) -> torch.Tensor:
    return torch.eye(dimension, dtype=torch.float64)[0]


def test_statistics_of_two_estimates_by_hand() -> None:
    found = Products.of(torch.tensor([[2.0, 1.0], [2.0, -1.0]]), torch.tensor([2.0, 0.0]))
    assert square_of_mean(found.trials) == 3.0  # the product of the two; that of their mean with itself is 4
    assert signal_to_noise(found) == pytest.approx(math.sqrt(3 / (5 - 3)))
    assert scale(found) == 1.0
    assert cosine(found) == pytest.approx(4 / math.sqrt(3 * 4))


def test_estimates_that_are_mostly_noise_show_their_mean_without_bias() -> None:
    # The mean of 100 estimates has noise of 0.2 in norm beside a signal of 0.5: its naive cosine would be 0.93.
    values = [cosine(Products.of(drawn([0.5], 2.0, 100, seed), unit())) for seed in range(60)]
    assert np.mean(values) == pytest.approx(1.0, abs=4 * np.std(values) / 60**0.5 + 0.01)
    ratios = [signal_to_noise(Products.of(drawn([0.5], 2.0, 100, seed), unit())) for seed in range(60)]
    assert np.mean(ratios) == pytest.approx(0.25, abs=0.01)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    inside = 0
    for seed in range(100):
        found = estimate(cosine, Products.of(drawn([0.3, 0.4], 1.0, 40, seed), unit()))
        assert found.lower is not None
        assert found.upper is not None
        inside += found.lower <= 0.6 <= found.upper
    assert inside >= 88  # 95 expected; three standard deviations below


def test_bias_is_the_sine_of_the_angle_whatever_the_scale() -> None:
    found = bias_estimate(Products.of(drawn([3.0, 4.0], 0.5, 60), 7 * unit()))
    assert found.value == pytest.approx(0.8, abs=0.02)
    assert found.lower is not None
    assert found.lower > 0.7
    assert scale(Products.of(drawn([3.0, 4.0], 0.0, 5), 7 * unit())) == pytest.approx(3 / 7)
    none = bias_estimate(Products.of(drawn([3.0], 0.5, 60), unit()))
    assert none.value == pytest.approx(0.0, abs=0.05)
    assert none.lower == 0.0


def test_without_noise_there_is_no_ratio_and_without_signal_no_angle() -> None:
    exact = Products.of(torch.ones(4, 3), torch.ones(3))
    assert signal_to_noise(exact) == math.inf
    assert relative_bias(exact) == pytest.approx(0.0, abs=1e-7)
    nothing = Products.of(torch.zeros(4, 3), torch.ones(3))
    assert math.isnan(cosine(nothing))
    assert estimate(cosine, nothing).value is None
    assert estimate(scale, Products.of(torch.ones(4, 3), None)).value is None
