import numpy as np
import pytest

from alignbench.embedded.drawing.scenes import Scene, Shape
from evals.attribute_difference import AttributeDifference, share_of_different_pairs


def test_share_of_different_pairs_by_hand() -> None:
    assert share_of_different_pairs("aaaa") == 0
    assert share_of_different_pairs("abcd") == 1
    # Of six pairs three are (a, b): a, a, a, b.
    assert share_of_different_pairs("aaab") == pytest.approx(0.5)
    # Of six pairs two are equal: a, a, b, b.
    assert share_of_different_pairs("aabb") == pytest.approx(4 / 6)
    assert np.isnan(share_of_different_pairs("a"))


def test_its_mean_does_not_depend_on_the_number_of_images() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 4, 16):
        found = np.mean([share_of_different_pairs(rng.integers(4, size=n).tolist()) for _ in range(4000)])
        assert found == pytest.approx(0.75, abs=0.02)  # 1 - 4 (1 / 4)^2; twice the standard error of n = 2 is 0.014


def test_two_scenes_that_differ_in_color_and_place_alone() -> None:
    first = Scene("sky", (Shape("circle", "red", (16.0, 16.0), 16.0),)).draw()
    second = Scene("sky", (Shape("circle", "blue", (48.0, 48.0), 16.0),)).draw()
    metric = AttributeDifference(AttributeDifference.Settings())
    found = metric.measure(np.stack([first, second]), None, "a circle")
    assert found == {
        "attribute_difference": 0.5,
        "difference_color": 1,
        "difference_place": 1,
        "difference_size": 0,
        "difference_background": 0,
    }
    named = metric.measure(np.stack([first, second]), None, "a red circle")
    assert np.isnan(named["difference_color"])
    assert named["attribute_difference"] == pytest.approx(1 / 3)
