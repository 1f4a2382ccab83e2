"""GenEval's rules on hand-made detections, its official prompts, and the scorer on drawn scenes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alignbench import RunError, UserError, load_scorer
from alignbench.embedded.drawing.scenes import TASK_TYPES, Scene, Shape, sample_metadata, sample_scene
from alignbench.evaluation.evaluate import MetricSuite, estimates, evaluate_images
from alignbench.tasks import EvalChoice, load_task
from alignbench.tasks.prompts import read_prompts
from evals.detectors.base import Detection, Detections
from evals.detectors.grammar import COCO, SCENES
from evals.detectors.shapes import ShapesDetector
from evals.geneval import GenEval, flow_grpo, graded, judge, read_metadata, relations, self_test

OFFICIAL = Path(__file__).parents[2].parent / "shared/data/geneval_metadata.jsonl"


def found(x: float = 0, y: float = 0, size: float = 10, color: str = "red", score: float = 0.9) -> Detection:
    """A square box with its top left corner at (x, y)."""
    return {"box": [x, y, x + size, y + size], "score": score, "color": color}


def asks(*include: dict[str, Any], exclude: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"include": list(include), "exclude": list(exclude)}


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        # Two boxes of 10: each axis shrinks by 0.1 * 20 = 2.
        ((30, 0), {"right of"}),  # 28 / 30
        ((-30, 0), {"left of"}),
        ((0, -30), {"above"}),
        ((0, 30), {"below"}),
        ((30, 30), {"right of", "below"}),  # 28 / 42.4 = 0.66 both
        ((-21, -30), {"left of", "above"}),  # 19 / 36.6 = 0.519
        ((-20, -30), {"above"}),  # 18 / 36.06 = 0.499; it would be 0.55 without shrinking
        ((2, -2), set()),  # shrunk to nothing
        ((3.9, 0), set()),  # 1.9 / 3.9 = 0.487
        ((4.1, 0), {"right of"}),  # 2.1 / 4.1 = 0.512
        ((0, 0), set()),
    ],
)
def test_position_rule(offset: tuple[float, float], expected: set[str]) -> None:
    assert relations(found(50 + offset[0], 50 + offset[1]), found(50, 50)) == expected


def test_large_boxes_shrink_more() -> None:
    # Centres 20 apart, sizes 60 and 60: 20 - 12 = 8, and 8 / 20 = 0.4.
    assert relations(found(20, 0, 60), found(0, 0, 60)) == set()
    # Sizes 20 and 60: 20 - 8 = 12, and 12 / 20 = 0.6.
    assert relations(found(40, 20, 20), found(0, 0, 60)) == {"right of"}


def test_a_missing_object_fails_and_more_than_asked_does_not() -> None:
    assert judge({"cup": [found()] * 2}, asks({"class": "cup", "count": 1})) == (True, "")
    correct, reason = judge({}, asks({"class": "cup", "count": 2}))
    assert not correct
    assert "cup>=2" in reason
    assert "found 0" in reason
    assert not judge({"cup": [found()]}, asks({"class": "cup", "count": 2}))[0]


def test_exclude_fails_from_its_count_on() -> None:
    metadata = asks({"class": "cup", "count": 2}, exclude=({"class": "cup", "count": 3},))
    assert judge({"cup": [found()] * 2}, metadata) == (True, "")
    correct, reason = judge({"cup": [found()] * 3}, metadata)
    assert not correct
    assert "cup<3" in reason
    assert "found 3" in reason
    assert not judge({"dog": [found()]}, asks(exclude=({"class": "dog", "count": 1},)))[0]


def test_a_colour_must_be_among_the_first_detections() -> None:
    metadata = asks({"class": "cup", "count": 1, "color": "blue"})
    assert judge({"cup": [found(color="blue"), found(color="red")]}, metadata)[0]
    correct, reason = judge({"cup": [found(color="red"), found(color="blue")]}, metadata)
    assert not correct
    assert "blue cup>=1" in reason
    assert "1 red" in reason


def test_a_colour_must_be_that_of_all_the_asked_objects() -> None:
    metadata = asks({"class": "cup", "count": 2, "color": "blue"})
    assert judge({"cup": [found(color="blue")] * 2}, metadata)[0]
    assert not judge({"cup": [found(color="blue"), found(color="red"), found(color="blue")]}, metadata)[0]


def test_a_position_holds_for_each_object_and_each_target() -> None:
    metadata = asks({"class": "dog", "count": 2}, {"class": "cup", "count": 2, "position": ["left of", 0]})
    dogs = [found(80, 0), found(80, 20)]
    assert judge({"dog": dogs, "cup": [found(0, 0), found(0, 20)]}, metadata) == (True, "")
    correct, reason = judge({"dog": dogs, "cup": [found(0, 0), found(120, 0)]}, metadata)
    assert not correct
    assert "cup left of target" in reason
    assert "right of" in reason
    assert not judge({"dog": [found(80, 0), found(0, 60)], "cup": [found(20, 0), found(0, 0)]}, metadata)[0]
    # A third dog and a third cup are not looked at.
    assert judge({"dog": [*dogs, found(0)], "cup": [found(0), found(0, 20), found(120)]}, metadata)[0]


def test_a_clause_fails_with_its_target() -> None:
    metadata = asks({"class": "dog", "count": 1, "color": "blue"}, {"class": "cup", "count": 1, "position": ["left of", 0]})
    correct, reason = judge({"dog": [found(80, color="red")], "cup": [found(0)]}, metadata)
    assert not correct
    assert [("blue dog" in reason.split("\n")[0]), ("no target for cup" in reason.split("\n")[1])] == [True, True]


def test_every_failure_has_its_line() -> None:
    metadata = asks({"class": "a", "count": 1}, {"class": "b", "count": 1}, exclude=({"class": "c", "count": 1},))
    assert len(judge({"c": [found()]}, metadata)[1].split("\n")) == 3


@pytest.mark.parametrize(("count", "share"), [(0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 2 / 3), (6, 0.0), (9, 0.0)])
def test_graded_counting(count: int, share: float) -> None:
    metadata = asks({"class": "cup", "count": 3}, exclude=({"class": "cup", "count": 4},))
    assert graded({"cup": [found()] * count}, metadata) == pytest.approx(share)


def test_graded_is_the_share_of_satisfied_requirements() -> None:
    pair = asks({"class": "a", "count": 1, "color": "red"}, {"class": "b", "count": 1, "color": "blue"})
    assert graded({"a": [found()], "b": [found()]}, pair) == 3 / 4
    assert graded({"a": [found()]}, pair) == 2 / 4
    place = asks({"class": "b", "count": 1}, {"class": "a", "count": 1, "position": ["left of", 0]})
    assert graded({"a": [found(50)], "b": [found(0)]}, place) == 2 / 3
    assert graded({"a": [found(50)]}, place) == 1 / 3


def test_graded_is_one_exactly_where_the_judge_says_correct() -> None:
    rng = np.random.default_rng(5)
    answers = set()
    for i in range(3000):
        metadata = sample_metadata(rng, TASK_TYPES[i % len(TASK_TYPES)])
        detections = {
            clause["class"]: [
                found(
                    rng.uniform(0, 50),
                    rng.uniform(0, 50),
                    color=clause.get("color", "red") if rng.random() < 0.7 else "green",
                )
                for _ in range(rng.integers(max(clause["count"] - 1, 0), clause["count"] + 2))
            ]
            for clause in metadata["include"]
        }
        answers.add((judge(detections, metadata)[0], graded(detections, metadata) == 1.0))
    assert answers == {(True, True), (False, False)}


@pytest.mark.parametrize(
    ("include", "detections", "expected"),
    [
        ([("a", 3)], {"a": 4}, 2 / 3),
        ([("a", 1)], {"a": 2}, 0.0),  # one too many: as bad as none
        ([("a", 1)], {"a": 5}, -3.0),  # without a floor
        ([("a", 1), ("b", 1)], {"a": 1, "b": 2}, 1 / 2),
        ([("a", 1, "red")], {"a": 1}, 1.0),
        ([("a", 1, "blue")], {"a": 1}, 1 / 2),
        ([("a", 1, "red")], {"a": 2}, 0.0),  # 0 for the count, 0 for the colour
        ([("a", 2, "blue"), ("b", 1)], {"a": 2, "b": 1}, 2 / 3),  # counts 1 and 1, colour 1 - 2 / 2
    ],
)
def test_flow_grpos_score_by_hand(include: list[Any], detections: dict[str, int], expected: float) -> None:
    clauses = [{"class": c, "count": n, **({"color": color[0]} if color else {})} for c, n, *color in include]
    assert flow_grpo({c: [found()] * n for c, n in detections.items()}, asks(*clauses)) == pytest.approx(expected)


def test_flow_grpos_score_of_positions_by_hand() -> None:
    place = asks({"class": "b", "count": 1}, {"class": "a", "count": 1, "position": ["left of", 0]})
    assert flow_grpo({"a": [found(0)], "b": [found(50)]}, place) == 1.0
    assert flow_grpo({"a": [found(50)], "b": [found(0)]}, place) == 3 / 4  # the wrong side gives a 0 and a 1 as well
    assert flow_grpo({"a": [found(0)], "b": [found(50)] * 2}, place) == 1 / 3  # counts 0 and 1, and no target
    assert flow_grpo({"a": [found(0)] * 2, "b": [found(50)]}, place) == 1 / 3
    assert flow_grpo({}, asks()) == 0.0


def requirements(clauses: list[dict[str, Any]], detections: Detections) -> float:
    """Flow-GRPO's score written a second time, from a table of what each clause is worth: (sum of the requirements, number)."""
    worth: list[tuple[float, int]] = []
    held: list[bool] = []
    for clause in clauses:
        objects, asked = detections.get(clause["class"], []), clause["count"]
        miscounted = abs(len(objects) - asked) / asked
        miscolored = sum(d["color"] != clause["color"] for d in objects) / asked if "color" in clause else 0.0
        further = "color" in clause or "position" in clause
        if miscounted:
            worth.append((1 - miscounted, 1 + further))
            held.append(False)
        elif miscolored or "position" not in clause:
            worth.append((1 + (1 - miscolored) * ("color" in clause), 1 + ("color" in clause)))
            held.append(not miscolored)
        else:
            relation, target = clause["position"]
            targets = detections.get(clauses[target]["class"], []) if held[target] else None
            right = targets is not None and all(relation in relations(a, b) for a in objects for b in targets)
            beside = 1 + ("color" in clause)
            worth.append((beside + (targets is not None), beside + (1 if targets is None or right else 2)))
            held.append(right)
    return sum(w for w, _ in worth) / sum(n for _, n in worth)


