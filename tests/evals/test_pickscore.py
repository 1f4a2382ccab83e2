from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from alignbench import UserError, load_scorer
from alignbench.embedded.drawn_pairs import KINDS, draw_pairs
from alignbench.embedded.train_pickscore import PickScoreTraining, build_model, build_processor
from evals.embedders import clip as _clip

SMALL = PickScoreTraining(vision_width=32, vision_layers=1, text_width=32, text_layers=1, projection=16)
PROMPTS = ["a red circle", 'the word "CUBE"', "a red circle", "ein grüner Stern 星"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of the class and layout of the one that ships."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    processor = build_processor()
    build_model(SMALL, processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def noise(count: int, side: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def by_the_models_own_call(folder: Path, images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """logits_per_text of a plain CLIPModel call."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).float().eval(), CLIPProcessor.from_pretrained(folder)
    pixels = processor.image_processor(images=[Image.fromarray(i) for i in images], return_tensors="pt")
    text = processor.tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        return np.asarray(model(**text, **pixels).logits_per_text.diagonal().double())


def test_the_score_is_the_models_logit_and_a_26th_is_reported_beside(folder: Path) -> None:
    images = noise(4)
    scorer = load_scorer("pickscore", model=str(folder))
    expected = by_the_models_own_call(folder, images, PROMPTS)
    measured = scorer.measure(images, PROMPTS)
    # float32 features of a few layers.
    assert measured["pickscore"] == pytest.approx(expected, abs=1e-4)
    assert measured["pickscore_over_26"] == pytest.approx(expected / 26, abs=1e-5)
    assert scorer.score(images, PROMPTS) == pytest.approx(expected, abs=1e-4)
    assert load_scorer("pickscore", model=str(folder), scale="over_26").score(images, PROMPTS) == pytest.approx(
        expected / 26, abs=1e-5
    )


def test_agreement_with_the_prompt_is_a_hundred_cosines(folder: Path) -> None:
    from transformers import CLIPModel

    images = noise(4)
    scale = float(CLIPModel.from_pretrained(folder).logit_scale.exp())
    expected = 100 * by_the_models_own_call(folder, images, PROMPTS) / scale
    # float32 features of a few layers.
    assert load_scorer("clip_agreement", model=str(folder)).score(images, PROMPTS) == pytest.approx(expected, abs=1e-3)


def test_batches_and_single_pictures_agree_and_a_prompt_is_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = load_scorer("pickscore", model=str(folder), batch=3)
    images = noise(4)
    clip = _clip.load_clip(str(folder), "auto", 3)
    encoded: list[int] = []
    own = clip.model.get_text_features

    def counted(**inputs: Any) -> Any:
        encoded.append(len(inputs["input_ids"]))
        return own(**inputs)

    monkeypatch.setattr(clip.model, "get_text_features", counted)
    together = scorer.score(images, PROMPTS)
    assert encoded == [3]
    single = [float(scorer.score(images[i : i + 1], [prompt])[0]) for i, prompt in enumerate(PROMPTS)]
    assert together == pytest.approx(single, abs=1e-4)


@pytest.mark.parametrize("wrap", [lambda features: features, lambda features: SimpleNamespace(pooler_output=features)])
def test_answers_of_transformers_4_and_5_are_read_alike(wrap: Any) -> None:
    assert _clip._unit(wrap(Tensor([[3.0, 4.0]]))).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]


def test_golden_pictures_of_any_kind_get_finite_scores(folder: Path) -> None:
    transparent = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    white = Image.new("RGB", (64, 64), "white")
    pictures = [
        Image.new("RGB", (64, 64), "black"),
        white,
        transparent,
        Image.new("L", (64, 64), 90),
        Image.new("RGB", (3000, 2000), "blue"),
        Image.new("RGB", (1, 1), "blue"),
        Image.new("RGB", (50, 3), "blue"),
        Image.fromarray(noise(1)[0]),
    ]
    scores = load_scorer("pickscore", model=str(folder)).score(pictures, ["a blue square"] * len(pictures))
    assert np.isfinite(scores).all()
    assert scores[1] == pytest.approx(scores[2], abs=1e-4)  # what is transparent shows white
    assert scores[4] == pytest.approx(scores[5], abs=1e-3)  # plain blue at any size


def test_no_pictures_and_long_prompts(folder: Path) -> None:
    scorer = load_scorer("pickscore", model=str(folder))
    assert scorer.score([], []).shape == (0,)
    assert np.isfinite(scorer.score(noise(2), ["word " * 500, ""])).all()


def test_what_is_no_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="does not open as a CLIP model"):
        load_scorer("pickscore", model=str(tmp_path)).score(noise(1), ["x"])


def test_the_one_that_ships_prefers_what_is_right_on_pictures_it_never_saw() -> None:
    pairs = draw_pairs(np.random.default_rng(7), 150, held_out=True)
    scorer, prompts = load_scorer("pickscore"), [pair.prompt for pair in pairs]
    right = scorer.score([pair.right for pair in pairs], prompts)
    wrong = scorer.score([pair.wrong for pair in pairs], prompts)
    by_kind = {kind: np.mean([r > w for r, w, p in zip(right, wrong, pairs, strict=True) if p.kind == kind]) for kind in KINDS}
    # Its card says 0.95, 0.98 and 1.00 of 500 pairs each; 50 of a share of 0.95 have a standard error of 0.03.
    assert by_kind["scene"] > 0.85
    assert by_kind["word"] > 0.9
    assert by_kind["broken"] > 0.95
    assert np.unique(right).size > 100
