from math import prod
from typing import Any, cast

import numpy as np
import pytest

from alignbench import UserError
from alignbench.embedded.drawing.scenes import Scene, Shape
from alignbench.load import load_eval
from evals.base_coverage import METRICS, BaseCoverage, prdc


def test_precision_recall_density_and_coverage_by_hand() -> None:
    real, fake = np.array([[0.0], [1], [3], [7]]), np.array([[0.5], [2], [9]])
    # Radii of the reals: 1, 1, 2, 4; of the fakes: 1.5, 1.5, 7.
    # 0.5 lies in the balls of 0 and 1; 2 in that of 3 alone, since its distance to 1 is not below 1; 9 in that of 7.
    precision, recall, density, coverage = prdc(real, fake, k=1)
    assert (precision, recall, coverage) == (1, 1, 1)
    assert density == pytest.approx(4 / 3)


def test_a_mode_that_is_lost_lowers_recall_and_coverage_not_precision() -> None:
    real = np.array([[0.0], [0.1], [0.2], [5], [5.1], [5.2]])
    fake = np.array([[0.05], [0.12], [0.18]])
    precision, recall, _, coverage = prdc(real, fake, k=1)
    assert precision == 1
    assert recall <= 0.5
    assert coverage == 0.5


def test_coverage_of_two_equal_distributions_is_the_closed_form() -> None:
    rng, n, m, k = np.random.default_rng(0), 12, 8, 3
    found = np.mean([prdc(rng.normal(size=(n, 2)), rng.normal(size=(m, 2)), k)[3] for _ in range(2000)])
    assert found == pytest.approx(1 - prod((n - i) / (m + n - i) for i in range(1, k + 1)), abs=0.01)


def test_too_few_images_have_no_number_and_are_refused_by_hand() -> None:
    with pytest.raises(UserError, match="more than 2 images in each set"):
        prdc(np.zeros((3, 1)), np.zeros((2, 1)), 2)
    with pytest.raises(UserError, match="images=3 must be above k=3"):
        load_eval("base_coverage", images=3)


def test_images_are_compared_with_the_reference_of_their_prompt() -> None:
    def circles(*colors: str) -> np.ndarray:
        return np.stack([Scene("sky", (Shape("circle", c, (8.0 + 5 * i, 32.0), 16.0),)).draw() for i, c in enumerate(colors)])

    metric = cast(BaseCoverage, load_eval("base_coverage", k=1))
    metric.take_reference("a circle", circles("red", "blue", "red", "blue", "red", "blue"), None)
    images: Any = circles("red", "red", "red")
    found = metric.measure(images, None, "a circle")
    assert set(found) == set(METRICS)
    assert found["base_precision"] == 1
    assert found["base_coverage"] < 1
    assert all(np.isnan(value) for value in metric.measure(images[:1], None, "a circle").values())