def test_flow_grpos_score_is_another_than_graded_except_for_counting() -> None:
    rng = np.random.default_rng(8)
    equal: dict[str, list[bool]] = {tag: [] for tag in TASK_TYPES}
    for i in range(3000):
        metadata = sample_metadata(rng, TASK_TYPES[i % len(TASK_TYPES)])
        clauses = metadata["include"]
        if i % 4 == 0:  # what GenEval's list does not ask for: several of a colour and a side
            clauses[-1] |= {"count": int(rng.integers(1, 4)), "color": "red"}
        detections = {
            c["class"]: [
                found(rng.uniform(0, 50), rng.uniform(0, 50), color=c.get("color", "red") if rng.random() < 0.7 else "green")
                for _ in range(rng.integers(max(c["count"] - 1, 0), c["count"] + 2))
            ]
            for c in clauses
        }
        score = flow_grpo(detections, metadata)
        assert score == pytest.approx(requirements(clauses, detections), abs=1e-12)
        if i % 4:
            equal[metadata["tag"]].append(score == pytest.approx(graded(detections, metadata), abs=1e-12))
    shares = {tag: np.mean(several) for tag, several in equal.items()}
    assert shares.pop("counting") == 1.0
    assert max(shares.values()) < 0.8


@pytest.mark.skipif(not OFFICIAL.is_file(), reason="GenEval's list is not beside the repository")
def test_the_official_list() -> None:
    entries = read_metadata(OFFICIAL)
    assert len(entries) == 553
    assert Counter(e["tag"] for e in entries.values()) == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    for entry in entries.values():
        assert COCO.parse(entry["prompt"]) == {"exclude": [], **entry}
        # What the prompt asks for is right: targets first, each clause far to the side that it names.
        detections: dict[str, list[Detection]] = {}
        sides = {"left of": (-200, 0), "right of": (200, 0), "above": (0, -200), "below": (0, 200)}
        for clause in entry["include"]:
            x, y = sides[clause["position"][0]] if "position" in clause else (0, 0)
            detections[clause["class"]] = [found(x, y, color=clause.get("color", "red"))] * clause["count"]
        assert judge(detections, entry) == (True, "")
        assert not judge({}, entry)[0]


