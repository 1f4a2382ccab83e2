from typing import Any

import numpy as np
import pytest
from PIL import Image

from alignbench import RunError, UserError
from alignbench.scorer import (
    SetMetric,
    as_arrays,
    checked_scores,
    frames_in,
    measure_set,
    measure_sets,
    of_frames,
    read_sets,
)
from tests.support.plugins import Brightness


def test_transparent_pixels_are_white_and_grey_ones_repeated() -> None:
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    assert as_arrays([clear])[0].tolist() == [[[255, 255, 255]] * 2]
    assert as_arrays([Image.new("L", (1, 1), 7)])[0].tolist() == [[[7, 7, 7]]]


def test_an_array_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(UserError, match="uint8"):
        as_arrays(np.zeros((1, 4, 4, 3)))
    with pytest.raises(UserError, match="uint8"):
        as_arrays(np.zeros((4, 4, 3), dtype=np.uint8))
    with pytest.raises(UserError, match=r"got one of uint8 \[0, 4, 3\]"):
        as_arrays([np.zeros((0, 4, 3), dtype=np.uint8)])
    with pytest.raises(UserError, match="an image cannot be scored: its floats are not all in"):
        as_arrays([Image.fromarray(np.full((2, 2), 255, dtype=np.float32))])


def test_nan_is_a_score_and_infinity_is_not() -> None:
    assert np.isnan(checked_scores([1.0, np.nan], 2, "s")[1])
    with pytest.raises(RunError, match="infinite score for image 1"):
        checked_scores([1.0, np.inf], 2, "s")


def test_too_few_scores_stop_the_run() -> None:
    with pytest.raises(RunError, match=r"returned scores of shape \[1\] for 2 images"):
        checked_scores([1.0], 2, "s")


CLIPS = np.zeros((2, 3, 1, 1, 3), dtype=np.uint8)
"""Two clips of three frames of one pixel."""
CLIPS[0, :, 0, 0] = [[0], [51], [255]]
CLIPS[1, :, 0, 0] = [[102], [102], [153]]


class Range(SetMetric):
    """The difference between the brightest and the darkest image of a prompt, 0 to 1; NaN where one of them is white."""

    def measure(self, images: np.ndarray, latents: Any, prompt: str) -> dict[str, float]:
        values = images.reshape(len(images), -1).mean(1) / 255
        return {"range": float("nan") if values.max() == 1 else float(np.ptp(values))}


class WholeClips(Range):
    clips = True


def test_the_score_of_a_clip_is_the_mean_over_its_frames() -> None:
    asked: list[str] = []
    scorer = Brightness(Brightness.Settings())

    def score(images: Any, prompts: Any) -> np.ndarray:
        asked.extend(prompts)
        return scorer.score(images, prompts)

    answered = of_frames(score, CLIPS, ["a", "b"])
    assert asked == ["a", "a", "a", "b", "b", "b"]
    assert frames_in(CLIPS) == 3
    # (0 + 0.2 + 1) / 3 and (0.4 + 0.4 + 0.6) / 3.
    assert checked_scores(answered, 2, "s", frames=3).tolist() == pytest.approx([0.4, 1.4 / 3])


def test_images_are_scored_as_they_are() -> None:
    images = [CLIPS[0, 1], CLIPS[1, 2]]
    assert frames_in(images) == frames_in(np.stack(images)) == 1
    scorer = Brightness(Brightness.Settings())
    assert of_frames(scorer.score, np.stack(images), ["a", "b"]).tolist() == pytest.approx([0.2, 0.6])


def test_a_clip_with_a_frame_that_has_no_score_has_none() -> None:
    found = checked_scores([0.5, np.nan, 0.25, 0.75], 2, "s", frames=2)
    assert np.isnan(found[0])
    assert found[1] == 0.5
    with pytest.raises(RunError, match=r"returned scores of shape \[2\] for 4 images"):
        checked_scores([0.5, 0.5], 2, "s", frames=2)


def test_sets_of_clips_are_measured_frame_by_frame_or_as_a_whole() -> None:
    # Frames: |0 - 0.4|, |0.2 - 0.4|; the third ones have no number, for one of them is white.
    by_frame, whole = Range(Range.Settings()), WholeClips(WholeClips.Settings())
    assert measure_set(by_frame, CLIPS[:, :2], None, "x") == {"range": pytest.approx(0.3)}
    assert np.isnan(measure_set(by_frame, CLIPS, None, "x")["range"])
    # Means of the two frames: 0.1 and 0.4.
    assert measure_set(whole, CLIPS[:, :2], None, "x") == {"range": pytest.approx(0.3)}
    assert measure_set(whole, CLIPS, None, "x") == {"range": pytest.approx(1.4 / 3 - 0.4)}


def test_clips_that_were_read_once_are_measured_alike() -> None:
    for metric in (Range(Range.Settings()), WholeClips(WholeClips.Settings())):
        read = read_sets(metric, CLIPS[:, :2], None, "x")
        assert len(read) == (1 if metric.clips else 2)
        assert measure_sets(metric, read, [0, 1], "x") == measure_set(metric, CLIPS[:, :2], None, "x")
        assert measure_sets(metric, read, [0, 0], "x") == {"range": 0.0}
