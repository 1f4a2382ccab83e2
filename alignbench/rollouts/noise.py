"""Rollout and evaluation noise as a pure function of (seed, iteration, prompt, node).

It does not depend on batch size, micro-batch, device or number of processes: every node's noise comes from a
generator of its own, on the CPU, seeded by a hash of the key.
"""

import random
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

Key = tuple[int | str, ...]


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from the key's parts; equal keys give equal seeds on every machine."""
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(*key: int | str) -> None:
    """Seeds the global generators of torch, numpy and Python: what a plug-in draws from them is a function of the key then."""
    seed = seed_of("global", *key)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)  # the same; torch also notes seeds for a CUDA that may come, with tracebacks
    np.random.seed(seed % 2**32)
    random.seed(seed)


def group_keys(prompts: Sequence[str]) -> list[Key]:
    """A key for each prompt: its text and how often that text occurred before in this call."""
    seen: Counter[str] = Counter()
    keys: list[Key] = []
    for prompt in prompts:
        keys.append((prompt, seen[prompt]))
        seen[prompt] += 1
    return keys


def normal(keys: Sequence[Key], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise, one row for each key; float32 [len(keys), *shape]."""
    rows = torch.empty(len(keys), *shape)
    generator = torch.Generator()
    for row, key in zip(rows, keys, strict=True):
        row.normal_(generator=generator.manual_seed(seed_of(*key)))
    return rows.to(device)
