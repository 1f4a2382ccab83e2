"""Speed of scorers in batches against one picture at a time, and of text readers against their own call (`make bench`)."""

from typing import Any

import numpy as np
import pytest

from alignbench import load_scorer
from alignbench.drawing import lettering, sample_lettering
from alignbench.drawing.scenes import TASK_TYPES, sample_metadata, sample_scene
from alignbench.scorer import Scorer
from evals.ocr import OCR

Drawn = tuple[np.ndarray, list[str]]
PICTURES = 108
"""Of one training iteration with the default preset: 12 prompts x 9 leaves."""
SCORERS: dict[str, dict[str, str]] = {
    "easyocr": {"name": "ocr", "characters": "letters"},
    "rapidocr": {"name": "ocr", "reader": "rapidocr"},
    "easyocr pages": {"name": "ocr", "locate": "detect"},
    "rapidocr pages": {"name": "ocr", "reader": "rapidocr", "locate": "detect"},
    "pickscore": {"name": "pickscore"},
    "clip agreement": {"name": "clip_agreement"},
    "shapes": {"name": "geneval"},
}
"""By what they go by here; pages are pictures whose text the reader's own detector finds. A reader's network does as much
arithmetic a picture in a batch as alone, so that a batch gains little but the cores that one picture leaves idle; the
detector of shapes looks at one object after the other: batches share nothing there."""


@pytest.fixture(scope="module", params=SCORERS)
def scorer(request: pytest.FixtureRequest, threads: int) -> Scorer:
    settings = dict(SCORERS[request.param])
    found = load_scorer(settings.pop("name"), **settings)
    found.prepare()
    return found


@pytest.fixture(scope="module")
def drawn(scorer: Scorer) -> Drawn:
    """Scenes for the detector, words for the others, with their prompts; nine pictures each."""
    rng = np.random.default_rng(0)
    if scorer.name == "geneval":
        metadata = [
            entry for i in range(PICTURES // 9) for entry in [sample_metadata(rng, TASK_TYPES[i % len(TASK_TYPES)])] * 9
        ]
        return np.stack([sample_scene(rng, entry).draw() for entry in metadata]), [entry["prompt"] for entry in metadata]
    texts = [text for _ in range(PICTURES // 9) for text in [lettering.sample_text(rng)] * 9]
    return np.stack([sample_lettering(rng, text).draw() for text in texts]), [f'the word "{text}"' for text in texts]


def timed(benchmark: Any, request: pytest.FixtureRequest, function: Any) -> None:
    benchmark.group = f"scoring: {request.node.callspec.params['scorer']}"
    benchmark.extra_info["rows"] = PICTURES
    benchmark.pedantic(function, rounds=5, warmup_rounds=1)


def test_ours(benchmark: Any, request: pytest.FixtureRequest, scorer: Scorer, drawn: Drawn) -> None:
    timed(benchmark, request, lambda: scorer.score(*drawn))


def test_one_by_one(benchmark: Any, request: pytest.FixtureRequest, scorer: Scorer, drawn: Drawn) -> None:
    pictures, prompts = drawn

    def run() -> None:
        for i, prompt in enumerate(prompts):
            scorer.score(pictures[i : i + 1], [prompt])

    timed(benchmark, request, run)


def test_readers_own_call(benchmark: Any, request: pytest.FixtureRequest, scorer: Scorer, drawn: Drawn) -> None:
    """A picture at a time through the reader's own detector and recogniser, with the settings that we load it with: RapidOCR
    then has one thread."""
    if not isinstance(scorer, OCR) or scorer.settings.locate == "detect":
        pytest.skip("is no reader, or makes that call already")
    timed(benchmark, request, lambda: [scorer.reader.read_page(picture) for picture in drawn[0]])
