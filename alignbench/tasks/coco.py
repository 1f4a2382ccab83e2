"""COCO's 80 classes with the names and plurals that GenEval's prompts use."""

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
"""The classes whose colour GenEval asks for."""
COUNTED = tuple(name for name in CLASSES if name not in ("scissors", "skis"))
"""The classes whose number GenEval asks for; the others are already plural."""
_OWN_PLURALS = {"person": "people", "knife": "knives", "sheep": "sheep", "scissors": "scissors", "skis": "skis"}


def plural(name: str) -> str:
    """Forms the plural as GenEval's prompts do, with which its results were published: "two benchs", "three persons"."""
    return name + ("es" if name.endswith("s") else "s")


def plurals(name: str) -> tuple[str, ...]:
    """Lists GenEval's plural, and the English one if it differs."""
    english = _OWN_PLURALS.get(name, name + ("es" if name.endswith(("s", "sh", "ch")) else "s"))
    return tuple(dict.fromkeys((plural(name), english)))
