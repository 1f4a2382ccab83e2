from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from alignbench import UserError
from alignbench.embedded.drawing import lettering
from alignbench.embedded.drawing.lettering import Lettering
from alignbench.embedded.drawing.scenes import TASK_TYPES, Scene, Shape, sample_metadata, sample_scene
from alignbench.embedded.drawn_pairs import (
    IGNORE,
    KINDS,
    READING,
    against_each_other,
    broken,
    draw_pairs,
    fulfils,
    is_unseen,
    kinds_of,
    patches_of,
    reading_of,
)
from alignbench.embedded.train_pickscore import (
    Inputs,
    PickScoreTraining,
    build_model,
    build_processor,
    embed_prompts,
    preference_loss,
    train_pickscore,
)
from evals.detectors.grammar import SCENES
from evals.geneval import judge
from evals.ocr import quoted_text


def test_drawn_pairs_differ_as_their_kind_says() -> None:
    for pair in draw_pairs(np.random.default_rng(0), 90, held_out=False):
        right, wrong = pair.contents
        assert fulfils(right, pair.wanted)
        assert fulfils(wrong, pair.wanted) == (pair.kind == "broken")
        assert (pair.right != pair.wrong).any()
        assert isinstance(right, Lettering) or pair.kind != "word"
        if pair.other is None:
            assert pair.kind == "broken"
        else:
            assert fulfils(wrong, pair.other[1])


def test_the_prompt_of_a_wrong_picture_says_what_it_shows() -> None:
    for pair in draw_pairs(np.random.default_rng(4), 240, held_out=False):
        if pair.other is None:
            continue
        prompt, wanted = pair.other
        assert prompt != pair.prompt
        assert not is_unseen(wanted)
        if pair.kind == "scene":
            assert SCENES.parse(prompt) == wanted
        else:
            assert quoted_text(prompt) == wanted["text"]
            assert wanted["color"] is None or wanted["color"] in prompt


def test_kinds_in_shares() -> None:
    assert Counter(kinds_of(48, (0.35, 0.5, 0.15))) == {"scene": 17, "word": 24, "broken": 7}
    assert Counter(kinds_of(3, (1, 1, 1))) == {"scene": 1, "word": 1, "broken": 1}


def test_pairs_against_each_other_show_the_picture_of_another_prompt() -> None:
    pairs = draw_pairs(np.random.default_rng(0), 30, held_out=True)
    others = against_each_other(pairs)
    assert 20 <= len(others) <= 27
    for other in others:
        assert not fulfils(other.contents[1], other.wanted)
        assert (other.wrong == other.contents[1].draw()).all()


def test_held_out_pairs_have_words_and_scenes_that_training_never_has() -> None:
    for held_out in (True, False):
        for pair in draw_pairs(np.random.default_rng(1), 60, held_out=held_out):
            assert is_unseen(pair.wanted) == held_out


