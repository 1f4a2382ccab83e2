"""RapidOCR: PP-OCR's detector and recogniser on onnxruntime."""

import logging
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import numpy as np

from evals.readers.base import Reader, read_batches


class RapidOCRReader(Reader):
    """RapidOCR with the models that its wheel contains, on the CPU."""

    PAIR = 2
    """How many crops a thread reads at a time."""
    HEIGHT, WIDTH = 48, 160
    """The recogniser's input in pixels; narrower lines are padded to it. The width is half of RapidOCR's own 320, most of which
    a word leaves empty. With 160 words are read in half the time, and noisy ones more often correctly."""

    def __init__(self) -> None:
        self.engine = self._engine()
        self._idle = [self.engine]

    def _engine(self) -> Any:
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
        logging.getLogger("RapidOCR").setLevel(logging.ERROR)  # it would warn of each page without text
        return engine

    def read_lines(self, crops: list[np.ndarray]) -> list[str]:
        """Reads `PAIR` crops at a time in each thread, but wide ones singly, since a batch is as wide as its widest crop."""
        lines = [self.engine.preprocess_img(crop[..., ::-1].copy())[0] for crop in crops]
        narrow = [i for i, line in enumerate(lines) if line.shape[1] * self.HEIGHT <= self.WIDTH * line.shape[0]]
        batches = [narrow[i : i + self.PAIR] for i in range(0, len(narrow), self.PAIR)]
        batches += [[i] for i in sorted({*range(len(lines))} - {*narrow})]
        return read_batches(lambda batch: self.engine.recognize_txt([lines[i] for i in batch]).txts, batches, self.threads)

    def read_page(self, image: np.ndarray) -> str:
        # An engine keeps its options during a call, so each thread uses an engine of its own.
        try:
            engine = self._idle.pop()
        except IndexError:
            engine = self._engine()
        try:
            output = engine(image[..., ::-1].copy(), use_det=True, use_cls=False, use_rec=True)
        finally:
            self._idle.append(engine)
        return " ".join(output.txts or ())

    def alphabet(self) -> Iterable[str]:
        self.engine.recognize_txt([np.full((self.HEIGHT, self.HEIGHT, 3), 255, np.uint8)])  # loads the recogniser
        # Multi-character entries, such as the first one, CTC's `blank`, are not characters.
        return [c for c in self.engine.text_rec.postprocess_op.character if len(c) == 1]

    def describe(self) -> dict[str, Any]:
        return {"reader": "rapidocr", "version": version("rapidocr"), "device": "cpu", "input": [self.HEIGHT, self.WIDTH]}
