"""COCO's 80 classes by GenEval's names, and how its prompts speak of them."""

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra",
    "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork",
    "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut",
    "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase",
    "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COLORED = tuple(name for name in CLASSES if name != "person")
"""Those whose colour GenEval asks for."""
COUNTED = tuple(name for name in CLASSES if name not in ("scissors", "skis"))
"""Those whose number is asked for: the others are plural already."""
_OWN_PLURALS = {"person": "people", "knife": "knives", "sheep": "sheep", "scissors": "scissors", "skis": "skis"}


def plural(name: str) -> str:
    """GenEval's own, which its detector's scores were published with: "two benchs", "three persons"."""
    return name + ("es" if name.endswith("s") else "s")


def plurals(name: str) -> tuple[str, ...]:
    """GenEval's plural and the English one, where they differ."""
    english = _OWN_PLURALS.get(name, name + ("es" if name.endswith(("s", "sh", "ch")) else "s"))
    return tuple(dict.fromkeys((plural(name), english)))
