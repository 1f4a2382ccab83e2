"""transformers prepares pictures in two ways, whose pixels differ a little."""

from typing import Any


def torchvision() -> dict[str, Any]:
    """For `from_pretrained` of a processor: pictures are prepared by torchvision, as transformers 5 does untold."""
    import transformers

    return {"use_fast": True} if transformers.__version__.startswith("4.") else {}
