"""GenEval's detector for photographs: Mask2Former finds COCO's objects, and open_clip's ViT-L-14 names their colours.

The official detector is mmdetection's Mask2Former (Swin-S); `facebook/mask2former-swin-small-coco-instance` is the same
architecture in transformers. The thresholds, the limit of 16 objects per class and the naming of colours are GenEval's (arXiv
2310.11513 and its evaluation script).
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
from evals.detectors.pixels import box_around
from evals.embedders.open_clip import OpenClip, load_open_clip
from evals.embedders.pretrained import open_pretrained

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""The score that an object must exceed, and the one that it must exceed for a counting prompt."""
MAX_OBJECTS = 16
"""The largest number of objects of one class in one image."""
COLOR_MODEL = "ViT-L-14"
"""The architecture in open_clip that names colours."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""The colours that it can name."""
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
"""The texts that a crop is compared with for each colour."""
OUTSIDE = 0x99
"""The grey level that replaces what is not the object, in the crop whose colour is named."""
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
"""Another name of a COCO class -> GenEval's name."""


class ColorNamer:
    """Names the colour of an object in a crop, by zero-shot classification with GenEval's templates."""

    def __init__(self, clip: OpenClip, device: torch.device) -> None:
        self.clip, self.device = clip, device
        self._weights: dict[str, Tensor] = {}

    @classmethod
    def load(cls, weights: str, device: torch.device) -> "ColorNamer":
        """Opens the model with the activation that OpenAI's weights were trained with.

        Args:
            weights: a tag of open_clip, or a local file.
            device: the device that it runs on.

        Raises:
            UserError: the weights cannot be loaded.
        """
        return cls(load_open_clip(COLOR_MODEL, weights, device, quick_gelu=True), device)

    @torch.no_grad()
    def name(self, crops: list[Image.Image], kind: str) -> list[str]:
        """Names the colour of each crop of an object of this class: one of `COLORS` each."""
        if not crops:
            return []
        if kind not in self._weights:
            texts = [template.format(color=color, name=kind) for color in COLORS for template in TEMPLATES]
            features = functional.normalize(self.clip.model.encode_text(self.clip.tokenizer(texts).to(self.device)), dim=-1)
            self._weights[kind] = functional.normalize(features.view(len(COLORS), len(TEMPLATES), -1).mean(1), dim=-1)
        pixels = torch.stack([self.clip.preprocess(crop) for crop in crops]).to(self.device)
        features = functional.normalize(self.clip.model.encode_image(pixels), dim=-1)
        return [COLORS[i] for i in (features @ self._weights[kind].mT).argmax(1).tolist()]


class Mask2FormerDetector(Detector):
    """Finds COCO's 80 classes in ten colours.

    Only images of the same size share a batch. So no image is padded, and its detections do not depend on the others.

    Args:
        model: a local folder or a hub id.
        colors: the weights of the model that names colours (a tag of open_clip or a local file), or the model itself.
        device: the device that the models run on.
        batch: the largest number of images, or of crops, in one call.

    Raises:
        UserError: the model cannot be opened.
    """

    colors = frozenset(COLORS)
    grammar = COCO

    def __init__(self, model: str, colors: str | ColorNamer, device: str = "auto", batch: int = 8) -> None:
        self.device = device_named(device)
        self.source, self._colors, self.batch = model, colors, batch
        network, self.processor = open_pretrained(
            "Mask2FormerForUniversalSegmentation", "AutoImageProcessor", model, "Mask2Former"
        )
        self.model = network.to(self.device)
        self.names = {int(i): ALIASES.get(name, name) for i, name in self.model.config.id2label.items()}
        self.classes = frozenset(self.names.values())

    @property
    def namer(self) -> ColorNamer:
        """The model that names colours, which is opened when the first colour is needed."""
        if isinstance(self._colors, str):
            self._colors = ColorNamer.load(self._colors, self.device)
        return self._colors

    def detect(self, images: list[np.ndarray], colored: Sequence[Collection[str]] | None = None) -> list[Detections]:
        colored = [self.classes] * len(images) if colored is None else colored
        detections: list[dict[str, list[Detection]]] = [{} for _ in images]
        crops: dict[str, list[tuple[Detection, Image.Image]]] = {}
        for size in dict.fromkeys(image.shape for image in images):
            same_size = [i for i, image in enumerate(images) if image.shape == size]
            for start in range(0, len(same_size), self.batch):
                batch = same_size[start : start + self.batch]
                for i, objects in zip(batch, self._segment([images[i] for i in batch]), strict=True):
                    for kind, detection, mask in objects:
                        of_kind = detections[i].setdefault(kind, [])
                        if len(of_kind) < MAX_OBJECTS:
                            of_kind.append(detection)
                            if kind in colored[i]:
                                crops.setdefault(kind, []).append((detection, _crop(images[i], mask, detection["box"])))
        for kind, crops_of_kind in crops.items():
            for start in range(0, len(crops_of_kind), self.batch):
                pairs = crops_of_kind[start : start + self.batch]
                for (detection, _), color in zip(pairs, self.namer.name([crop for _, crop in pairs], kind), strict=True):
                    detection["color"] = color
        return list(detections)

    @torch.no_grad()
    def _segment(self, images: list[np.ndarray]) -> list[list[tuple[str, Detection, np.ndarray]]]:
        """Class, detection and mask [h, w] of all objects in each of several images of one size, best first."""
        inputs = self.processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
        segmentations = self.processor.post_process_instance_segmentation(
            self.model(**inputs.to(self.device)),
            threshold=THRESHOLD,
            target_sizes=[image.shape[:2] for image in images],
            return_binary_maps=True,
        )
        objects_of_images = []
        for segmentation in segmentations:
            objects = []
            for segment, mask in zip(segmentation["segments_info"], segmentation["segmentation"], strict=False):
                pixels = mask.cpu().numpy().astype(bool)
                if pixels.any():
                    detection = Detection(box=box_around(pixels), score=float(segment["score"]))
                    objects.append((self.names[segment["label_id"]], detection, pixels))
            objects_of_images.append(sorted(objects, key=lambda each: -each[1]["score"]))
        return objects_of_images

    def considered(self, detections: Detections, metadata: Mapping[str, Any]) -> Detections:
        """Selects the detections above the threshold, which is higher for counting prompts."""
        threshold = COUNTING_THRESHOLD if metadata.get("tag") == "counting" else THRESHOLD
        return {kind: [d for d in of_kind if d["score"] > threshold] for kind, of_kind in detections.items()}

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


def _crop(image: np.ndarray, mask: np.ndarray, box: Sequence[float]) -> Image.Image:
    """The part of the image inside the box, with grey around the object."""
    x0, y0, x1, y1 = (int(v) for v in box)
    on_grey = np.where(mask[..., None], image, np.uint8(OUTSIDE))
    return Image.fromarray(on_grey[y0:y1, x0:x1])
