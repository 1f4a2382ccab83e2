"""ocr: how much of the quoted text a reader finds in the image, from 0 to 1, and whether it finds exactly that text.

With d the Levenshtein distance of the text read and the target, and n the length of the target:

    score: flow_grpo    1 - min(d, n) / n, without case and spaces; 1 if the text read contains the target
    score: tmpo         1 - d / length of the longer text, with case and spaces

Both texts are compared in one normal form (`alignbench.files.text`). `ocr_exact` is 1 if they are equal in it, else 0.

There are two independent readers: EasyOCR (CRAFT and a CRNN) and RapidOCR (PP-OCR on onnxruntime). Train on one and use the
other as a judge. A small image contains one line of text: its place is found by contrast, and only the recogniser reads the
crop. Large images go through the reader's own text detector.

Source: the rewards of Flow-GRPO's text-rendering task (arXiv 2505.05470) and of TMPO's released code (arXiv 2605.10983).
"""

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from rapidfuzz.distance import Levenshtein

from alignbench import Scorer, UserError, settings
from alignbench.files.text import excerpt
from alignbench.scorer import Images, as_arrays
from evals.readers.base import Reader, locate
from evals.readers.easyocr import EasyOCRReader
from evals.readers.forms import Score, compared_form, normalised
from evals.readers.rapidocr import RapidOCRReader

SMALL = 128
"""The largest side, in pixels, of an image whose text is located by contrast."""
MARKS = re.compile('"+|[\u201c\u201d\u201e]')
"""Double quotation marks: runs of straight ones, and single curly and low ones."""
CLOSERS = {"\u201c": '\u201d"', "\u201d": "\u201d", "\u201e": '\u201c\u201d"'}
"""Opening mark -> the marks that close it. A run of straight marks is closed by an equal run; a single one also by a curly
mark."""
OTHER_MARKS = re.compile("[\u00ab\u00bb\u2039\u203a\u201f\u2033\u300c-\u300f\u301d-\u301f\uff02\u275d\u275e]|``|(?<!\\d)''")
"""Marks that may quote a text as well, but are not accepted."""
BEFORE_QUOTES, AFTER_QUOTES = "([{<=:;,/-\u2013\u2014", ".,:;!?)]}>/-'\u2019\u2013\u2014\u2026"
"""Characters that may be between a space and an opening mark, and between a closing mark and a space."""


class UnclearQuotesError(ValueError):
    """It is unclear which text a prompt quotes. The message says why."""


def target_text(prompt: str) -> str:
    """Finds the text that the image of a prompt should show: the text in double quotes; several quotations are joined by a
    space.

    Raises:
        UserError: the prompt quotes nothing, or it is unclear what it quotes.
    """
    hint = "(with the setting unquoted=skip of ocr such prompts get no score)"
    try:
        text = " ".join(_spans_of(prompt))
    except UnclearQuotesError as error:
        raise UserError(
            f"it is unclear which text {excerpt(prompt)} quotes: {error}; put it in double quotes once {hint}"
        ) from None
    if not text:
        raise UserError(f"ocr needs a text in double quotes in each prompt; {excerpt(prompt)} has none {hint}")
    return text


def quoted_text(prompt: str) -> str:
    """Finds the text in double quotes as `target_text` does, but returns an empty text where that raises an error."""
    try:
        return " ".join(_spans_of(prompt))
    except UnclearQuotesError:
        return ""


def unquoted_words(prompt: str) -> str:
    """Removes the quotations from a prompt; returns the whole prompt if they are unclear."""
    text = _unescaped(prompt)
    try:
        spans = _quotations(text)
    except UnclearQuotesError:
        return text
    return " ".join(_outside(text, spans))


def _spans_of(prompt: str) -> list[str]:
    """The quoted texts of a prompt that contain more than white space; raises UnclearQuotesError."""
    text = _unescaped(prompt)
    spans = _quotations(text)
    if other := next(filter(None, map(OTHER_MARKS.search, _outside(text, spans))), None):
        raise UnclearQuotesError(f"{other[0]} may quote a text as well")
    quoted = (text[start:end].strip('"\u201c\u201d\u201e').strip() for start, end in spans)
    return [span for span in quoted if normalised(span)]


def _unescaped(prompt: str) -> str:
    """Restores quotation marks that were escaped for JSON or a shell."""
    return prompt.replace('\\"', '"')


