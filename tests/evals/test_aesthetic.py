"""The aesthetic predictor on a random CLIP of the class that it stands on, with random layers in its file's layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from alignbench import UserError, load_scorer
from alignbench.embedded.train_pickscore import PickScoreTraining, build_model, build_processor

WIDTH = 16


class Predictor(nn.Module):
    """As LAION's is written: dropout between linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 8), nn.Dropout(0.2), nn.Linear(8, 4), nn.Dropout(0.1), nn.Linear(4, 3), nn.Linear(3, 1)
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("aesthetic")
    processor = build_processor()
    small = PickScoreTraining(vision_width=32, vision_layers=1, text_width=32, text_layers=1, projection=WIDTH)
    build_model(small, processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    torch.save(Predictor(WIDTH).state_dict(), folder / "predictor.pth")
    return folder


def test_the_score_is_the_predictors_on_unit_features_and_no_prompt_changes_it(folder: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    pictures = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    predictor = Predictor(WIDTH).eval()
    predictor.load_state_dict(torch.load(folder / "predictor.pth", weights_only=True))
    pixels = processor.image_processor(images=[Image.fromarray(p) for p in pictures], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        expected = predictor.layers(functional.normalize(model.visual_projection(pooled), dim=-1))[:, 0].numpy()
    scorer = load_scorer("aesthetic", weights=str(folder / "predictor.pth"), model=str(folder), device="cpu", batch=2)
    # float32 features of one layer.
    assert scorer.score(pictures, ["a", "b", "c"]) == pytest.approx(expected, abs=1e-5)
    assert scorer.score(pictures, ["", "x", "x"]) == pytest.approx(expected, abs=1e-5)
    assert scorer.score([], []).shape == (0,)
    assert scorer.describe()["model"] == str(folder)


def test_what_is_no_predictor_is_refused(folder: Path, tmp_path: Path) -> None:
    def scorer(weights: Path) -> None:
        load_scorer("aesthetic", weights=str(weights), model=str(folder), device="cpu").prepare()

    with pytest.raises(UserError, match="no file of weights"):
        load_scorer("aesthetic").prepare()
    (tmp_path / "broken.pth").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"broken\.pth is not an aesthetic predictor"):
        scorer(tmp_path / "broken.pth")
    torch.save({"layers.0.weight": torch.zeros(2, WIDTH), "layers.0.bias": torch.zeros(2)}, tmp_path / "two.pth")
    with pytest.raises(UserError, match="do not lead from features to one number"):
        scorer(tmp_path / "two.pth")
    torch.save(Predictor(WIDTH + 1).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(UserError, match=r"takes 17 features, but .* gives 16"):
        scorer(tmp_path / "wide.pth")
