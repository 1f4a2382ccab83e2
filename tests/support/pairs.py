"""Pairs of objectives and samplers, for tests of facts that hold for each objective and for each sampler."""

from collections.abc import Sequence
from itertools import cycle
from typing import TypeVar

Sampler = TypeVar("Sampler")


def in_turn(objectives: Sequence[str], samplers: Sequence[Sampler], each: int = 1) -> list[tuple[str, Sampler]]:
    """Pairs each objective with the next `each` samplers in turn, so that every objective and every sampler is in a pair.

    An objective reads forests and cannot tell which sampler made them, and a sampler does not know what is learned from its
    plans. So a test of what each of them saves, draws or sends needs both, and not every combination.
    """
    turn = cycle(samplers)
    pairs = [(objective, next(turn)) for objective in objectives for _ in range(each)]
    assert len(pairs) >= len(samplers), "a sampler is in no pair"
    return pairs
