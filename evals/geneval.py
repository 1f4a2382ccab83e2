"""geneval: whether the picture shows the objects, counts, colours and relations that the prompt asks for.

The rules of GenEval (arXiv 2310.11513 and its evaluation script). What a detector found is judged as plain data, so
that recorded detections can be scored and detectors can be swapped. `strict` is 1 for a picture in which all holds and
0 for others; `graded` is the share of what holds by the same rules: 1 exactly where strict is 1. `flow_grpo` is the score
that Flow-GRPO's released reward server (arXiv 2505.05470) answers: it demands exact counts in every task type.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from alignbench import RunError, Scorer, UserError, settings
from alignbench.embedded.drawing.scenes import RELATIONS
from alignbench.files.text import excerpt, prompt_identity
from alignbench.files.text_files import read_objects, stripped
from alignbench.scorer import Images, as_arrays
from evals.detectors.base import Detection, Detections, Detector

SHRINK = 0.1
"""Share of both sizes by which an offset counts as none (GenEval's position threshold)."""
CLEAR = 0.5
"""Smallest component of the shrunk direction that makes a relation."""


def judge(detections: Detections, metadata: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the detections fulfil the metadata of a prompt, and if not, why: a line for each failure.

    Args:
        detections: class -> list of {box [x0, y0, x1, y1], score, color}, best first.
        metadata: a line of GenEval's list: `include` [{class, count, color?, position? [relation, index of target]}],
            all of which must hold, and `exclude` [{class, count}], none of which may.
    """
    failures, _ = _check(detections, metadata)
    return not failures, "\n".join(failures)


def graded(detections: Detections, metadata: Mapping[str, Any]) -> float:
    """The share of satisfied requirements, 0..1: each clause's count, colour and position is one requirement.

    A count gives 1 - |found - asked| / asked, floored at 0. More than asked is a fault only where an exclude clause
    says so, as it does for every counting prompt. This is not Flow-GRPO's score; `flow_grpo` is.
    """
    _, shares = _check(detections, metadata)
    return sum(shares) / len(shares) if shares else 1.0


def flow_grpo(detections: Detections, metadata: Mapping[str, Any]) -> float:
    """The score of Flow-GRPO's released reward server: the mean over requirements, at most 1, negative for many extra objects.

    Each include clause gives 1 - |found - asked| / asked for its count, without a floor. Unless exactly as many were found
    as asked for, its colour and its position together give one 0. Otherwise its colour gives 1 - |of that colour - asked| /
    asked; and where all have the colour, its position gives 0 if the target's clause failed, 1 if it holds, and both a 0 and
    a 1 if it does not. Exclude clauses have no part in it.
    """
    shares: list[float] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", []):
        asked, found = clause["count"], detections.get(clause["class"], [])
        shares.append(1 - abs(len(found) - asked) / asked)
        holds = len(found) == asked
        if not holds and ("color" in clause or "position" in clause):
            shares.append(0.0)
        if holds and "color" in clause:
            colored = sum(d.get("color") == clause["color"] for d in found)
            shares.append(1 - abs(colored - asked) / asked)
            holds = colored == asked
        if holds and "position" in clause:
            if matched[clause["position"][1]] is None:
                shares.append(0.0)
                holds = False
            else:
                holds = not _position_failure(found, clause, matched)
                shares += [1.0] if holds else [0.0, 1.0]
        matched.append(found if holds else None)
    return sum(shares) / len(shares) if shares else 0.0


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` is relative to `b`: up to two of left of, right of, above, below.

    The offset of the box centres shrinks towards 0 by 0.1 * (size a + size b) in each axis, and is then divided by the
    length that it had before.
    """
    corners_a, corners_b = (np.asarray(d["box"], dtype=np.float64).reshape(2, 2) for d in (a, b))
    offset = corners_a.mean(axis=0) - corners_b.mean(axis=0)
    sizes = np.abs(corners_a[1] - corners_a[0]) + np.abs(corners_b[1] - corners_b[0])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - SHRINK * sizes, 0)
    if (np.abs(shrunk) < 1e-3).all():
        return set()
    direction = shrunk / np.linalg.norm(offset)
    return {relation for relation, axis in RELATIONS.items() if direction @ axis > CLEAR}


def _check(detections: Detections, metadata: Mapping[str, Any]) -> tuple[list[str], list[float]]:
    """The failures in words, and the share to which each requirement is satisfied."""
    failures: list[str] = []
    shares: list[float] = []
    matched: list[Sequence[Detection] | None] = []
    excluded = {clause["class"]: clause["count"] for clause in metadata.get("exclude", [])}
    for clause in metadata.get("include", []):
        name, asked = clause["class"], clause["count"]
        found = detections.get(name, [])
        considered = found[:asked]
        excess = max(len(found) - max(asked, excluded.pop(name, np.inf) - 1), 0)
        shares.append(max(1 - (max(asked - len(found), 0) + excess) / asked, 0.0))
        clause_failures: list[str] = []
        if len(found) < asked:
            clause_failures.append(f"expected {name}>={asked}, found {len(found)}")
        elif "color" in clause and (failure := _color_failure(considered, clause)):
            clause_failures.append(failure)
        if "color" in clause:
            shares.append(float(not clause_failures))
        if "position" in clause:
            if not clause_failures and (failure := _position_failure(considered, clause, matched)):
                clause_failures.append(failure)
            shares.append(float(not clause_failures))
        matched.append(None if clause_failures else considered)
        failures += clause_failures
    for clause in metadata.get("exclude", []):
        name, count = clause["class"], len(detections.get(clause["class"], []))
        if count >= clause["count"]:
            failures.append(f"expected {name}<{clause['count']}, found {count}")
        if name in excluded:
            shares.append(float(count < clause["count"]))
    return failures, shares


def _color_failure(considered: Sequence[Detection], clause: Mapping[str, Any]) -> str:
    colors = [d.get("color", "no colour") for d in considered]
    if colors.count(clause["color"]) >= clause["count"]:
        return ""
    seen = ", ".join(f"{colors.count(c)} {c}" for c in sorted(set(colors)))
    return f"expected {clause['color']} {clause['class']}>={clause['count']}, found {seen}"


def _position_failure(
    considered: Sequence[Detection], clause: Mapping[str, Any], matched: Sequence[Sequence[Detection] | None]
) -> str:
    relation, index = clause["position"]
    targets = matched[index]
    if targets is None:
        return f"no target for {clause['class']} to be {relation}"
    for one in considered:
        for target in targets:
            seen = relations(one, target)
            if relation not in seen:
                found = " and ".join(sorted(seen)) or "in no clear relation to"
                return f"expected {clause['class']} {relation} target, found {found} target"
    return ""


def read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """Prompt -> metadata, from JSON lines (or a JSON list) in GenEval's layout.

    Raises:
        UserError: no such file, a line that is not of that layout, or a prompt with two different meanings.
    """
    entries: dict[str, dict[str, Any]] = {}
    first: dict[str, dict[str, Any]] = {}
    for place, found in read_objects(path, "GenEval metadata"):
        try:
            entry = _checked_entry(found)
        except (ValueError, TypeError, KeyError) as error:
            reason = f"there is no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{place}, is no GenEval metadata: {reason}") from error
        same = first.setdefault(prompt_identity(entry["prompt"]), entry)
        if {**same, "prompt": entry["prompt"]} != entry:
            raise UserError(f"{place}, gives {excerpt(entry['prompt'])} a second meaning; keep one of them")
        entries[entry["prompt"]] = entry
    return entries


