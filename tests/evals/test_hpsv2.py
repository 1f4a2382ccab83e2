"""HPSv2's class of model, an open_clip CLIP from a checkpoint in its layout, with random weights."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional

from alignbench import UserError, load_scorer

PROMPTS = ["a red circle", "a blue star", "a red circle"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as HPSv2's, for an architecture `tiny-clip` that open_clip then knows."""
    folder = tmp_path_factory.mktemp("hps")
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (folder / "tiny-clip.json").write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    torch.save({"state_dict": open_clip.create_model("tiny-clip").state_dict()}, folder / "hps.pt")
    return folder / "hps.pt"


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 40, 40, 3)).astype(np.uint8)


def test_the_score_is_the_cosine_of_the_checkpoints_own_embeddings(checkpoint: Path) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-clip")
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    pictures = noise(3)
    with torch.no_grad():
        image = model.eval().encode_image(torch.stack([preprocess(Image.fromarray(p)) for p in pictures]))
        text = model.encode_text(open_clip.get_tokenizer("tiny-clip")(PROMPTS))
    expected = functional.cosine_similarity(image, text).numpy()
    scorer = load_scorer("hpsv2", weights=str(checkpoint), architecture="tiny-clip", device="cpu", batch=2)
    # float32 features of one layer.
    assert scorer.score(pictures, PROMPTS) == pytest.approx(expected, abs=1e-5)
    single = [float(scorer.score(pictures[i : i + 1], [PROMPTS[i]])[0]) for i in range(3)]
    assert scorer.score(pictures, PROMPTS) == pytest.approx(single, abs=1e-5)
    assert scorer.score([], []).shape == (0,)
    assert scorer.describe()["settings"]["architecture"] == "tiny-clip"


def test_all_of_a_picture_that_is_not_square_is_judged(checkpoint: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (16, 32, 3)).astype(np.uint8)
    padded = np.pad(wide, ((8, 8), (0, 0), (0, 0)))  # with black
    scorer = load_scorer("hpsv2", weights=str(checkpoint), architecture="tiny-clip", device="cpu")
    assert scorer.score([wide], ["a cat"]) == pytest.approx(scorer.score([padded], ["a cat"]), abs=1e-5)


def test_what_cannot_be_had_is_one_sentence(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no file of weights 'nowhere\.pt'"):
        load_scorer("hpsv2", weights="nowhere.pt").prepare()
    with pytest.raises(UserError, match=r"not on this machine.*: some/where/file\.pt for the weights"):
        load_scorer("hpsv2", weights="some/where/file.pt").prepare()
    with pytest.raises(UserError, match="no architecture 'ViT-H-15'; did you mean"):
        load_scorer("hpsv2", weights=str(checkpoint), architecture="ViT-H-15").prepare()
    (tmp_path / "broken.pt").write_bytes(b"broken")
    with pytest.raises(UserError, match="does not load the weights"):
        load_scorer("hpsv2", weights=str(tmp_path / "broken.pt"), architecture="tiny-clip").prepare()
    with pytest.raises(UserError, match="1 images and 2 prompts"):
        load_scorer("hpsv2", weights=str(checkpoint), architecture="tiny-clip", device="cpu").score(noise(1), PROMPTS[:2])