def test_sampled_prompts_are_parsed_back() -> None:
    rng = np.random.default_rng(6)
    for i in range(500):
        metadata = sample_metadata(rng, TASK_TYPES[i % len(TASK_TYPES)])
        assert SCENES.parse(metadata["prompt"]) == metadata


@pytest.mark.parametrize(
    ("prompt", "include"),
    [
        ("a photo of an orange orange", [{"class": "orange", "count": 1, "color": "orange"}]),
        ("a photo of a purple tv remote", [{"class": "tv remote", "count": 1, "color": "purple"}]),
        ("three benchs", [{"class": "bench", "count": 3}]),
        ("three benches", [{"class": "bench", "count": 3}]),
        ("one sheep", [{"class": "sheep", "count": 1}]),
        ("two sheep", [{"class": "sheep", "count": 2}]),
        ("four people", [{"class": "person", "count": 4}]),
    ],
)
def test_prompts_about_cocos_objects(prompt: str, include: list[dict[str, Any]]) -> None:
    metadata = COCO.parse(prompt)
    assert metadata is not None
    assert metadata["include"] == include
    assert SCENES.parse(prompt) is None


@pytest.mark.parametrize(
    ("prompt", "tag", "include"),
    [
        ("circle", "single_object", [{"class": "circle", "count": 1}]),
        ("one circle", "counting", [{"class": "circle", "count": 1}]),
        ("A photo of an orange  Star.", "colors", [{"class": "star", "count": 1, "color": "orange"}]),
        ("four crosses", "counting", [{"class": "cross", "count": 4}]),
    ],
)
def test_looser_wordings(prompt: str, tag: str, include: list[dict[str, Any]]) -> None:
    metadata = SCENES.parse(prompt)
    assert metadata is not None
    assert (metadata["tag"], metadata["include"], metadata["prompt"]) == (tag, include, prompt)


