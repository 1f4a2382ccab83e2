"""What the hardware computes fast, and how much memory it has."""

import os
from functools import cache
from pathlib import Path

import torch

PROCESSOR = Path("/proc/cpuinfo")
"""Where Linux lists the features of the processor."""
BFLOAT16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}
"""Features of x86 and Arm processors with bfloat16 arithmetic, as Linux names them."""
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Where Linux says how much memory a container may take; `max` without a limit."""
AMPERE = (8, 0)
"""Compute capability of the first CUDA GPUs with bfloat16 arithmetic."""


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether this device has instructions for bfloat16, without which it takes longer than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= AMPERE
    return device.type == "cpu" and not BFLOAT16_FEATURES.isdisjoint(_processor_features())


def computes_in_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether a setting asks for bfloat16 on a device: `bf16` does, and `auto` where the device has instructions for it."""
    return precision == "bf16" or (precision == "auto" and has_fast_bfloat16(device))


def memory_bytes() -> int | None:
    """The memory that this computer has, or that its container may take if that is less; None where it is not known."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system, or one without these names
        return None
    limit = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.is_file() else "max"
    return min(memory, int(limit)) if limit.isdigit() else memory


@cache
def _processor_features() -> frozenset[str]:
    """The features of the processor; none where they are not known."""
    if not PROCESSOR.exists():
        return frozenset()
    lines = (line.partition(":") for line in PROCESSOR.read_text().splitlines())
    return frozenset(feature for name, _, value in lines if name.strip() in ("flags", "Features") for feature in value.split())
