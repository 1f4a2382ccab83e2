"""Speed of scorers in batches against one image at a time, and of text readers against their own call (`make bench`)."""

from typing import Any

import numpy as np
import pytest

from alignbench import load_scorer
from alignbench.embedded.drawing import lettering, sample_lettering
from alignbench.embedded.drawing.scenes import TASK_TYPES, sample_metadata, sample_scene
from alignbench.scorer import Scorer
from evals.ocr import OCR

Drawn = tuple[np.ndarray, list[str]]
PICTURES = 108
"""Of one training iteration with the default preset: 12 prompts x 9 leaves."""
PAGES, ENLARGED = 12, 4
"""How many larger images, and how many times as high and wide as those of the embedded model."""
SCORERS: dict[str, dict[str, str]] = {
    "easyocr": {"name": "ocr", "characters": "letters"},
    "rapidocr": {"name": "ocr", "reader": "rapidocr"},
    "easyocr pages": {"name": "ocr", "locate": "detect"},
    "rapidocr pages": {"name": "ocr", "reader": "rapidocr", "locate": "detect"},
    "pickscore": {"name": "pickscore"},
    "clip agreement": {"name": "clip_agreement"},
    "shapes": {"name": "geneval"},
}
"""By what they go by here; pages are larger images, whose text the reader's own detector finds. A reader's network does
as much arithmetic an image in a batch as alone, so that a batch gains little but the cores that one image leaves idle;
the detector of shapes looks at one object after the other: batches share nothing there."""


@pytest.fixture(scope="module", params=SCORERS)
def scorer(request: pytest.FixtureRequest, threads: int) -> Scorer:
    settings = dict(SCORERS[request.param])
    found = load_scorer(settings.pop("name"), **settings)
    found.prepare()
    return found


@pytest.fixture(scope="module")
def drawn(scorer: Scorer) -> Drawn:
    """Scenes for the detector, words for the others, with their prompts; nine images each, of pages one."""
    rng = np.random.default_rng(0)
    if scorer.name == "geneval":
        metadata = [
            entry for i in range(PICTURES // 9) for entry in [sample_metadata(rng, TASK_TYPES[i % len(TASK_TYPES)])] * 9
        ]
        return np.stack([sample_scene(rng, entry).draw() for entry in metadata]), [entry["prompt"] for entry in metadata]
    pages = isinstance(scorer, OCR) and scorer.settings.locate == "detect"
    each, enlarged = (1, ENLARGED) if pages else (9, 1)
    texts = [text for _ in range(PAGES if pages else PICTURES // 9) for text in [lettering.sample_text(rng)] * each]
    pictures = np.stack([sample_lettering(rng, text).draw() for text in texts])
    return pictures.repeat(enlarged, axis=1).repeat(enlarged, axis=2), [f'the word "{text}"' for text in texts]


def timed(benchmark: Any, request: pytest.FixtureRequest, pictures: int, function: Any) -> None:
    benchmark.group = f"scoring: {request.node.callspec.params['scorer']}"
    benchmark.extra_info["rows"] = pictures
    benchmark.pedantic(function, rounds=5, warmup_rounds=1)


def test_ours(benchmark: Any, request: pytest.FixtureRequest, scorer: Scorer, drawn: Drawn) -> None:
    timed(benchmark, request, len(drawn[0]), lambda: scorer.score(*drawn))


def test_one_by_one(benchmark: Any, request: pytest.FixtureRequest, scorer: Scorer, drawn: Drawn) -> None:
    pictures, prompts = drawn

    def run() -> None:
        for i, prompt in enumerate(prompts):
            scorer.score(pictures[i : i + 1], [prompt])

    timed(benchmark, request, len(pictures), run)


def test_readers_own_call(benchmark: Any, request: pytest.FixtureRequest, scorer: Scorer, drawn: Drawn) -> None:
    """An image at a time through the reader's own detector and recogniser, with the settings that we load it with: RapidOCR
    then has one thread."""
    if not isinstance(scorer, OCR) or scorer.settings.locate == "detect":
        pytest.skip("is no reader, or makes that call already")
    pictures, _ = drawn
    timed(benchmark, request, len(pictures), lambda: [scorer.reader.read_page(picture) for picture in pictures])
