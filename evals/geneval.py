"""geneval: whether the image shows the objects, counts, colours and relations that the prompt asks for.

It computes three scores, of which a run trains on one:

    strict      1 if the image meets all requirements of the prompt, else 0
    graded      the fraction of the requirements that it meets by the same rules; 1 exactly where strict is 1
    flow_grpo   the score of Flow-GRPO's released reward server, which requires exact counts in every task type

Detections are plain data, so recorded ones can be scored, and detectors can be exchanged.

Source: GenEval (Ghosh et al. 2023, arXiv 2310.11513) and its evaluation script; Flow-GRPO (arXiv 2505.05470) and its reward
server.
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
"""By what fraction of the sum of both sizes an offset is reduced (GenEval's position threshold)."""
CLEAR = 0.5
"""The component of the reduced direction from which on a relation holds."""


def judge(detections: Detections, metadata: Mapping[str, Any]) -> tuple[bool, str]:
    """Decides whether detections meet all requirements of a prompt.

    Args:
        detections: class -> list of {box [x0, y0, x1, y1], score, color}, best first.
        metadata: a line of GenEval's list: `include` [{class, count, color?, position? [relation, index of target]}], all of
            which must hold, and `exclude` [{class, count}], none of which may hold.

    Returns:
        Whether all requirements are met, and one line for each that is not.

    Source: GenEval's evaluation script.
    """
    failures, _ = _check(detections, metadata)
    return not failures, "\n".join(failures)


def graded(detections: Detections, metadata: Mapping[str, Any]) -> float:
    """Computes the fraction of the requirements that detections meet. Each clause's count, colour and position is one.

    A count contributes 1 - |detected - required| / required, but at least 0. More objects than required are an error only if an
    exclude clause says so, as in every counting prompt. This is not Flow-GRPO's score; `flow_grpo` is.

    Args:
        detections: as for `judge`.
        metadata: as for `judge`.

    Returns:
        0 to 1.
    """
    _, shares = _check(detections, metadata)
    return sum(shares) / len(shares) if shares else 1.0


def flow_grpo(detections: Detections, metadata: Mapping[str, Any]) -> float:
    """Computes the score of Flow-GRPO's released reward server, which is a mean over requirements.

    Each include clause contributes 1 - |detected - required| / required for its count, which can be negative. If the count is
    not exact, its colour and position together contribute one 0. Otherwise its colour contributes 1 - |objects of that colour -
    required| / required. If all objects have that colour, its position contributes 0 if the target's clause failed, 1 if the
    relation holds, and both a 0 and a 1 if it does not. Exclude clauses are ignored.

    Args:
        detections: as for `judge`.
        metadata: as for `judge`.

    Returns:
        At most 1, and negative for many surplus objects.
    """
    shares: list[float] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", []):
        required, objects = clause["count"], detections.get(clause["class"], [])
        shares.append(1 - abs(len(objects) - required) / required)
        holds = len(objects) == required
        if not holds and ("color" in clause or "position" in clause):
            shares.append(0.0)
        if holds and "color" in clause:
            colored = sum(d.get("color") == clause["color"] for d in objects)
            shares.append(1 - abs(colored - required) / required)
            holds = colored == required
        if holds and "position" in clause:
            if matched[clause["position"][1]] is None:
                shares.append(0.0)
                holds = False
            else:
                holds = not _position_failure(objects, clause, matched)
                shares += [1.0] if holds else [0.0, 1.0]
        matched.append(objects if holds else None)
    return sum(shares) / len(shares) if shares else 0.0


def relations(a: Detection, b: Detection) -> set[str]:
    """Determines where `a` is relative to `b`: up to two of left of, right of, above, below.

    The offset of the box centres is reduced by 0.1 * (size a + size b) along each axis, but not below 0, and then divided by
    its original length. A relation holds if its component is above 0.5 (GenEval's evaluation script).
    """
    corners_a, corners_b = (np.asarray(d["box"], dtype=np.float64).reshape(2, 2) for d in (a, b))
    offset = corners_a.mean(axis=0) - corners_b.mean(axis=0)
    sizes = np.abs(corners_a[1] - corners_a[0]) + np.abs(corners_b[1] - corners_b[0])
    reduced = np.sign(offset) * np.maximum(np.abs(offset) - SHRINK * sizes, 0)
    if (np.abs(reduced) < 1e-3).all():
        return set()
    direction = reduced / np.linalg.norm(offset)
    return {relation for relation, axis in RELATIONS.items() if direction @ axis > CLEAR}


def _check(detections: Detections, metadata: Mapping[str, Any]) -> tuple[list[str], list[float]]:
    """The failures in words, and the fraction to which each requirement is met."""
    failures: list[str] = []
    shares: list[float] = []
    matched: list[Sequence[Detection] | None] = []
    excluded = {clause["class"]: clause["count"] for clause in metadata.get("exclude", [])}
    for clause in metadata.get("include", []):
        name, required = clause["class"], clause["count"]
        objects = detections.get(name, [])
        considered = objects[:required]
        excess = max(len(objects) - max(required, excluded.pop(name, np.inf) - 1), 0)
        shares.append(max(1 - (max(required - len(objects), 0) + excess) / required, 0.0))
        clause_failures: list[str] = []
        if len(objects) < required:
            clause_failures.append(f"expected {name}>={required}, found {len(objects)}")
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
    """Why a clause's colour does not hold; empty if it does."""
    colors = [d.get("color", "no colour") for d in considered]
    if colors.count(clause["color"]) >= clause["count"]:
        return ""
    counts = ", ".join(f"{colors.count(c)} {c}" for c in sorted(set(colors)))
    return f"expected {clause['color']} {clause['class']}>={clause['count']}, found {counts}"


def _position_failure(
    considered: Sequence[Detection], clause: Mapping[str, Any], matched: Sequence[Sequence[Detection] | None]
) -> str:
    """Why a clause's position does not hold; empty if it does."""
    relation, index = clause["position"]
    targets = matched[index]
    if targets is None:
        return f"no target for {clause['class']} to be {relation}"
    for detection in considered:
        for target in targets:
            actual = relations(detection, target)
            if relation not in actual:
                words = " and ".join(sorted(actual)) or "in no clear relation to"
                return f"expected {clause['class']} {relation} target, found {words} target"
    return ""


def read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """Reads metadata in GenEval's layout from a file of JSON lines or a JSON list: prompt -> metadata.

    Raises:
        UserError: there is no such file, a line does not have that layout, or a prompt has two different meanings.
    """
    entries: dict[str, dict[str, Any]] = {}
    first: dict[str, dict[str, Any]] = {}
    for place, line in read_objects(path, "GenEval metadata"):
        try:
            entry = _checked_entry(line)
        except (ValueError, TypeError, KeyError) as error:
            reason = f"there is no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{place}, is not GenEval metadata: {reason}") from error
        same = first.setdefault(prompt_identity(entry["prompt"]), entry)
        if {**same, "prompt": entry["prompt"]} != entry:
            raise UserError(f"{place}, gives {excerpt(entry['prompt'])} a second meaning; keep one of them")
        entries[entry["prompt"]] = entry
    return entries