@pytest.mark.parametrize(
    "prompt",
    ["", "a dog", 'the word "CAT"', "circles", "one crosses", "two star", "a circle and a circle", "a circle near"],
)
def test_other_prompts_have_no_metadata(prompt: str) -> None:
    assert SCENES.parse(prompt) is None


RIGHT = Scene("grey", (Shape("circle", "red", (16.0, 30.0), 20.0), Shape("star", "blue", (46.0, 34.0), 22.0))).draw()


def test_the_scorer_measures_strict_and_graded() -> None:
    prompts = ["a photo of a red circle", "a red circle and a green star", "two stars"]
    measured = load_scorer("geneval").measure(np.stack([RIGHT] * 3), prompts)
    assert measured["geneval"].tolist() == [1.0, 0.0, 0.0]
    assert measured["geneval_graded"].tolist() == [1.0, 0.75, 0.5]
    pictures = [Image.fromarray(RIGHT)] * 3
    assert load_scorer("geneval").score(pictures, prompts).tolist() == [1.0, 0.0, 0.0]
    assert load_scorer("geneval", reward="graded").score(pictures, prompts).tolist() == [1.0, 0.75, 0.5]
    of_flow_grpo = load_scorer("geneval", reward="flow_grpo")
    assert of_flow_grpo.score(pictures, prompts).tolist() == [1.0, 0.75, 0.5]
    assert {"geneval", "geneval_graded", "geneval_flow_grpo"} <= set(of_flow_grpo.measure(pictures, prompts))
    assert "geneval_flow_grpo" not in measured


