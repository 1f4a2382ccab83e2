"""Images of every kind through every scorer that ships with its weights: known answers, and no failure."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from alignbench import load_scorer
from alignbench.load import load_eval
from alignbench.scorer import Scorer, SetMetric

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
PICTURES: dict[str, Image.Image] = {
    "black": Image.new("RGB", (64, 64), "black"),
    "white": Image.new("RGB", (64, 64), "white"),
    "transparent": Image.new("RGBA", (64, 64), (255, 0, 0, 0)),
    "grey": Image.new("L", (64, 64), 90),
    "grey with transparency": Image.new("LA", (64, 64), (90, 255)),
    "palette": Image.new("P", (64, 64)),
    "one bit": Image.new("1", (64, 64), 1),
    "16 bits": Image.fromarray(np.full((64, 64), 90, np.uint16)),
    "noise": Image.fromarray(NOISE),
    "one pixel": Image.new("RGB", (1, 1), "blue"),
    "a line": Image.new("RGB", (90, 2), "blue"),
    "large": Image.new("RGB", (1500, 1000), "blue"),
}
SCORERS = [
    ("ocr", {"reader": "rapidocr"}),
    ("ocr", {"reader": "easyocr", "characters": "letters", "locate": "contrast"}),
    ("geneval", {}),
    ("geneval", {"reward": "graded"}),
    ("pickscore", {}),
    ("clip_agreement", {}),
    ("quality", {}),
]


@pytest.mark.parametrize(("name", "settings"), SCORERS, ids=[f"{name} {settings}" for name, settings in SCORERS])
def test_every_scorer_gives_a_finite_score_for_pictures_of_any_kind(name: str, settings: dict[str, str]) -> None:
    scorer: Scorer = load_scorer(name, **settings)
    prompt = 'the word "STOP"' if name == "ocr" else "a red circle"
    measured = scorer.measure(list(PICTURES.values()), [prompt] * len(PICTURES))
    for metric, values in measured.items():
        assert values.shape == (len(PICTURES),), metric
        assert np.isfinite(values).all(), metric
    if name in ("ocr", "geneval"):
        # None of them shows what is asked for.
        assert (measured[name] < 1).all()
    assert scorer.score([], []).shape == (0,)


def test_quality_of_known_pictures() -> None:
    found = load_scorer("quality").measure(list(PICTURES.values()), ["x"] * len(PICTURES))
    by_name = {name: {metric: float(values[i]) for metric, values in found.items()} for i, name in enumerate(PICTURES)}
    assert (by_name["black"]["brightness"], by_name["black"]["black_or_white"]) == (0, 1)
    # What is transparent shows white.
    assert by_name["transparent"] == by_name["white"] == by_name["one bit"]
    assert by_name["white"]["black_or_white"] == 1
    assert by_name["grey"] == by_name["grey with transparency"]
    assert by_name["grey"]["brightness"] == pytest.approx(90 / 255)
    # The entropy of 4096 draws from a grey histogram that is not flat, of at most 8 bits.
    assert 7 < by_name["noise"]["entropy"] < 8
    assert by_name["noise"]["sharpness"] > 100 * by_name["large"]["sharpness"]
    assert by_name["large"] == pytest.approx(by_name["one pixel"])


def test_large_text_of_another_program_is_found_and_read() -> None:
    import matplotlib

    face = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/STIXGeneral.ttf"), 150)
    page = Image.new("RGB", (1400, 1000), "ivory")
    pen = ImageDraw.Draw(page)
    pen.text((150, 150), "OPEN", font=face, fill="navy")
    pen.text((500, 600), "Daily", font=face, fill="darkred")
    measured = load_scorer("ocr", reader="rapidocr").measure([page] * 2, ['a sign "Open" above "DAILY"', 'the word "CLOSED"'])
    assert measured["ocr_exact"].tolist() == [1, 0]
    assert measured["ocr"][0] == 1
    assert measured["ocr"][1] < 0.5


@pytest.mark.parametrize("name", ["diversity", "mode_coverage"])
def test_equal_pictures_of_any_kind_have_no_diversity(name: str) -> None:
    metric = load_eval(name, **({"features": "clip:tiny"} if name == "diversity" else {}))
    assert isinstance(metric, SetMetric)
    for kind, picture in PICTURES.items():
        if kind == "large":
            continue
        pictures = np.stack([np.asarray(picture.convert("RGB"))] * 3)
        for prompt in ("a red circle", 'ein Wort: "GRÜN"', ""):
            found = metric.measure(pictures, None, prompt)
            diversity = {m: v for m, v in found.items() if m in ("pixel_diversity", "cosine_diversity", "mode_coverage")}
            # float32 features of equal images.
            assert diversity == pytest.approx(dict.fromkeys(diversity, 0), abs=1e-5), (kind, prompt)
            assert diversity
