import numpy as np
import pytest
from scipy import ndimage

from alignbench import load_scorer
from evals.quality import Quality


@pytest.fixture
def quality() -> Quality:
    scorer = load_scorer("quality")
    assert isinstance(scorer, Quality)
    return scorer


def test_black_white_and_grey_by_hand(quality: Quality) -> None:
    pictures = np.stack([np.full((8, 8, 3), v, dtype=np.uint8) for v in (0, 255, 128)])
    found = quality.measure(pictures, ["x"] * 3)
    assert found["black_or_white"].tolist() == [1.0, 1.0, 0.0]
    assert found["brightness"] == pytest.approx([0.0, 1.0, 128 / 255])
    assert found["entropy"].tolist() == [0.0, 0.0, 0.0]
    assert found["sharpness"] == pytest.approx([0.0, 0.0, 0.0], abs=1e-20)


def test_half_and_half_has_one_bit_of_entropy(quality: Quality) -> None:
    picture = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    picture[:, :, 2:] = 200
    assert quality.measure(picture, ["x"])["entropy"][0] == pytest.approx(1.0)


def test_blur_lowers_sharpness(quality: Quality) -> None:
    sharp = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    blurred = ndimage.gaussian_filter(sharp, (1, 1, 0))
    values = quality.score(np.stack([sharp, blurred]), ["x"] * 2)
    assert values[1] < 0.2 * values[0]


def test_directions(quality: Quality) -> None:
    assert quality.higher_is_better("sharpness") is True
    assert quality.higher_is_better("black_or_white") is False
    assert quality.higher_is_better("brightness") is None