def test_each_task_type_is_measured_and_the_overall_score_is_their_mean() -> None:
    scorer = load_scorer("geneval")
    prompts = ["a red circle", "a blue star", "a blue circle", "two stars"]
    measured = scorer.measure(np.stack([RIGHT] * 4), prompts)
    assert measured["geneval_colors"] == pytest.approx([1, 1, 0, np.nan], nan_ok=True)
    assert measured["geneval_counting"] == pytest.approx([np.nan, np.nan, np.nan, 0], nan_ok=True)
    assert scorer.overall(prompts) == {"geneval_overall": ("geneval_colors", "geneval_counting")}
    judges = MetricSuite(load_task("geneval").judged_by([EvalChoice(eval="geneval")]))
    found = evaluate_images(np.stack([RIGHT] * 4), None, prompts, range(4), judges)
    record = estimates(found)["geneval_overall"]
    # Two of three colours, and no counting prompt: (2/3 + 0) / 2, where the mean over images is a half.
    assert record.value == pytest.approx(1 / 3)
    assert estimates(found)["geneval"].value == 0.5
    assert (found.roles["geneval_overall"], found.roles["geneval_colors"]) == ("judge", "part")


def test_prompts_that_are_no_scenes_can_be_skipped() -> None:
    scorer = load_scorer("geneval", others="skip")
    prompts = ['the word "CAT"', "a red circle"]
    assert scorer.score(np.stack([RIGHT] * 2), prompts) == pytest.approx([np.nan, 1.0], nan_ok=True)
    assert scorer.overall(prompts) == {"geneval_overall": ("geneval_colors",)}
    assert scorer.score(RIGHT[None], ['the word "CAT"']) == pytest.approx([np.nan], nan_ok=True)


def test_metadata_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    line = {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "blue"}], "prompt": "my star"}
    file.write_text(json.dumps(line) + "\n\n")
    scorer = load_scorer("geneval", metadata=str(file))
    assert scorer.score([Image.fromarray(RIGHT)] * 2, ["my star", "My  STAR"]).tolist() == [1.0, 1.0]
    with pytest.raises(UserError, match=r"'a star'.*prompts\.jsonl"):
        scorer.score([Image.fromarray(RIGHT)], ["a star"])


@pytest.mark.parametrize("separator", ["", "\u2028", "\u2029", "\x85", "\x0b"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_of_prompts_is_its_own_metadata(tmp_path: Path, separator: str, encoding: str) -> None:
    prompts = [f" a photo of{separator} a star", "two stars"]
    entries = [{"include": [{"class": "star", "count": 1}], "prompt": prompt} for prompt in prompts]
    for name, text in (
        ("p.jsonl", "\r\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)),
        ("p.json", json.dumps(entries, indent=4)),
    ):
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert list(read_metadata(tmp_path / name)) == read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is damaged"),
        ('["a star"]', "line 2 must be an object"),
        ('{"prompt": "a star"}', "line 2, is not GenEval metadata: there is no 'include'"),
        ('{"prompt": 3, "include": []}', "line 2, .* the prompt must be a text"),
        ('{"prompt": "a", "include": [{"class": "star", "count": 1, "color": ["red"]}]}', "line 2, .* a color must be a text"),
        ('{"prompt": "a", "include": [{"class": "star", "count": 1, "position": ["above", 0.0]}]}', "line 2, .* position"),
        ('{"prompt": "my star", "include": []}', "line 2, gives 'my star' a second meaning"),
    ],
)
def test_damaged_metadata_is_named_by_its_line(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "my star", "include": [{"class": "star", "count": 1}]}\n' + line)
    with pytest.raises(UserError, match=says):
        read_metadata(tmp_path / "p.jsonl")


def test_a_prompt_without_metadata_is_refused() -> None:
    with pytest.raises(UserError, match="no metadata for the prompt 'a dog'"):
        load_scorer("geneval").score(RIGHT[None], ["a dog"])


def test_a_class_that_the_detector_does_not_know_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"include": [{"class": "bench", "count": 1}], "prompt": "a bench"}))
    with pytest.raises(UserError, match="does not know 'bench'"):
        load_scorer("geneval", metadata=str(file)).score(RIGHT[None], ["a bench"])


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        '{"prompt": "x"}',
        '{"prompt": 3, "include": []}',
        '{"prompt": "x", "include": [{"class": "cup", "count": 0}]}',
        '{"prompt": "x", "include": [{"class": "cup", "count": 1, "position": ["left of", 0]}]}',
    ],
)
def test_a_wrong_metadata_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(line)
    with pytest.raises(UserError, match=r"line 1|holds no GenEval metadata"):
        read_metadata(file)
    with pytest.raises(UserError, match="cannot read"):
        read_metadata(tmp_path / "missing.jsonl")


