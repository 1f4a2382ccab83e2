from math import log

import numpy as np
import pytest

from alignbench import UserError
from alignbench.embedded.drawing.lettering import MAX_LETTERS, Lettering, sample_lettering, sample_text
from alignbench.embedded.drawing.palette import BACKGROUNDS, nearest
from alignbench.embedded.drawing.scenes import SIZES, Scene, Shape, sample_metadata, sample_scene
from evals.detectors.lettering import find_lettering
from evals.detectors.pixels import background_of
from evals.mode_coverage import ASPECTS, ModeCoverage, Subject, coverage, drawn_extent, place, places_of, size, subject_of


@pytest.fixture
def metric() -> ModeCoverage:
    return ModeCoverage(ModeCoverage.Settings())


def test_coverage_by_hand() -> None:
    assert coverage("aaaa", 10) == 0
    assert coverage("abcd", 10) == pytest.approx(1)
    # Three and one of four images; three values are possible.
    assert coverage("aaab", 3) == pytest.approx(-(0.75 * log(0.75) + 0.25 * log(0.25)) / log(3))
    assert coverage("aabb", 2) == pytest.approx(1)
    assert np.isnan(coverage("a", 3))
    # Three values where the drawing program has two: the maximum is that of three.
    assert coverage("abc", 2) == pytest.approx(1)
    with pytest.raises(UserError, match="at least two possible"):
        coverage("ab", 1)


def test_places_and_sizes_by_hand() -> None:
    assert place({"box": [0, 0, 20, 20], "score": 1}, (60, 60)) == (0, 0)
    assert place({"box": [40, 20, 60, 40], "score": 1}, (60, 60)) == (1, 2)
    assert place({"box": [50, 50, 70, 70], "score": 1}, (60, 60)) == (2, 2)
    # A square's side is 0.88 of its diameter, on pixels: 14, 22 and 36.
    squares = Subject([], True, 6, [drawn_extent("square", d) for d in (16, 24, 40)], False, 9)
    assert squares.extents == [14, 22, 36]
    assert [size({"box": [0, 0, d, d - 4], "score": 1}, squares, 64) for d in (14, 17, 19, 28, 30)] == [0, 0, 1, 1, 2]
    assert size({"box": [0, 0, 42, 42], "score": 1}, squares, 128) == 1
    words = Subject([], True, 6, [15, 23], True, 9)
    assert [size({"box": [0, 0, 60, height], "score": 1}, words, 64) for height in (15, 18, 20, 23)] == [0, 0, 1, 1]


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


def test_the_alarm_watches_coverage_and_not_the_numbers_behind_it(metric: ModeCoverage) -> None:
    found = metric.measure(np.zeros((2, 8, 8, 3), np.uint8), None, '"A"')
    assert {name for name in found if metric.higher_is_better(name) is None} == {f"modes_{aspect}" for aspect in ASPECTS}


def test_what_the_prompt_settles_is_not_measured(metric: ModeCoverage) -> None:
    same = Scene("sky", (Shape("circle", "red", (20.0, 20.0), SIZES[1][0]),))
    found = metric.measure(drawn(same, same), None, "a red circle")
    assert np.isnan(found["coverage_color"])
    assert found["coverage_place"] == 0
    assert not np.isnan(metric.measure(drawn(same, same), None, "a circle and a red star")["coverage_color"])
    other = metric.measure(drawn(same, same), None, "a dog")
    assert np.isnan([other[f"coverage_{aspect}"] for aspect in ("color", "place", "size")]).all()
    assert other["mode_coverage"] == other["coverage_background"] == 0


def test_fresh_words_are_read_as_they_were_drawn() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        drawn = sample_lettering(rng, sample_text(rng))
        picture = drawn.draw()
        found = find_lettering(picture)
        assert found is not None
        (left, top), (x0, y0, x1, y1) = drawn.origin, found["box"]
        assert found["color"] == drawn.color
        assert nearest(background_of(picture), BACKGROUNDS) == drawn.background
        assert left <= x0 < x1 <= left + drawn.cell_width * len(drawn.text)
        # One row of air below; a round letter's outermost row can be too faint to count.
        assert top <= y0 <= top + 1
        assert drawn.height - 3 <= y1 - y0 <= drawn.height - 1


@pytest.mark.parametrize("spoil", [0, 6], ids=["clean", "noisy"])
def test_words_collapsed_and_even(metric: ModeCoverage, spoil: int) -> None:
    def word(color: str, background: str, height: int, origin: tuple[int, int]) -> np.ndarray:
        picture = Lettering("CAT", color, background, "sans", 16, height, origin).draw()
        noise = np.random.default_rng(0).normal(0, spoil, picture.shape)
        return np.clip(picture + noise, 0, 255).astype(np.uint8)

    same, other = word("red", "sky", 16, (0, 0)), word("yellow", "night", 24, (0, 40))
    collapsed = metric.measure(np.stack([same, same]), None, 'the word "CAT"')
    assert {aspect: collapsed[f"modes_{aspect}"] for aspect in ASPECTS} == dict.fromkeys(ASPECTS, 1.0)
    assert collapsed["mode_coverage"] == 0
    even = metric.measure(np.stack([same, other]), None, 'the word "CAT"')
    assert {aspect: even[f"coverage_{aspect}"] for aspect in ASPECTS} == pytest.approx(dict.fromkeys(ASPECTS, 1.0))
    assert even["mode_coverage"] == pytest.approx(1)
    # The quoted text names no colour of the letters; what stands beside it does.
    assert metric.measure(np.stack([same, other]), None, 'the word "RED"')["modes_color"] == 2
    named = metric.measure(np.stack([same, same]), None, '"CAT" in Red letters')
    assert np.isnan(named["coverage_color"])
    half = metric.measure(np.stack([same, word("red", "sky", 16, (0, 40))]), None, '"CAT" in red letters')
    # Of place, size and background one varies.
    assert half["mode_coverage"] == pytest.approx(1 / 3)


def test_the_most_that_words_can_cover_is_what_the_drawing_program_has() -> None:
    rng = np.random.default_rng(2)
    seen: dict[int, set[tuple[int, int]]] = {n: set() for n in range(2, MAX_LETTERS + 1)}
    for _ in range(400):
        drawn = sample_lettering(rng, sample_text(rng))
        found = find_lettering(drawn.draw())
        assert found is not None
        seen[len(drawn.text)].add(place(found, (64, 64)))
    # Words of three letters and more are always in the middle column.
    assert {n: len(places) for n, places in seen.items()} == {n: places_of(n) for n in seen} == {2: 9, 3: 3, 4: 3, 5: 3}
    assert places_of(MAX_LETTERS + 1) == 9
    subjects = [subject_of(drawn.draw()[None], prompt) for prompt in ('"CAT"', '"CAT" in white letters', '"CAT" in black')]
    assert [s.backgrounds for s in subjects if s is not None] == [6, 2, 4]


@pytest.mark.parametrize("value", [0, 128, 255])
def test_pictures_without_lettering_are_left_out(metric: ModeCoverage, value: int) -> None:
    assert find_lettering(np.full((1, 1, 3), value, np.uint8)) is None
    found = metric.measure(np.full((3, 64, 64, 3), value, np.uint8), None, 'the word "É"')
    assert np.isnan([found[f"coverage_{aspect}"] for aspect in ("color", "place", "size")]).all()
    assert found["coverage_background"] == 0


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
