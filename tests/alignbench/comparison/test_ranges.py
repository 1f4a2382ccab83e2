import math

import pytest

from alignbench.comparison.ranges import ASPECTS, RANGES, in_range
from alignbench.statistics import Interval
from evals import mode_coverage


def test_intervals_of_attribute_metrics_stay_in_their_range() -> None:
    """Half-width 0.56 at distances 0.52 and 0.48 from the ends: 0.52 exp(-0.56 / 0.52) and 1 - 0.48 exp(-0.56 / 0.48)."""
    found = in_range("attribute_difference", Interval(0.52, -0.04, 1.08, 4))
    assert found.value == 0.52
    assert found.lower == pytest.approx(0.52 * math.exp(-0.56 / 0.52))
    assert found.upper == pytest.approx(1 - 0.48 * math.exp(-0.56 / 0.48))


def test_every_aspect_of_the_attribute_metrics_has_a_range() -> None:
    assert ASPECTS == mode_coverage.ASPECTS
    assert {f"{kind}_{aspect}" for kind in ("coverage", "difference", "modes") for aspect in ASPECTS} <= set(RANGES)