@pytest.mark.parametrize("other", ["a cup", "A  Cup"])
def test_a_prompt_with_two_meanings_is_refused(tmp_path: Path, other: str) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": p, "include": [{"class": "cup", "count": n}]} for n, p in ((1, "a cup"), (1, other), (2, other))]
    file.write_text("\n".join(json.dumps(line) for line in lines[:2]))
    assert set(read_metadata(file)) == {"a cup", other}
    file.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(UserError, match=r"line 3, gives .* a second meaning"):
        read_metadata(file)


class Blind(ShapesDetector):
    def detect(self, images: list[np.ndarray], colored: Any = None) -> list[Detections]:
        return [{} for _ in images]


class SeesCirclesEverywhere(ShapesDetector):
    def detect(self, images: list[np.ndarray], colored: Any = None) -> list[Detections]:
        return [{**d, "circle": [found(0, color="red")]} for d in super().detect(images)]


def test_the_self_test_passes_a_working_detector_and_refuses_a_broken_one() -> None:
    self_test(ShapesDetector())
    with pytest.raises(RunError, match="Blind fails on its golden image 1"):
        self_test(Blind())
    with pytest.raises(RunError, match="right instead of wrong"):
        self_test(SeesCirclesEverywhere())


def test_the_scorer_tests_itself_once_before_its_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    tested: list[object] = []
    monkeypatch.setattr("evals.geneval.self_test", tested.append)
    scorer = load_scorer("geneval")
    assert tested == []
    scorer.score(RIGHT[None], ["a star"])
    scorer.score(RIGHT[None], ["a star"])
    assert len(tested) == 1
    monkeypatch.undo()
    monkeypatch.setattr(GenEval, "_load_detector", lambda self: Blind())
    with pytest.raises(RunError, match="golden image"):
        load_scorer("geneval").score(RIGHT[None], ["a star"])


def test_a_batch_scores_as_its_pictures_do() -> None:
    rng = np.random.default_rng(7)
    metadata = [sample_metadata(rng, tag) for tag in TASK_TYPES]
    pictures = np.stack([sample_scene(rng, m).draw() for m in metadata])
    prompts = [m["prompt"] for m in metadata]
    scorer = load_scorer("geneval", reward="graded")
    shuffled = np.roll(pictures, 1, axis=0)
    single = [scorer.score(p[None], [q])[0] for p, q in zip(shuffled, prompts, strict=True)]
    assert scorer.score(shuffled, prompts).tolist() == single


def test_pictures_of_any_kind_are_judged() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    scene = Image.fromarray(RIGHT)
    pictures = [
        Image.new("RGB", (64, 64), "black"),
        Image.new("RGB", (64, 64), "white"),
        Image.new("RGBA", (64, 64), (255, 0, 0, 0)),
        Image.new("L", (64, 64), 90),
        Image.fromarray(noise),
        Image.new("RGB", (1, 1), "red"),
        Image.new("RGB", (3, 50), "red"),
        scene.resize((1024, 1024), Image.Resampling.NEAREST),
        scene,
    ]
    scores = load_scorer("geneval").score(pictures, ["a red circle"] * len(pictures))
    assert scores.tolist() == [0] * 7 + [1, 1]
    assert load_scorer("geneval").score([], []).shape == (0,)