def _outside(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """The parts of a text before, between and after the spans."""
    ends = [0, *(end for _, end in spans)]
    return [text[end:start] for end, start in zip(ends, [*(start for start, _ in spans), len(text)], strict=True)]


def _quotations(text: str) -> list[tuple[int, int]]:
    """Finds where each quotation begins and ends, including its marks.

    A quotation touches its marks. A mark after a digit, outside of a quotation, means inches. Marks that these rules do not
    explain are refused, because a wrong span would be scored as if it were the text.

    Raises:
        UnclearQuotesError: a mark is not closed, or can neither open nor close a quotation at its place.
    """
    spans: list[tuple[int, int]] = []
    opening: re.Match[str] | None = None
    for mark in MARKS.finditer(text):
        before, after = text[mark.start() - 1 : mark.start()], text[mark.end() : mark.end() + 1]
        spaced_before, spaced_after = not before or before.isspace(), not after or after.isspace()
        opens = not spaced_after and (spaced_before or (before in BEFORE_QUOTES and after not in AFTER_QUOTES))
        closes = not spaced_before and (spaced_after or after in AFTER_QUOTES)
        if opening is None:
            if len(mark[0]) > 1 and spaced_before and (spaced_after or after in AFTER_QUOTES):
                continue  # an empty quotation
            if mark[0] in ('"', "\u201d") and _after_digit(text, mark.start(), spaced_after):
                continue
            if spaced_after or (closes and not opens):
                raise UnclearQuotesError(f"{_where(text, mark)} cannot open a quotation")
            opening = mark
        else:
            if mark[0] not in _closers(opening[0]) or spaced_before or (opens and not closes):
                raise UnclearQuotesError(f"{_where(text, mark)} cannot close a quotation")
            spans.append((opening.start(), mark.end()))
            opening = None
    if opening is not None:
        raise UnclearQuotesError(f"the mark {opening[0]} before {text[opening.end() : opening.end() + 20]!r} is not closed")
    return spans


def _where(text: str, mark: re.Match[str]) -> str:
    """Describes a mark and its place, for messages."""
    return f"the mark {mark[0]} after {text[max(mark.start() - 20, 0) : mark.start()]!r}"


def _closers(opening: str) -> tuple[str, ...]:
    """The marks that close a quotation that begins with this mark."""
    if opening.startswith('"'):
        return (opening, "\u201d") if opening == '"' else (opening,)
    return tuple(CLOSERS[opening])


def _after_digit(text: str, place: int, spaced_after: bool) -> bool:
    """Tells whether a digit comes before a place, possibly separated by a space if another space follows."""
    before = text[place - 1 : place]
    if spaced_after and before == " ":
        before = text[place - 2 : place - 1]
    return before.isnumeric()


def similarity(read: str, target: str, score: Score = "flow_grpo") -> float:
    """Computes how similar a reading is to its target, from 0 to 1.

    Args:
        read: the text that was read.
        target: the text that the image should show.
        score: `flow_grpo` (arXiv 2505.05470) is 1 - min(d, n) / n without case and spaces, with d the Levenshtein distance and
            n the length of the target, and 1 if the reading contains the target. `tmpo` (the released code of arXiv 2605.10983)
            is 1 - d / length of the longer text, with case and spaces.

    Raises:
        UserError: the target is empty.
    """
    read, target = compared_form(read, score), compared_form(target, score)
    if not target:
        raise UserError("the target text is empty")
    if score == "tmpo":
        return 1.0 - Levenshtein.distance(read, target) / max(len(read), len(target))
    if target in read:
        return 1.0
    return 1.0 - min(Levenshtein.distance(read, target), len(target)) / len(target)


class OCR(Scorer):
    """Similarity of the text read in an image and the text that its prompt quotes."""

    class Settings(settings.Settings):
        reader: Literal["easyocr", "rapidocr"] = "easyocr"
        """Which reader reads the images. Train on one and use the other as a judge."""
        locate: Literal["auto", "contrast", "detect"] = "auto"
        """How the text is located. contrast: as the part of the image that contrasts with its rim. detect: by the reader's text
        detector. auto: by contrast in images up to 128 pixels, else by the detector."""
        characters: Literal["all", "letters"] = "all"
        """Which characters EasyOCR may return: all that it knows, or only letters. RapidOCR always uses all."""
        device: settings.Device = "cpu"
        """The device that EasyOCR runs on: `auto` (CUDA if there is one, else the CPU), `cpu`, `cuda` or `cuda:N`. CPU and GPU
        can read differently."""
        unquoted: Literal["refuse", "skip"] = "refuse"
        """What becomes of a prompt that quotes no text, an unclear text, or a text with characters that the reader does not
        know. refuse: it is an error. skip: its images get no score, for tasks in which only some prompts quote a text."""
        score: Score = "flow_grpo"
        """Which similarity is computed. flow_grpo: without case and spaces, and 1 if the reading contains the target. tmpo:
        that of TMPO's released code, in which case, spaces and surplus text count."""
        precision: Literal["fp32", "bf16", "auto"] = "fp32"
        """The precision in which EasyOCR's recogniser computes the features of a crop. bf16: bfloat16, by autocast, which takes
        a little more than half of the time and changes few readings (one of 384 in docs/evals.md). auto: bf16 where the device
        has instructions for it. Detectors and RapidOCR stay in float32."""
        batch: int = Field(16, ge=1)
        """The largest number of crops that EasyOCR reads at a time. The readings do not depend on it. On CPUs larger batches do
        not fit into the caches."""

    settings: Settings
    skip_settings: ClassVar[dict[str, Any]] = {"unquoted": "skip"}

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._reader: Reader | None = None

    @property
    def reader(self) -> Reader:
        """The reader, which is opened on first use."""
        if self._reader is None:
            o = self.settings
            is_easyocr = o.reader == "easyocr"
            self._reader = EasyOCRReader(o.device, o.batch, o.characters, o.precision) if is_easyocr else RapidOCRReader()
        return self._reader

    def prepare(self) -> None:
        self.reader  # noqa: B018 - opens it

    def read(self, images: Images) -> list[str]:
        """Reads the text in each image."""
        arrays = as_arrays(images)
        by_contrast = [self._by_contrast(array) for array in arrays]
        lines = iter(self.reader.read_lines([locate(a) for a, contrast in zip(arrays, by_contrast, strict=True) if contrast]))
        pages = iter(self.reader.read_pages([a for a, contrast in zip(arrays, by_contrast, strict=True) if not contrast]))
        return [next(lines if contrast else pages) for contrast in by_contrast]

    def _by_contrast(self, image: np.ndarray) -> bool:
        """Tells whether the text of an image is located by contrast."""
        return self.settings.locate == "contrast" or (self.settings.locate == "auto" and max(image.shape[:2]) <= SMALL)

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        return self.measure(images, prompts)[self.name]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            self._target(prompt)

    def _target(self, prompt: str) -> str:
        """The text that an image of the prompt should show; empty for a prompt that is skipped.

        Raises:
            UserError: there is no text that this reader can read, and such prompts are not skipped.
        """
        skips = self.settings.unquoted == "skip"
        text = quoted_text(prompt) if skips else target_text(prompt)
        if text and (unknown := self.reader.unreadable(text, self.settings.score)):
            if skips:
                return ""
            which = (
                f"{self.settings.reader} with characters={self.settings.characters}" if self._letters else self.settings.reader
            )
            raise UserError(
                f"{which} cannot read {', '.join(map(repr, unknown[:10]))} in the text {excerpt(text)} of a prompt; set "
                "another reader or characters for ocr, or unquoted=skip to give such prompts no score"
            )
        return text

    @property
    def _letters(self) -> bool:
        """Whether the reader returns only letters."""
        return self.settings.reader == "easyocr" and self.settings.characters == "letters"

    def measure(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        arrays, score = as_arrays(images), self.settings.score
        targets = {prompt: self._target(prompt) for prompt in dict.fromkeys(prompts)}
        indices = [i for i, prompt in enumerate(prompts) if targets[prompt]]
        values, exact = np.full(len(prompts), np.nan), np.full(len(prompts), np.nan)
        for i, read in zip(indices, self.read([arrays[i] for i in indices]), strict=True):
            target = targets[prompts[i]]
            values[i] = similarity(read, target, score)
            exact[i] = float(compared_form(read, score) == compared_form(target, score))
        return {self.name: values, f"{self.name}_exact": exact}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **self.reader.describe()}