def _checked_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """Checks a line of metadata, and removes white space around its prompt as the readers of prompt files do."""
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
    """Checks a detector on its golden images, of which some meet their metadata and others do not.

    Raises:
        RunError: a result is not the expected one.
    """
    images, metadata, expectations = zip(*detector.golden(), strict=True)
    detections_of_images = detector.detect(list(images))
    cases = zip(detections_of_images, metadata, expectations, strict=True)
    for number, (detections, entry, expected) in enumerate(cases, start=1):
        correct, reason = judge(detections, entry)
        if correct != expected:
            raise RunError(
                f"the detector {type(detector).__name__} fails on its golden image {number}, {entry['prompt']!r}: "
                f"{'right' if correct else 'wrong'} instead of {'right' if expected else 'wrong'}"
                + (f" ({'; '.join(reason.splitlines())})" if reason else "")
            )


class GenEval(Scorer):
    """Requirements of a prompt that an image meets, by an object detector."""

    class Settings(settings.Settings):
        reward: Literal["strict", "graded", "flow_grpo"] = "strict"
        """What a run trains on. strict: 1 if all requirements are met, else 0. graded: the fraction of the requirements that
        are met. flow_grpo: the score of Flow-GRPO's reward server."""
        detector: Literal["shapes", "mask2former"] = "shapes"
        """Which detector finds the objects. shapes: for drawn scenes. mask2former: for COCO's 80 classes in photographs."""
        model: str = "facebook/mask2former-swin-small-coco-instance"
        """With `detector: mask2former`, its model: a local folder or a hub id."""
        colors: str = "openai"
        """With `detector: mask2former`, the weights of open_clip's ViT-L-14, which names colours: a tag or a local file."""
        device: settings.Device = "auto"
        """With `detector: mask2former`, the device that its models run on: `auto` (CUDA if there is one, else the CPU), `cpu`,
        `cuda` or `cuda:N`."""
        batch: int = Field(8, ge=1)
        """With `detector: mask2former`, the largest number of images, or of crops whose colour is named, at a time."""
        metadata: str = ""
        """A file of JSON lines in GenEval's layout with the metadata of each prompt. If it is empty, prompts are parsed, and
        must have GenEval's wording."""
        others: Literal["refuse", "skip"] = "refuse"
        """What becomes of a prompt without metadata. refuse: it is an error. skip: its images get no score, for tasks in which
        only some prompts are scenes."""

    settings: Settings
    skip_settings: ClassVar[dict[str, Any]] = {"others": "skip"}

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._detector: Detector | None = None
        self._metadata: dict[str, dict[str, Any]] | None = None

    @property
    def detector(self) -> Detector:
        """The detector, which is opened and checked on its golden images on first use."""
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
        self.detector  # noqa: B018 - opens and checks it

    def metadata_of(self, prompt: str) -> dict[str, Any] | None:
        """Finds the metadata of a prompt; None if it has none and `others` is `skip`.

        Raises:
            UserError: the prompt has no metadata, or it asks for something that the detector cannot find.
        """
        if self.settings.metadata:
            if self._metadata is None:
                entries = read_metadata(Path(self.settings.metadata).expanduser())
                self._metadata = {prompt_identity(each): entry for each, entry in entries.items()}
            entry = self._metadata.get(prompt_identity(prompt))
        else:
            entry = self.detector.grammar.parse(prompt)
        if entry is None and self.settings.others == "skip":
            return None
        if entry is None:
            where = self.settings.metadata or f"the wordings that the detector {self.settings.detector!r} knows"
            remedy = "set geneval's metadata to a file that has it, or others=skip to give such prompts no score"
            raise UserError(f"there is no metadata for the prompt {excerpt(prompt)} in {where}; {remedy}")
        for clause in [*entry["include"], *entry.get("exclude", [])]:
            for word, words in ((clause["class"], self.detector.classes), (clause.get("color"), self.detector.colors)):
                if word is not None and word not in words:
                    name = self.settings.detector
                    raise UserError(f"the detector {name!r} does not know {word!r}, which {excerpt(prompt)} asks for")
        return entry

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            self.metadata_of(prompt)

    def detect(self, images: Images) -> list[Detections]:
        """Finds the objects in each image."""
        return self.detector.detect(as_arrays(images))

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        return self._scores(images, prompts)[self.settings.reward]

    def measure(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        measured = self._scores(images, prompts)
        tags = np.array(self._tags(prompts))
        by_tag = {f"{self.name}_{tag}": np.where(tags == tag, measured["strict"], np.nan) for tag in sorted({*tags} - {""})}
        others = ["graded"] if self.settings.reward != "flow_grpo" else ["graded", "flow_grpo"]
        return {self.name: measured["strict"], **{f"{self.name}_{kind}": measured[kind] for kind in others}, **by_tag}

    def overall(self, prompts: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Names GenEval's overall score: the mean of the accuracies of those task types that the prompts have."""
        tags = sorted({*self._tags(prompts)} - {""})
        return {f"{self.name}_overall": tuple(f"{self.name}_{tag}" for tag in tags)} if tags else {}

    def _tags(self, prompts: Sequence[str]) -> list[str]:
        """The task type of each prompt; empty if the prompt is skipped or its metadata names none."""
        return [str((self.metadata_of(prompt) or {}).get("tag", "")) for prompt in prompts]

    def _scores(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Each of the three scores of each image, float64 [N]; NaN for prompts that are skipped."""
        arrays, metadata = as_arrays(images), [self.metadata_of(p) for p in prompts]
        entries = [(i, entry) for i, entry in enumerate(metadata) if entry is not None]
        scores = {reward: np.full(len(prompts), np.nan) for reward in ("strict", "graded", "flow_grpo")}
        colored = [{clause["class"] for clause in entry["include"] if "color" in clause} for _, entry in entries]
        detections_of_images = self.detector.detect([arrays[i] for i, _ in entries], colored)
        for (i, entry), detections in zip(entries, detections_of_images, strict=True):
            considered = self.detector.considered(detections, entry)
            scores["strict"][i] = float(judge(considered, entry)[0])
            scores["graded"][i] = graded(considered, entry)
            scores["flow_grpo"][i] = flow_grpo(considered, entry)
        return scores

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **self.detector.describe()}
