"""The package is not installed here: what a user then reads, and that ours asks it what its documentation says."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alignbench import UserError, load_scorer
from alignbench.scorer import Scorer


def test_without_its_package_it_says_so_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(UserError, match=r"the package image-reward, which cannot be imported here .*serve-scorer") as told:
        load_scorer("imagereward").prepare()
    assert "\n" not in str(told.value)


def test_the_package_is_asked_for_each_picture_with_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []

    def load(name: str, device: str, med_config: str | None) -> Any:
        loaded.append((name, device, med_config))
        if name == "nowhere":
            raise RuntimeError("Model nowhere not found")
        return SimpleNamespace(score=lambda prompt, image: len(prompt) + image.getpixel((0, 0))[0] / 10)

    package = ModuleType("ImageReward")
    package.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    scorer: Scorer = load_scorer("imagereward", device="cpu")
    pictures: list[Image.Image | np.ndarray] = [Image.new("RGB", (4, 4), (5, 0, 0)), np.zeros((4, 4, 3), np.uint8)]
    assert scorer.score(pictures, ["abc", "x"]).tolist() == [3.5, 1.0]
    scorer.score(pictures, ["abc", "x"])
    assert loaded == [("ImageReward-v1.0", "cpu", None)]
    assert scorer.score([], []).shape == (0,)
    with pytest.raises(UserError, match="does not load 'nowhere': Model nowhere not found"):
        load_scorer("imagereward", model="nowhere", device="cpu").prepare()
