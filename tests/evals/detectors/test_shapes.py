"""The detector of drawn shapes agrees with the drawing program, and makes nothing up."""

from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from alignbench.embedded.drawing.lettering import sample_lettering
from alignbench.embedded.drawing.palette import BACKGROUNDS
from alignbench.embedded.drawing.scenes import TASK_TYPES, Scene, Shape, sample_metadata, sample_scene
from evals.detectors.base import Detections
from evals.detectors.shapes import ShapesDetector
from evals.geneval import judge


def seen(detections: Detections) -> Counter[tuple[str, str]]:
    return Counter((kind, one["color"]) for kind, several in detections.items() for one in several)


def painted(scene: Scene) -> Counter[tuple[str, str]]:
    return Counter((shape.kind, shape.color) for shape in scene.shapes)


def spoiled(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    blurred = ndimage.gaussian_filter(picture.astype(np.float64), (0.7, 0.7, 0))
    return np.clip(np.round(blurred + rng.normal(0, 6, picture.shape)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("spoil", [False, True], ids=["clean", "blurred and noisy"])
def test_fresh_scenes_are_seen_as_they_were_drawn(spoil: bool) -> None:
    rng = np.random.default_rng(20)
    metadata = [sample_metadata(rng, TASK_TYPES[i % len(TASK_TYPES)]) for i in range(300)]
    scenes = [sample_scene(rng, m) for m in metadata]
    pictures = [spoiled(s.draw(), rng) if spoil else s.draw() for s in scenes]
    found = ShapesDetector().detect(pictures)
    right = [seen(d) == painted(s) and judge(d, m)[0] for d, s, m in zip(found, scenes, metadata, strict=True)]
    assert np.mean(right) >= 0.99


def test_boxes_and_order() -> None:
    scene = Scene("sky", (Shape("square", "red", (20.0, 30.0), 25.0), Shape("circle", "black", (50.0, 12.0), 16.0)))
    (found,) = ShapesDetector().detect([scene.draw()])
    # A square's half side is 0.88 of half its size: 11 pixels.
    assert found["square"][0]["box"] == pytest.approx([9, 19, 31, 41], abs=1)
    assert found["circle"][0]["box"] == pytest.approx([42, 4, 58, 20], abs=1)
    assert all(0.9 < one["score"] <= 1 for several in found.values() for one in several)


def test_the_best_of_a_class_comes_first() -> None:
    scene = Scene("grey", tuple(Shape("star", "blue", (12.0 + 20 * i, 32.0), 12.0 + 3 * i) for i in range(3)))
    picture = scene.draw().copy()
    picture[24:32, 46:50] = BACKGROUNDS["grey"]
    (found,) = ShapesDetector().detect([picture])
    scores = [one["score"] for one in found["star"]]
    assert scores == sorted(scores, reverse=True)


def test_touching_shapes_of_two_colours_are_told_apart() -> None:
    scene = Scene("grey", (Shape("circle", "red", (20.0, 32.0), 24.0), Shape("square", "blue", (42.0, 32.0), 24.0)))
    (found,) = ShapesDetector().detect([scene.draw()])
    assert seen(found) == Counter({("circle", "red"): 1, ("square", "blue"): 1})


def test_a_colour_between_two_names_is_one_object() -> None:
    picture = Scene("grey", (Shape("circle", "black", (32.0, 32.0), 30.0),)).draw()
    ink = np.where((picture == picture[32, 32]).all(axis=2)[..., None], (228, 86, 33), picture)
    noisy = np.clip(ink + np.random.default_rng(0).normal(0, 6, ink.shape), 0, 255).astype(np.uint8)
    (found,) = ShapesDetector().detect([noisy])
    assert [len(several) for several in found.values()] == [1]
    assert found["circle"][0]["color"] in ("red", "orange")


def diamond() -> np.ndarray:
    y, x = np.mgrid[:64, :64]
    return np.where((abs(x - 32) + abs(y - 32) < 18)[..., None], (200, 30, 30), BACKGROUNDS["grey"]).astype(np.uint8)


def ellipse() -> np.ndarray:
    y, x = np.mgrid[:64, :64]
    return np.where(((x - 32) ** 2 / 400 + (y - 32) ** 2 / 144 < 1)[..., None], (200, 30, 30), (196, 200, 206)).astype(np.uint8)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((64, 64, 3), np.uint8),
        np.full((64, 64, 3), 255, np.uint8),
        np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8),
        np.random.default_rng(1).normal(128, 12, (64, 64, 3)).clip(0, 255).astype(np.uint8),
        np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2),
        np.zeros((1, 1, 3), np.uint8),
        diamond(),
        ellipse(),
        sample_lettering(np.random.default_rng(0), "AWE").draw(),
    ],
    ids=["black", "white", "noise", "grain", "gradient", "one pixel", "diamond", "ellipse", "letters"],
)
def test_what_is_no_shape_is_not_found(picture: np.ndarray) -> None:
    assert ShapesDetector().detect([picture]) == [{}]


def test_a_larger_picture_is_seen_alike() -> None:
    rng = np.random.default_rng(3)
    scene = sample_scene(rng, sample_metadata(rng, "color_attr"))
    large = scene.draw().repeat(3, axis=0).repeat(3, axis=1)
    assert seen(ShapesDetector().detect([large])[0]) == painted(scene)


def test_a_batch_gives_what_single_pictures_give() -> None:
    rng = np.random.default_rng(4)
    pictures = [sample_scene(rng, sample_metadata(rng, tag)).draw() for tag in TASK_TYPES]
    detector = ShapesDetector()
    assert detector.detect(pictures) == [detector.detect([p])[0] for p in pictures]
    assert detector.detect([]) == []
