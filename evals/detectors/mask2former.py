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

from alignbench.backbone import device_named
from evals.detectors.base import Detection, Detections, Detector
from evals.detectors.grammar import COCO
from evals.embedders.open_clip import OpenClip, load_open_clip
from evals.embedders.pretrained import open_pretrained

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
    """COCO's 80 classes in ten colours. Pictures are batched with those of their size alone: none needs padding, by which its
    detections would depend on others."""

    colors = frozenset(COLORS)
    grammar = COCO

    def __init__(self, model: str, colors: str | ColorNamer, device: str = "auto", batch: int = 8) -> None:
        self.device = device_named(device)
        self.source, self._colors, self.batch = model, colors, batch
        opened, self.processor = open_pretrained(
            "Mask2FormerForUniversalSegmentation", "AutoImageProcessor", model, "Mask2Former"
        )
        self.model = opened.to(self.device)
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
        found: list[dict[str, list[Detection]]] = [{} for _ in images]
        crops: dict[str, list[tuple[Detection, Image.Image]]] = {}
        for size in dict.fromkeys(image.shape for image in images):
            alike = [i for i, image in enumerate(images) if image.shape == size]
            for start in range(0, len(alike), self.batch):
                part = alike[start : start + self.batch]
                for i, objects in zip(part, self._segment([images[i] for i in part]), strict=True):
                    for kind, detection, inside in objects:
                        several = found[i].setdefault(kind, [])
                        if len(several) < MAX_OBJECTS:
                            several.append(detection)
                            if kind in wanted[i]:
                                crops.setdefault(kind, []).append((detection, _crop(images[i], inside, detection["box"])))
        for kind, several_crops in crops.items():
            for start in range(0, len(several_crops), self.batch):
                some = several_crops[start : start + self.batch]
                for (detection, _), color in zip(some, self.namer.name([crop for _, crop in some], kind), strict=True):
                    detection["color"] = color
        return list(found)

    @torch.no_grad()
    def _segment(self, pictures: list[np.ndarray]) -> list[list[tuple[str, Detection, np.ndarray]]]:
        """Class, detection and mask [h, w] of all objects in each of several pictures of one size, best first."""
        inputs = self.processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")
        segmented = self.processor.post_process_instance_segmentation(
            self.model(**inputs.to(self.device)),
            threshold=THRESHOLD,
            target_sizes=[picture.shape[:2] for picture in pictures],
            return_binary_maps=True,
        )
        answer = []
        for one in segmented:
            objects = []
            for segment, mask in zip(one["segments_info"], one["segmentation"], strict=False):
                inside = mask.cpu().numpy().astype(bool)
                if inside.any():
                    detection = Detection(box=_box(inside), score=float(segment["score"]))
                    objects.append((self.names[segment["label_id"]], detection, inside))
            answer.append(sorted(objects, key=lambda found: -found[1]["score"]))
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
