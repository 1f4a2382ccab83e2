import numpy as np
import pytest
from PIL import Image

from alignbench import RunError, UserError
from alignbench.scorer import as_arrays, checked_scores


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
