from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from alignbench import UserError
from alignbench.cli.app import app
from alignbench.embedded.drawing.scenes import TASK_TYPES
from alignbench.tasks import coco, load_task
from alignbench.tasks.geneval_prompts import OFFICIAL_COUNTS, generate, sample_coco_metadata, write
from alignbench.tasks.prompts import read_prompts
from evals.detectors.grammar import COCO, SCENES, Grammar
from evals.geneval import judge, read_metadata


@pytest.mark.parametrize(("objects", "grammar"), [("coco", COCO), ("drawn", SCENES)])
def test_prompts_say_what_their_metadata_say(objects: str, grammar: Grammar) -> None:
    for entry in generate(objects, dict.fromkeys(TASK_TYPES, 20), seed=0):
        assert grammar.parse(entry["prompt"]) == entry


def test_the_official_counts_and_task_types_in_turns() -> None:
    entries = generate("coco", OFFICIAL_COUNTS, seed=0)
    assert len(entries) == 553
    assert Counter(e["tag"] for e in entries) == OFFICIAL_COUNTS
    assert [e["tag"] for e in entries[:6]] == list(TASK_TYPES)
    assert len({e["prompt"] for e in entries}) == 553
    # All 80 objects, each once.
    assert {e["include"][0]["class"] for e in entries if e["tag"] == "single_object"} == set(coco.CLASSES)


def test_what_geneval_never_asks_is_not_asked() -> None:
    rng = np.random.default_rng(0)
    for tag in ("colors", "color_attr", "counting", "two_object", "position"):
        for _ in range(200):
            include = sample_coco_metadata(rng, tag)["include"]
            kinds = [clause["class"] for clause in include]
            colors = [clause["color"] for clause in include if "color" in clause]
            assert len(set(kinds)) == len(kinds)
            assert len(set(colors)) == len(colors)
            assert "person" not in kinds or not colors
            assert tag != "counting" or not {"scissors", "skis"} & set(kinds)


def test_articles_and_plurals_are_genevals() -> None:
    prompts = {e["prompt"] for e in generate("coco", {"single_object": 80}, seed=0)}
    for wanted in ("a photo of an umbrella", "a photo of a skis", "a photo of an orange"):
        assert wanted in prompts
    assert [coco.plural(name) for name in ("bus", "bench", "knife", "person")] == ["buses", "benchs", "knifes", "persons"]
    assert coco.plurals("bench") == ("benchs", "benches")
    assert coco.plurals("cup") == ("cups",)


def test_a_prompt_is_excluded_however_its_case_and_blanks_are() -> None:
    first = generate("coco", {"single_object": 60}, seed=0)
    rest = generate("coco", {"single_object": 60}, seed=0, exclude=[e["prompt"].upper().replace(" ", "  ") for e in first])
    assert len(rest) == 20
    assert not {e["prompt"] for e in first} & {e["prompt"] for e in rest}


def test_excluded_prompts_are_not_made_and_a_used_up_type_gives_fewer() -> None:
    first = generate("coco", {"single_object": 60, "colors": 5}, seed=0)
    rest = generate("coco", {"single_object": 60, "colors": 5}, seed=0, exclude={e["prompt"] for e in first})
    assert Counter(e["tag"] for e in rest) == {"single_object": 20, "colors": 5}
    assert not {e["prompt"] for e in first} & {e["prompt"] for e in rest}
    with pytest.raises(UserError, match="no prompts about 'coko'; did you mean 'coco'"):
        generate("coko", {}, seed=0)


def test_the_file_is_read_as_prompts_and_as_metadata_and_overwrites_nothing(tmp_path: Path) -> None:
    entries = generate("coco", dict.fromkeys(TASK_TYPES, 2), seed=3)
    write(entries, tmp_path / "p.jsonl")
    assert read_prompts(tmp_path / "p.jsonl") == [e["prompt"] for e in entries]
    assert list(read_metadata(tmp_path / "p.jsonl").values()) == entries
    with pytest.raises(UserError, match="exists already"):
        write(entries, tmp_path / "p.jsonl")


def test_the_task_has_prompts_of_all_types_that_its_detector_reads() -> None:
    task = load_task("geneval_coco")
    for prompts, least in ((task.train_prompts, 60), (task.eval_prompts, 20)):
        entries = [COCO.parse(prompt) for prompt in prompts]
        assert all(entry is not None for entry in entries)
        counts = Counter(entry["tag"] for entry in entries if entry)
        assert set(counts) == set(TASK_TYPES)
        assert min(counts.values()) >= least
    # What a perfect detector would find is right.
    counting = next(e for p in task.eval_prompts if (e := COCO.parse(p)) and e["tag"] == "counting")
    (clause,) = counting["include"]
    found = {"box": [0, 0, 9, 9], "score": 1.0}
    assert judge({clause["class"]: [found] * clause["count"]}, counting)[0]  # type: ignore[list-item]
    assert not judge({clause["class"]: [found] * (clause["count"] + 1)}, counting)[0]  # type: ignore[list-item]


def test_the_command_writes_other_prompts_than_those_of_a_file(tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    runner = CliRunner()
    done = runner.invoke(app, ["prompts", "--each", "3", "--out", str(first)])
    assert "wrote 18 prompts" in done.output
    runner.invoke(app, ["prompts", "--each", "3", "--out", str(second), "--exclude", str(first)])
    assert not set(read_prompts(first)) & set(read_prompts(second))
    assert isinstance(runner.invoke(app, ["prompts", "--out", str(first)]).exception, UserError)
