"""GenEval's detector for photographs: Mask2Former finds COCO's objects, open_clip's ViT-L-14 names their colours.

The official detector is mmdetection's Mask2Former (Swin-S); `facebook/mask2former-swin-small-coco-instance` is the same
architecture in transformers. Thresholds, the limit of 16 a class and the naming of colours are GenEval's.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from alignbench import UserError, hub
from alignbench.backbone import device_named
from evals._open_clip import OpenClip, load_open_clip
from evals.geneval import COCO, Detection, Detections, Detector

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_OBJECTS = 16
"""Of one class in one picture."""
COLOR_MODEL = "ViT-L-14"
"""Of open_clip: it names the colours."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
OUTSIDE = 0x99
"""Grey level of what is not the object in the crop whose colour is named."""
ALIASES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""Other names of COCO's classes -> GenEval's."""


class ColorNamer:
    """Names the colour of an object in a crop, zero-shot over GenEval's templates."""

    def __init__(self, clip: OpenClip, device: torch.device) -> None:
        self.clip, self.device = clip, device
        self._weights: dict[str, Tensor] = {}

    @classmethod
    def load(cls, weights: str, device: torch.device) -> "ColorNamer":
        """open_clip's, with the activation that OpenAI's weights were trained with; raises UserError without them."""
        return cls(load_open_clip(COLOR_MODEL, weights, device, quick_gelu=True), device)

    @torch.no_grad()
    def name(self, crops: list[Image.Image], kind: str) -> list[str]:
        """One of COLORS for each crop of an object of this class."""
        if not crops:
            return []
        if kind not in self._weights:
            texts = [template.format(color=color, name=kind) for color in COLORS for template in TEMPLATES]
            embedded = functional.normalize(self.clip.model.encode_text(self.clip.tokenizer(texts).to(self.device)), dim=-1)
            self._weights[kind] = functional.normalize(embedded.view(len(COLORS), len(TEMPLATES), -1).mean(1), dim=-1)
        pixels = torch.stack([self.clip.preprocess(crop) for crop in crops]).to(self.device)
        features = functional.normalize(self.clip.model.encode_image(pixels), dim=-1)
        return [COLORS[i] for i in (features @ self._weights[kind].mT).argmax(1).tolist()]


class Mask2FormerDetector(Detector):
    """COCO's 80 classes in ten colours; one picture at a time, so that none depends on another."""

    colors = frozenset(COLORS)
    grammar = COCO

    def __init__(self, model: str, colors: str | ColorNamer, device: str = "auto") -> None:
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        hub.require({model: "Mask2Former"})
        self.device = device_named(device)
        self.source, self._colors = model, colors
        try:
            self.processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
            opened = Mask2FormerForUniversalSegmentation.from_pretrained(model, use_safetensors=True)
            self.model = opened.float().eval().to(self.device)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{model!r} opens as no Mask2Former, neither as a local folder nor from the hub: {reason}"
            ) from error
        self.names = {int(i): ALIASES.get(name, name) for i, name in self.model.config.id2label.items()}
        self.classes = frozenset(self.names.values())

    @property
    def namer(self) -> ColorNamer:
        """Loaded when the first colour is asked for."""
        if isinstance(self._colors, str):
            self._colors = ColorNamer.load(self._colors, self.device)
        return self._colors

    def detect(self, images: list[np.ndarray], colored: Sequence[Collection[str]] | None = None) -> list[Detections]:
        wanted = [self.classes] * len(images) if colored is None else colored
        return [self._detect(image, kinds) for image, kinds in zip(images, wanted, strict=True)]

    @torch.no_grad()
    def _detect(self, picture: np.ndarray, colored: Collection[str]) -> Detections:
        inputs = self.processor(images=[Image.fromarray(picture)], return_tensors="pt").to(self.device)
        found = self.processor.post_process_instance_segmentation(
            self.model(**inputs), threshold=THRESHOLD, target_sizes=[picture.shape[:2]], return_binary_maps=True
        )[0]
        by_class: dict[str, list[tuple[Detection, np.ndarray]]] = {}
        for segment, mask in zip(found["segments_info"], found["segmentation"], strict=False):
            inside = mask.cpu().numpy().astype(bool)
            if inside.any():
                detection = Detection(box=_box(inside), score=float(segment["score"]))
                by_class.setdefault(self.names[segment["label_id"]], []).append((detection, inside))
        answer: dict[str, list[Detection]] = {}
        for kind, several in by_class.items():
            best = sorted(several, key=lambda d: -d[0]["score"])[:MAX_OBJECTS]
            if kind in colored:
                crops = [_crop(picture, inside, detection["box"]) for detection, inside in best]
                for (detection, _), color in zip(best, self.namer.name(crops, kind), strict=True):
                    detection["color"] = color
            answer[kind] = [detection for detection, _ in best]
        return answer

    def considered(self, detections: Detections, metadata: Mapping[str, Any]) -> Detections:
        """Counting asks for more certainty."""
        least = COUNTING_THRESHOLD if metadata.get("tag") == "counting" else THRESHOLD
        return {kind: [d for d in several if d["score"] > least] for kind, several in detections.items()}

    def golden(self) -> list[tuple[np.ndarray, dict[str, Any], bool]]:
        from skimage import data

        def asks(kind: str) -> dict[str, Any]:
            return {"tag": "single_object", "include": [{"class": kind, "count": 1}], "prompt": f"a photo of a {kind}"}

        cat, coffee = data.chelsea(), data.coffee()
        return [(cat, asks("cat"), True), (cat, asks("cup"), False), (coffee, asks("cup"), True), (coffee, asks("cat"), False)]

    def describe(self) -> dict[str, Any]:
        import transformers

        colors = self._colors if isinstance(self._colors, str) else type(self._colors.clip.model).__name__
        about = {"detector": "mask2former", "model": self.source, "colors": colors, "device": str(self.device)}
        return {**about, "transformers": transformers.__version__}


def _box(inside: np.ndarray) -> list[float]:
    """[x0, y0, x1, y1] around the pixels of bool [h, w]."""
    ys, xs = np.nonzero(inside)
    return [float(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]


def _crop(picture: np.ndarray, inside: np.ndarray, box: Sequence[float]) -> Image.Image:
    """The box of the picture with grey around the object."""
    x0, y0, x1, y1 = (int(v) for v in box)
    alone = np.where(inside[..., None], picture, np.uint8(OUTSIDE))
    return Image.fromarray(alone[y0:y1, x0:x1])
