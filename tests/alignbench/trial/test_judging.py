"""A metric that sees a loss is told from one that sees pixels, from planted differences."""

from typing import Any

import numpy as np
import pytest
import torch

from alignbench.scorer import SetMetric
from alignbench.trial.judging import rankings, seen, verdicts
from alignbench.trial.measuring import DEGREES, EXACT, IMAGES, Differences, normalised_entropy
from alignbench.trial.pools import drawn_pool
from alignbench.trial.record import Verdict
from alignbench.trial.subjects import subjects


class Blind(SetMetric):
    """A metric that sees nothing of the images: noise from their indices."""

    def measure(self, images: np.ndarray, latents: Any, prompt: str) -> dict[str, float]:
        return {"blind": float(np.random.default_rng(images.sum() % 2**32).normal())}


class Sharpness(SetMetric):
    """A metric of pixels alone: the mean step between neighbours. Lower is said to be better for its second number."""

    def measure(self, images: np.ndarray, latents: Any, prompt: str) -> dict[str, float]:
        step = float(np.abs(np.diff(images.astype(float), axis=2)).mean())
        return {"sharpness": step, "softness": -step, "aside": step}

    def higher_is_better(self, metric: str) -> bool | None:
        return {"sharpness": True, "softness": False, "aside": None}[metric]


@pytest.fixture(scope="module")
def measured() -> Differences:
    differences = Differences()
    for i, subject in enumerate(subjects(9, np.random.default_rng(0))):
        pool = drawn_pool(subject, lambda images: torch.zeros(len(images), 1), np.random.default_rng([1, i]))
        differences.add(pool, {"blind": Blind(None), "sharpness": Sharpness(None)}, i, seed=0)
    return differences


@pytest.fixture(scope="module")
def judged(measured: Differences) -> dict[str, Verdict]:
    found = seen(measured, seed=0)
    return {v.metric: v for v in verdicts(measured, found, rankings(measured))}


def test_entropy_by_hand() -> None:
    assert normalised_entropy(np.array([0, 0, 1, 1]), 2) == pytest.approx(1)
    assert normalised_entropy(np.array([0, 0, 0, 1]), 6) == pytest.approx(0.5623351 / np.log(4))
    assert normalised_entropy(np.array([3, 3]), 6) == 0


def test_a_metric_without_a_direction_is_not_on_trial(measured: Differences) -> None:
    assert measured.metrics == ["blind", "sharpness", "softness", EXACT]


def test_all_degrees_and_numbers_of_images_are_measured(measured: Differences) -> None:
    keys = {(degree, n) for _, _, condition, degree, n in measured.of(EXACT) if condition == "color"}
    assert keys == {(degree, n) for degree in DEGREES for n in IMAGES}
    assert {len(measured.rows((EXACT, "drawn", name, 0.5, 4))) for name in ("font", "count")} == {3}  # of nine prompts
    assert len(measured.rows((EXACT, "drawn", "color", 0.5, 4))) == 9


def test_exact_labels_see_a_loss_and_a_metric_of_pixels_is_fooled(judged: dict[str, Verdict]) -> None:
    exact, pixels = judged[EXACT], judged["sharpness"]
    assert "everything" not in exact.blind_to
    assert not exact.fooled_by
    assert {"blur", "less contrast"} <= set(pixels.fooled_by)
    assert (exact.youden.value or 0) > 0.4 > (pixels.youden.value or 0)
    assert next(iter(judged)) == EXACT


def test_a_blind_metric_has_an_index_of_about_zero(judged: dict[str, Verdict]) -> None:
    assert judged["blind"].youden.value == pytest.approx(0, abs=0.15)
    assert judged["blind"].rightly == pytest.approx(0.5, abs=0.15)


def test_the_sign_is_turned_where_lower_is_better(judged: dict[str, Verdict]) -> None:
    assert judged["softness"].model_dump(exclude={"metric"}) == judged["sharpness"].model_dump(exclude={"metric"})


def test_the_index_is_power_minus_false_alarms(judged: dict[str, Verdict]) -> None:
    for verdict in judged.values():
        index, power, alarms = (e.value for e in (verdict.youden, verdict.power, verdict.false_alarms))
        assert index == pytest.approx((power or 0) - (alarms or 0))
        assert verdict.youden.lower is not None
        assert verdict.youden.lower <= (index or 0)


def test_metrics_are_compared_with_the_best_that_reads_images(judged: dict[str, Verdict]) -> None:
    best = next(verdict for name, verdict in judged.items() if name != EXACT)
    assert best.to_the_best.value == 0
    for verdict in judged.values():
        assert verdict.to_the_best.value == pytest.approx((verdict.youden.value or 0) - (best.youden.value or 0))