def _checked_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """With the prompt as prompt files are read, without blanks around it."""
    if not isinstance(entry["prompt"], str):
        raise TypeError("the prompt must be a text")
    for index, clause in enumerate(entry["include"]):
        if "position" in clause:
            relation, target = clause["position"]
            if relation not in RELATIONS or not isinstance(target, int) or target not in range(index):
                raise ValueError(f"position {excerpt(clause['position'])} must be a known relation to an earlier clause")
    for clause in [*entry["include"], *entry.get("exclude", [])]:
        if not isinstance(clause["class"], str) or not isinstance(clause["count"], int) or clause["count"] < 1:
            raise ValueError(f"a clause needs a class and a count of at least 1, got {excerpt(clause)}")
        if not isinstance(clause.get("color", ""), str):
            raise TypeError(f"a color must be a text, got {excerpt(clause['color'])}")
    return {**entry, "prompt": stripped(entry["prompt"])}


def self_test(detector: Detector) -> None:
    """MetricSuite the detector's golden pictures, right and wrong ones.

    Raises:
        RunError: an answer is not the known one.
    """
    pictures, metadata, answers = zip(*detector.golden(), strict=True)
    found = detector.detect(list(pictures))
    for number, (detections, entry, answer) in enumerate(zip(found, metadata, answers, strict=True), start=1):
        correct, reason = judge(detections, entry)
        if correct != answer:
            raise RunError(
                f"the detector {type(detector).__name__} fails on its golden picture {number}, {entry['prompt']!r}: "
                f"{'right' if correct else 'wrong'} instead of {'right' if answer else 'wrong'}"
                + (f" ({'; '.join(reason.splitlines())})" if reason else "")
            )


