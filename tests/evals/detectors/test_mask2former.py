"""The detector of photographs on a tiny Mask2Former and a tiny open_clip model with random weights, and on made-up answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alignbench import RunError, UserError, load_scorer
from evals.detectors import mask2former as _mask2former
from evals.detectors.mask2former import COLORS, ColorNamer, Mask2FormerDetector, _crop
from evals.embedders.open_clip import OpenClip
from evals.geneval import GenEval, self_test

LABELS = {0: "cat", 1: "mouse", 2: "cup"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6, id2label=LABELS,
        label2id={v: k for k, v in LABELS.items()},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mask2former")
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def namer() -> ColorNamer:
    import open_clip
    from open_clip.transform import image_transform

    torch.manual_seed(0)
    text = open_clip.CLIPTextCfg(context_length=77, vocab_size=49408, width=16, heads=2, layers=1)
    vision = open_clip.CLIPVisionCfg(image_size=32, patch_size=8, width=16, layers=1, head_width=8)
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    clip = OpenClip(model.eval(), image_transform(32, is_train=False), open_clip.get_tokenizer("ViT-L-14"))
    return ColorNamer(clip, torch.device("cpu"))


@pytest.fixture
def detector(folder: Path, namer: ColorNamer) -> Mask2FormerDetector:
    return Mask2FormerDetector(str(folder), namer, "cpu")


def answering(detector: Mask2FormerDetector, segments: list[tuple[int, float, tuple[int, int, int, int]]], side: int) -> None:
    """Makes the detector's post-processing answer with boxes [x0, y0, x1, y1] as masks."""
    maps = torch.zeros(len(segments), side, side)
    for i, (_, _, (x0, y0, x1, y1)) in enumerate(segments):
        maps[i, y0:y1, x0:x1] = 1
    info = [{"label_id": label, "score": score} for label, score, _ in segments]
    detector.processor = _Processor(detector.processor, [{"segmentation": maps, "segments_info": info}])


class _Processor:
    def __init__(self, own: Any, answer: Any) -> None:
        self.own, self.answer = own, answer

    def __call__(self, **inputs: Any) -> Any:
        return self.own(**inputs)

    def post_process_instance_segmentation(self, *_: Any, **__: Any) -> Any:
        return self.answer


def test_a_model_without_training_runs_end_to_end_and_fails_its_golden_pictures(detector: Mask2FormerDetector) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8)
    found = detector.detect([picture, picture[:24]])
    assert len(found) == 2
    assert found[0] == detector.detect([picture])[0]
    for kind, several in found[0].items():
        assert kind in detector.classes
        for d in several:
            assert d["color"] in COLORS
            assert 0 <= d["box"][0] < d["box"][2] <= 56
            assert 0 <= d["box"][1] < d["box"][3] <= 40
    with pytest.raises(RunError, match="fails on its golden image"):
        self_test(detector)


def test_batches_and_single_pictures_agree(folder: Path, namer: ColorNamer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mask2former, "THRESHOLD", 0.0)  # what was not trained is sure of nothing
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((40, 56), (32, 32), (40, 56), (40, 56))]
    together = Mask2FormerDetector(str(folder), namer, "cpu", batch=2).detect(pictures)
    single = Mask2FormerDetector(str(folder), namer, "cpu", batch=1)
    assert all(together)
    for picture, found in zip(pictures, together, strict=True):
        (alone,) = single.detect([picture])
        assert list(found) == list(alone)
        for kind, several in found.items():
            assert [(d["box"], d["color"]) for d in several] == [(d["box"], d["color"]) for d in alone[kind]]
            # float32 scores of a network of a few layers.
            assert [d["score"] for d in several] == pytest.approx([d["score"] for d in alone[kind]], abs=1e-5)


def test_detections_from_masks_by_hand(detector: Mask2FormerDetector) -> None:
    assert detector.classes == {"cat", "computer mouse", "cup"}
    answering(detector, [(0, 0.5, (2, 3, 10, 20)), (0, 0.95, (0, 0, 4, 4)), (1, 0.8, (5, 5, 6, 6)), (2, 0.9, (0, 0, 0, 0))], 32)
    found = detector.detect([np.zeros((32, 32, 3), np.uint8)], colored=[{"cat"}])[0]
    assert [(d["box"], d["score"]) for d in found["cat"]] == [([0, 0, 4, 4], 0.95), ([2, 3, 10, 20], 0.5)]
    assert all("color" in d for d in found["cat"])
    assert "color" not in found["computer mouse"][0]
    assert "cup" not in found  # an empty mask is no object


def test_counting_asks_for_more_certainty_and_sixteen_are_enough(detector: Mask2FormerDetector) -> None:
    answering(detector, [(0, 0.5 + i / 40, (0, 0, 4, 4)) for i in range(20)], 8)
    found = detector.detect([np.zeros((8, 8, 3), np.uint8)], colored=[()])[0]
    assert len(found["cat"]) == 16
    assert len(detector.considered(found, {"tag": "counting"})["cat"]) == 3  # 0.925, 0.95 and 0.975
    assert len(detector.considered(found, {"tag": "colors"})["cat"]) == 16


def test_the_crop_shows_grey_around_the_object() -> None:
    picture = np.full((6, 6, 3), 200, np.uint8)
    inside = np.zeros((6, 6), bool)
    inside[1, 1:4] = inside[2, 1] = True
    crop = np.asarray(_crop(picture, inside, [1, 1, 4, 3]))
    assert crop[..., 0].tolist() == [[200, 200, 200], [200, 0x99, 0x99]]


def test_colours_are_those_nearest_to_their_templates() -> None:
    class Model(torch.nn.Module):
        """Texts and images as one-hot vectors of the colour that they name or show."""

        def encode_text(self, texts: torch.Tensor) -> torch.Tensor:
            return torch.eye(len(COLORS))[texts]

        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels

    seen: list[str] = []

    def tokenizer(texts: list[str]) -> torch.Tensor:
        seen.extend(texts)
        return torch.tensor([next(i for i, c in enumerate(COLORS) if c in text) for text in texts])

    def preprocess(crop: Image.Image) -> torch.Tensor:
        return torch.eye(len(COLORS))[crop.getpixel((0, 0))[0]]  # type: ignore[index]

    namer = ColorNamer(OpenClip(Model(), preprocess, tokenizer), torch.device("cpu"))
    crops = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in (3, 0)]
    assert namer.name(crops, "bench") == ["green", "red"]
    assert namer.name([], "cup") == []
    assert seen[:3] == ["a photo of a red bench", "a photo of a red-colored bench", "a photo of a red object"]


def test_the_scorer_takes_it_by_name_and_refuses_what_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scorer = load_scorer("geneval", detector="mask2former", model=str(tmp_path))
    assert isinstance(scorer, GenEval)
    with pytest.raises(UserError, match="does not open as a Mask2Former"):
        scorer.score([Image.new("RGB", (8, 8))], ["a star"])
