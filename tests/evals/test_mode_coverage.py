from math import log

import numpy as np
import pytest

from alignbench import UserError
from alignbench.drawing.scenes import SIZES, Scene, Shape, sample_metadata, sample_scene
from evals.mode_coverage import ASPECTS, ModeCoverage, coverage, place, size


@pytest.fixture
def metric() -> ModeCoverage:
    return ModeCoverage(ModeCoverage.Settings())


def test_coverage_by_hand() -> None:
    assert coverage("aaaa", 10) == 0
    assert coverage("abcd", 10) == pytest.approx(1)
    # Three and one of four pictures; three values are possible.
    assert coverage("aaab", 3) == pytest.approx(-(0.75 * log(0.75) + 0.25 * log(0.25)) / log(3))
    assert coverage("aabb", 2) == pytest.approx(1)
    assert np.isnan(coverage("a", 3))
    with pytest.raises(UserError, match="at least two possible"):
        coverage("ab", 1)


def test_places_and_sizes_by_hand() -> None:
    assert place({"box": [0, 0, 20, 20], "score": 1}, (60, 60)) == (0, 0)
    assert place({"box": [40, 20, 60, 40], "score": 1}, (60, 60)) == (1, 2)
    assert place({"box": [50, 50, 70, 70], "score": 1}, (60, 60)) == (2, 2)
    # A square's side is 0.88 of its diameter, on pixels: 14, 22 and 36.
    sides = [size({"box": [0, 0, d, d - 4], "score": 1}, "square", [16, 24, 40], 64) for d in (14, 17, 19, 28, 30)]
    assert sides == [0, 0, 1, 1, 2]
    assert size({"box": [0, 0, 42, 42], "score": 1}, "square", [16, 24, 40], 128) == 1


def drawn(*scenes: Scene) -> np.ndarray:
    return np.stack([scene.draw() for scene in scenes])


def test_a_collapsed_prompt_covers_nothing_and_an_even_one_all(metric: ModeCoverage) -> None:
    small, large = SIZES[1][0], SIZES[1][-1]
    same = Scene("sky", (Shape("circle", "red", (20.0, 20.0), small),))
    other = Scene("night", (Shape("circle", "yellow", (40.0, 40.0), large),))
    collapsed = metric.measure(drawn(same, same, same), None, "a circle")
    assert {aspect: collapsed[f"coverage_{aspect}"] for aspect in ASPECTS} == dict.fromkeys(ASPECTS, 0.0)
    assert {aspect: collapsed[f"modes_{aspect}"] for aspect in ASPECTS} == dict.fromkeys(ASPECTS, 1.0)
    even = metric.measure(drawn(same, other), None, "a circle")
    assert {aspect: even[f"coverage_{aspect}"] for aspect in ASPECTS} == pytest.approx(dict.fromkeys(ASPECTS, 1.0))
    assert {aspect: even[f"modes_{aspect}"] for aspect in ASPECTS} == dict.fromkeys(ASPECTS, 2.0)


def test_what_the_prompt_settles_is_not_measured(metric: ModeCoverage) -> None:
    same = Scene("sky", (Shape("circle", "red", (20.0, 20.0), SIZES[1][0]),))
    found = metric.measure(drawn(same, same), None, "a red circle")
    assert np.isnan(found["coverage_color"])
    assert found["coverage_place"] == 0
    word = metric.measure(drawn(same, same), None, 'the word "É"')
    assert np.isnan([word[f"coverage_{aspect}"] for aspect in ("color", "place", "size")]).all()
    assert word["coverage_background"] == 0


def test_pictures_without_the_shape_are_left_out_and_the_metrics_stay_the_same(metric: ModeCoverage) -> None:
    same = Scene("sky", (Shape("circle", "red", (20.0, 20.0), SIZES[1][0]),))
    found = metric.measure(drawn(same, Scene("sky", ())), None, "a circle")
    assert np.isnan(found["coverage_place"])
    assert found["modes_place"] == 1
    black = metric.measure(np.zeros((2, 64, 64, 3), np.uint8), None, "a circle")
    assert set(black) == set(found)
    assert np.isnan(black["modes_place"])


def test_the_drawing_programs_own_pictures_are_covered_well(metric: ModeCoverage) -> None:
    rng = np.random.default_rng(0)
    metadata = {**sample_metadata(rng, "single_object"), "prompt": "a star", "include": [{"class": "star", "count": 1}]}
    found = metric.measure(drawn(*(sample_scene(rng, metadata) for _ in range(40))), None, "a star")
    # Drawn evenly over ten colours, six backgrounds and the sizes; places are drawn by size and lie in the middle more often.
    for aspect in ASPECTS:
        assert found[f"coverage_{aspect}"] > 0.75, aspect