def test_scenes_fulfil_prompts_as_genevals_rules_say() -> None:
    rng = np.random.default_rng(2)
    agreed = []
    for i in range(200):
        scene = sample_scene(rng, sample_metadata(rng, TASK_TYPES[i % 6]))
        wanted = sample_metadata(rng, TASK_TYPES[(i // 6) % 6])
        found: dict[str, list[dict[str, object]]] = {}
        for s in scene.shapes:
            (x, y), r = s.center, s.size / 2
            found.setdefault(s.kind, []).append({"box": [x - r, y - r, x + r, y + r], "score": 1.0, "color": s.color})
        by_rules = judge(found, wanted)[0]  # type: ignore[arg-type]
        # GenEval looks at the best of each class alone, and offsets shrink by the sizes: ours may say yes where it says no.
        agreed.append(by_rules == fulfils(scene, wanted))
        assert fulfils(scene, wanted) or not by_rules
    assert np.mean(agreed) > 0.95


def test_words_fulfil_what_is_asked_of_them() -> None:
    word = lettering.sample_lettering(np.random.default_rng(0), "CAT", "red")
    assert fulfils(word, {"text": "CAT", "color": None})
    assert fulfils(word, {"text": "CAT", "color": "red"})
    assert not fulfils(word, {"text": "CAT", "color": "blue"})
    assert not fulfils(word, {"text": "CAR", "color": None})
    assert not fulfils(word, sample_metadata(np.random.default_rng(0), "single_object"))


def test_a_reading_by_hand() -> None:
    scene = Scene("grey", (Shape("star", "red", (10, 10), 16), Shape("circle", "blue", (40, 40), 16)))
    # Five letters, counts of circle, square, triangle, star, cross, and their colours with the word's.
    assert reading_of(scene) == [0] * 5 + [1, 0, 0, 1, 0] + [4, IGNORE, IGNORE, 0, IGNORE, IGNORE]
    assert reading_of(scene, named={"blue"})[10:] == [4] + [IGNORE] * 5
    word = lettering.sample_lettering(np.random.default_rng(0), "CAB", "white")
    assert reading_of(word) == [3, 1, 2, 0, 0, *[0] * 5, *[IGNORE] * 5, 9]
    assert len(READING) == 16


def test_patches_by_hand() -> None:
    scene = Scene("grey", (Shape("star", "red", (16, 16), 16), Shape("circle", "blue", (48, 40), 32)))
    found = patches_of(scene).reshape(8, 8, 3)
    # A star 16 wide covers four patches, a circle 32 wide sixteen; kinds come after the 26 letters.
    assert found[1:3, 1:3].tolist() == [[[30, 0, 1]] * 2] * 2
    assert found[3:7, 4:8].tolist() == [[[27, 0, 5]] * 4] * 4
    assert np.count_nonzero(found[..., 0]) == 20
    word = lettering.Lettering("AB", "white", "night", "sans", 16, 24, (8, 16))
    found = patches_of(word).reshape(8, 8, 3)
    assert found[2, 1:5].tolist() == [[1, 1, 10], [1, 1, 10], [2, 2, 10], [2, 2, 10]]
    assert np.count_nonzero(found[..., 0]) == 3 * 4


def test_every_kind_of_harm_changes_the_picture() -> None:
    rng = np.random.default_rng(3)
    picture = lettering.sample_lettering(rng, "CUBE", "red").draw()
    harmed = [broken(rng, picture) for _ in range(20)]
    assert all(h.dtype == np.uint8 and h.shape == picture.shape and (h != picture).any() for h in harmed)


def test_the_loss_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, 1.0]])
    allowed = torch.tensor([[True, False, True, True], [False, True, True, True]])
    own = np.log1p(np.exp(-1))
    # Prompt 0 ranks its image among 2, 1 and 0; the other prompt is not allowed for the right images.
    pictures = -np.log(np.exp(2) / (np.exp(2) + np.exp(1) + 1))
    owned = torch.tensor([0, 1])
    assert float(preference_loss(logits, owned, allowed)) == pytest.approx(own + 0.5 * pictures, abs=1e-6)
    # The prompt of the first wrong image, which is the best of the four for it, and it the best prompt for the image.
    more, may = torch.tensor([[0.0, 0.0, 3.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool)
    third = -np.log(np.exp(3) / (np.exp(3) + 3))
    by_picture = np.mean([np.log(1 + np.exp(-2)), np.log(1 + np.exp(-2)), np.log(1 + np.exp(-2) + np.exp(-3))])
    found = preference_loss(torch.cat([logits, more]), torch.tensor([0, 1, 2]), torch.cat([allowed, may]))
    assert float(found) == pytest.approx(own + 0.5 * ((2 * pictures + third) / 3 + by_picture), abs=1e-6)


def test_a_short_training_writes_a_folder_that_opens_and_repeats_itself(tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    settings = PickScoreTraining(
        steps=3, pairs=4, vision_width=32, vision_layers=1, text_width=32, text_layers=1, held_out_pairs=6
    )
    said: list[str] = []
    first = train_pickscore(settings, tmp_path / "a", said.append)
    assert first == train_pickscore(settings, tmp_path / "b", said.append)
    assert set(first) == {"overall", "other", *KINDS}
    weights = [CLIPModel.from_pretrained(tmp_path / name).state_dict() for name in "ab"]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    processor = CLIPProcessor.from_pretrained(tmp_path / "a")
    # Spelt letter by letter; quotes are words of their own.
    assert len(processor.tokenizer('a "CUBE"').input_ids) == 2 + 1 + 1 + 4 + 1
    assert any("held-out pairs in correct order" in line for line in said)
    with pytest.raises(UserError, match="exists already"):
        train_pickscore(settings, tmp_path / "a", said.append)


def test_a_prompt_is_read_to_its_end() -> None:
    """CLIPModel looks for the token of the highest id where the end token has id 2; a quoted word then goes unread."""
    settings = PickScoreTraining(vision_width=32, vision_layers=1, text_width=32, text_layers=1)
    torch.manual_seed(0)
    processor = build_processor()
    model = build_model(settings, processor.tokenizer).eval()
    with torch.no_grad():
        text = embed_prompts(model, Inputs(processor), ['the word "CUBE"', 'the word "CUBA"'])
    assert not torch.allclose(text[0], text[1], atol=1e-3)
