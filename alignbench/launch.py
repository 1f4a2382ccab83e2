"""What `torchrun` or `accelerate launch` tells a process of a run that several of them share; imports nothing heavy."""

import os


def count() -> int:
    """Processes that were started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def asks_for_sharding() -> bool:
    """Whether `accelerate launch --use_fsdp` started it."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
