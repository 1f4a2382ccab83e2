import numpy as np
import pytest

from alignbench.embedded.drawing.scenes import Scene, Shape
from evals.named_color import NamedColor, color_named_by


def circle(color: str) -> np.ndarray:
    return Scene("sky", (Shape("circle", color, (32.0, 32.0), 20.0),)).draw()


@pytest.mark.parametrize(
    ("prompt", "color"),
    [
        ("a photo of a red circle", "red"),
        ("a red circle and a blue star", "red"),
        ("a circle", None),
        ('the word "RED" in blue', "blue"),
        ('the word "RED"', None),
        ('"OAK" in red and blue letters', None),
        ("an essay", None),
    ],
)
def test_the_color_of_the_first_shape_or_of_the_word_is_asked_for(prompt: str, color: str | None) -> None:
    assert color_named_by(prompt) == color


def test_the_share_of_images_in_the_named_color_by_hand() -> None:
    metric = NamedColor(NamedColor.Settings(by_color=True))
    empty = np.full_like(circle("red"), 200)
    images = np.stack([circle("red"), circle("blue"), circle("red"), empty])
    # Two of four are red; the empty one is a miss and not left out.
    assert metric.measure(images, None, "a red circle") == {"named_color": 0.5, "named_color_red": 0.5}
    assert metric.measure(images, None, "a blue circle") == {"named_color": 0.25, "named_color_blue": 0.25}
    assert NamedColor(NamedColor.Settings()).measure(images, None, "a red circle") == {"named_color": 0.5}
    assert np.isnan(metric.measure(images, None, "a circle")["named_color"])
    assert metric.higher_is_better("named_color") is True
    assert metric.higher_is_better("named_color_red") is None
