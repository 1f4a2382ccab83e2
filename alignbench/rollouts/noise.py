"""Rollout and evaluation noise as a pure function of (seed, iteration, prompt, node).

It does not depend on batch size, micro-batch, device or number of ranks: the noise of every node comes from its own
generator on the CPU, which is seeded by a hash of the node's key.
"""

import random
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

Key = tuple[int | str, ...]
"""What the noise of a node depends on."""


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from the key's parts; equal keys give equal seeds on every machine."""
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(*key: int | str) -> None:
    """Seeds the global generators of torch, numpy and Python, so that draws made by plug-ins are reproducible."""
    seed = seed_of("global", *key)
    seed_torch(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_torch(seed: int) -> None:
    """Seeds the global generators of torch, as `torch.manual_seed` does."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also store tracebacks for a later accelerator


def group_keys(prompts: Sequence[str]) -> list[Key]:
    """The noise key of each group: the text of its prompt, and how often this text occurred before in the list."""
    seen: Counter[str] = Counter()
    keys: list[Key] = []
    for prompt in prompts:
        keys.append((prompt, seen[prompt]))
        seen[prompt] += 1
    return keys


def evaluation_keys(keys: Sequence[Key], images: int, seed: int) -> list[Key]:
    """The keys of the initial noise of an evaluation's images, prompt by prompt; the noise of steps has further parts.

    They depend on nothing else, so that two policies can be compared image by image.

    Args:
        keys: those of the prompts, from `group_keys`.
        images: images of each prompt.
        seed: seed of the evaluation noise.
    """
    return [("evaluation", seed, *key, i) for key in keys for i in range(images)]


def normal(keys: Sequence[Key], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Draws standard normal noise, one row for each key: float32 [len(keys), *shape]."""
    rows = torch.empty(len(keys), *shape)
    generator = torch.Generator()
    for row, key in zip(rows, keys, strict=True):
        row.normal_(generator=generator.manual_seed(seed_of(*key)))
    return rows.to(device)
