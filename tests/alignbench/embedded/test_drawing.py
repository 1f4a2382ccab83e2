import numpy as np
import pytest

from alignbench.embedded.drawing import lettering, palette, scenes


def test_lab_of_known_colours() -> None:
    # CIE L*a*b* of sRGB white, black and red under D65.
    lab = palette.srgb_to_lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]]))
    assert lab[0] == pytest.approx([100, 0, 0], abs=0.02)
    assert lab[1] == pytest.approx([0, 0, 0], abs=1e-9)
    assert lab[2] == pytest.approx([53.24, 80.09, 67.20], abs=0.05)


def test_letters_stay_inside_the_picture_and_in_their_colours() -> None:
    rng = np.random.default_rng(0)
    for text in ("HI", "CAT", "LAMP", "QUEEN"):
        for _ in range(20):
            drawn = lettering.sample_lettering(rng, text)
            left, top = drawn.origin
            assert left >= 0
            assert left + drawn.cell_width * len(text) <= 64
            assert top + drawn.height <= 64
            assert drawn.height >= 16
            assert palette.contrast(drawn.color, drawn.background) >= lettering.MIN_CONTRAST
            assert drawn.draw().shape == (64, 64, 3)


def test_a_named_colour_is_used() -> None:
    rng = np.random.default_rng(0)
    assert {lettering.sample_lettering(rng, "OK", "red").color for _ in range(20)} == {"red"}


def test_what_a_prompt_leaves_open_varies() -> None:
    rng = np.random.default_rng(0)
    drawn = [lettering.sample_lettering(rng, "CAT") for _ in range(60)]
    assert len({d.color for d in drawn}) >= 8
    assert len({d.background for d in drawn}) == 6
    assert len({d.font for d in drawn}) == 3
    assert len({d.origin for d in drawn}) >= 8


@pytest.mark.parametrize("text", ["", "TOOLONG", "caf", "A B"])
def test_texts_that_do_not_fit_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="1 to 5 letters"):
        lettering.sample_lettering(np.random.default_rng(0), text)


def test_excluded_words_are_never_drawn() -> None:
    rng = np.random.default_rng(0)
    exclude = frozenset(a + b for a in lettering.LETTERS for b in lettering.LETTERS if a != "Q")
    two = [t for t in (lettering.sample_text(rng, exclude) for _ in range(200)) if len(t) == 2]
    assert all(t[0] == "Q" for t in two)


@pytest.mark.parametrize("tag", scenes.TASK_TYPES)
def test_scenes_show_what_their_metadata_say(tag: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        metadata = scenes.sample_metadata(rng, tag)
        scene = scenes.sample_scene(rng, metadata)
        wanted = [c["class"] for c in metadata["include"] for _ in range(c["count"])]
        assert [s.kind for s in scene.shapes] == wanted
        for clause, shape in zip(metadata["include"], scene.shapes, strict=False):
            if tag != "counting" and "color" in clause:
                assert shape.color == clause["color"]


def test_left_of_is_left() -> None:
    metadata = {
        "tag": "position",
        "include": [{"class": "star", "count": 1}, {"class": "cross", "count": 1, "position": ["left of", 0]}],
    }
    for seed in range(20):
        star, cross = scenes.sample_scene(np.random.default_rng(seed), metadata).shapes
        assert cross.center[0] < star.center[0]
        assert abs(cross.center[1] - star.center[1]) < abs(cross.center[0] - star.center[0])


def test_drawing_is_a_function_of_its_seed() -> None:
    def first(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return scenes.sample_scene(rng, scenes.sample_metadata(rng, "color_attr")).draw()

    assert np.array_equal(first(1), first(1))
    assert not np.array_equal(first(1), first(2))


def test_boxes_of_shapes_stand_on_whole_cells() -> None:
    rng = np.random.default_rng(4)
    for tag in scenes.TASK_TYPES:
        for _ in range(50):
            scene = scenes.sample_scene(rng, scenes.sample_metadata(rng, tag))
            for shape in scene.shapes:
                for center in shape.center:
                    assert (center - shape.size / 2) % 16 == 0
                    assert shape.size / 2 <= center <= 64 - shape.size / 2
