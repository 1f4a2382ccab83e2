import numpy as np
import pytest
import transformers
from PIL import Image
from torchvision.transforms.v2 import functional

from evals.embedders.clip import FOLDERS, TINY, Clip
from evals.embedders.processors import middle, torchvision


@pytest.mark.parametrize(("version", "options"), [("4.57.6", {"use_fast": True}), ("5.24.0", {}), ("40.0.0", {})])
def test_only_transformers_4_is_told(version: str, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    assert torchvision() == options


def test_pixels_are_those_of_torchvision() -> None:
    processor = transformers.CLIPProcessor.from_pretrained(FOLDERS[TINY], **torchvision()).image_processor
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    found = processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    resized = functional.resize(functional.pil_to_tensor(picture), [64, 64], interpolation=functional.InterpolationMode.BICUBIC)
    expected = functional.normalize(resized.float() / 255, processor.image_mean, processor.image_std)
    # One rounding of float32 more or less; Pillow's own resizing differs by a grey level, 0.015, here and there.
    assert (found - expected).abs().max() < 1e-5


def test_of_a_picture_of_extreme_shape_the_middle_alone_is_prepared() -> None:
    """Its features are those of the whole, which the processor would cut itself."""
    long = np.random.default_rng(0).integers(0, 256, (4, 100, 3), dtype=np.uint8)
    assert middle(long).tolist() == long[:, 18:82].tolist()
    assert middle(long.transpose(1, 0, 2)).tolist() == long.transpose(1, 0, 2)[18:82].tolist()
    assert middle(long[:, :64]).shape == (4, 64, 3)
    processor = Clip(TINY, "cpu", 1).processor.image_processor
    whole, part = (processor(images=[Image.fromarray(p)], return_tensors="pt")["pixel_values"] for p in (long, middle(long)))
    assert (whole - part).abs().max() < 0.1  # a few grey levels of 255
