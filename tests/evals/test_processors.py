import numpy as np
import pytest
import transformers
from PIL import Image
from torchvision.transforms.v2 import functional

from evals._clip import FOLDERS, TINY
from evals._processors import torchvision


@pytest.mark.parametrize(("version", "options"), [("4.57.6", {"use_fast": True}), ("5.24.0", {}), ("40.0.0", {})])
def test_only_transformers_4_is_told(version: str, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    assert torchvision() == options


def test_pixels_are_those_of_torchvision() -> None:
    processor = transformers.CLIPProcessor.from_pretrained(FOLDERS[TINY], **torchvision()).image_processor
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    found = processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    resized = functional.resize(functional.pil_to_tensor(picture), [64, 64], interpolation=functional.InterpolationMode.BICUBIC)
    expected = functional.normalize(resized.float() / 255, processor.image_mean, processor.image_std)
    # One rounding of float32 more or less; Pillow's own resizing differs by a grey level, 0.015, here and there.
    assert (found - expected).abs().max() < 1e-5