class GenEval(Scorer):
    class Settings(settings.Settings):
        reward: Literal["strict", "graded", "flow_grpo"] = "strict"
        """What `score` gives: 1 where all holds, else 0; the share of what holds; or the score of Flow-GRPO's reward server."""
        detector: Literal["shapes", "mask2former"] = "shapes"
        """Who finds the objects: `shapes` knows drawn scenes, `mask2former` COCO's 80 classes in photographs."""
        model: str = "facebook/mask2former-swin-small-coco-instance"
        """Of `mask2former`: a local folder or a hub id."""
        colors: str = "openai"
        """Of `mask2former`: weights of open_clip's ViT-L-14 that name colours, a tag or a local file."""
        device: settings.Device = "auto"
        """Of `mask2former`."""
        batch: int = Field(8, ge=1)
        """Of `mask2former`: pictures of one size, or crops whose colour is named, at a time."""
        metadata: str = ""
        """A jsonl file in GenEval's layout with each prompt's metadata; without it, prompts must be worded as GenEval's are."""
        others: Literal["refuse", "skip"] = "refuse"
        """What becomes of a prompt without metadata: an error, or no score, for tasks where only some prompts are scenes."""

    settings: Settings
    skip_settings: ClassVar[dict[str, Any]] = {"others": "skip"}

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._detector: Detector | None = None
        self._metadata: dict[str, dict[str, Any]] | None = None

    @property
    def detector(self) -> Detector:
        """The detector, once it has passed its golden pictures."""
        if self._detector is None:
            detector = self._load_detector()
            self_test(detector)
            self._detector = detector
        return self._detector

    def _load_detector(self) -> Detector:
        if self.settings.detector == "mask2former":
            from evals.detectors.mask2former import Mask2FormerDetector

            o = self.settings
            return Mask2FormerDetector(o.model, o.colors, o.device, o.batch)
        from evals.detectors.shapes import ShapesDetector

        return ShapesDetector()

    def from_hub(self) -> list[str]:
        if self.settings.detector != "mask2former":
            return []
        from evals.detectors.mask2former import COLOR_MODEL
        from evals.embedders.open_clip import tag_on_hub

        return [self.settings.model, *tag_on_hub(COLOR_MODEL, self.settings.colors)]

    def prepare(self) -> None:
        self.detector  # noqa: B018  (loads and tests it)

    def metadata_of(self, prompt: str) -> dict[str, Any] | None:
        """What the prompt asks for; None where nothing is known about it and `others` says to skip it.

        Raises:
            UserError: nothing is known about this prompt, or it asks for what the detector cannot find.
        """
        if self.settings.metadata:
            if self._metadata is None:
                entries = read_metadata(Path(self.settings.metadata).expanduser())
                self._metadata = {prompt_identity(known): entry for known, entry in entries.items()}
            entry = self._metadata.get(prompt_identity(prompt))
        else:
            entry = self.detector.grammar.parse(prompt)
        if entry is None and self.settings.others == "skip":
            return None
        if entry is None:
            where = self.settings.metadata or f"the wordings that {self.settings.detector!r} knows"
            what_to_do = "set geneval's metadata to a file that has it, or others=skip to pass over such prompts"
            raise UserError(f"no metadata for the prompt {excerpt(prompt)} in {where}; {what_to_do}")
        for clause in [*entry["include"], *entry.get("exclude", [])]:
            for word, known in ((clause["class"], self.detector.classes), (clause.get("color"), self.detector.colors)):
                if word is not None and word not in known:
                    raise UserError(f"detector {self.settings.detector!r} knows no {word!r}, which {excerpt(prompt)} asks for")
        return entry

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            self.metadata_of(prompt)

    def detect(self, images: Images) -> list[Detections]:
        """What each picture shows."""
        return self.detector.detect(as_arrays(images))

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        return self._scores(images, prompts)[self.settings.reward]

    def measure(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        measured = self._scores(images, prompts)
        tags = np.array(self._tags(prompts))
        by_tag = {f"{self.name}_{tag}": np.where(tags == tag, measured["strict"], np.nan) for tag in sorted({*tags} - {""})}
        further = ["graded"] if self.settings.reward != "flow_grpo" else ["graded", "flow_grpo"]
        return {self.name: measured["strict"], **{f"{self.name}_{kind}": measured[kind] for kind in further}, **by_tag}

    def overall(self, prompts: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """GenEval's headline: the mean of the accuracies of the task types that the prompts have."""
        tags = sorted({*self._tags(prompts)} - {""})
        return {f"{self.name}_overall": tuple(f"{self.name}_{tag}" for tag in tags)} if tags else {}

    def _tags(self, prompts: Sequence[str]) -> list[str]:
        """The task type of each prompt; empty where it is skipped or its metadata names none."""
        return [str((self.metadata_of(prompt) or {}).get("tag", "")) for prompt in prompts]

    def _scores(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Kind of reward -> that of each image."""
        pictures, metadata = as_arrays(images), [self.metadata_of(p) for p in prompts]
        asked = [(i, entry) for i, entry in enumerate(metadata) if entry is not None]
        found = {reward: np.full(len(prompts), np.nan) for reward in ("strict", "graded", "flow_grpo")}
        colored = [{clause["class"] for clause in entry["include"] if "color" in clause} for _, entry in asked]
        detected = self.detector.detect([pictures[i] for i, _ in asked], colored)
        for (i, entry), detections in zip(asked, detected, strict=True):
            kept = self.detector.considered(detections, entry)
            found["strict"][i], found["graded"][i] = float(judge(kept, entry)[0]), graded(kept, entry)
            found["flow_grpo"][i] = flow_grpo(kept, entry)
        return found

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **self.detector.describe()}
