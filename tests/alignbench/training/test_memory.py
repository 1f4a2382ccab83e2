"""What a training pass keeps for its way back: with gradient caching it does not grow with K."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from alignbench import RolloutForest, load_objective, rollout
from alignbench.training.engine import backward
from tests.benchmarks.flux import TinyFlux
from tests.support.toys import tree

LEAVES = {9: (1, 3), 27: (1, 3, 4), 81: (1, 2, 3, 4)}
"""K -> splits into three; 4, 13 and 40 distinct parents."""


class Kept:
    """A tensor that autograd keeps; gone when its graph is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Peak:
    """The most bytes that autograd has kept at one time, each storage counted once."""

    def __init__(self) -> None:
        self.alive: Counter[int] = Counter()
        self.now = self.most = 0

    def keep(self, tensor: Tensor) -> Kept:
        kept, storage = Kept(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not self.alive[place]:
            self.now += size
            self.most = max(self.most, self.now)
        self.alive[place] += 1
        weakref.finalize(kept, self.drop, place, size)
        return kept

    def drop(self, place: int, size: int) -> None:
        self.alive[place] -= 1
        if not self.alive[place]:
            self.now -= size


@contextmanager
def peak() -> Iterator[Peak]:
    found = Peak()
    with torch.autograd.graph.saved_tensors_hooks(found.keep, lambda kept: kept.tensor):
        yield found


@pytest.fixture(scope="module")
def policy() -> TinyFlux:
    return TinyFlux(side=4)


def drawn(policy: TinyFlux, k: int) -> RolloutForest:
    forest = rollout(policy, ["a"], tree(6, LEAVES[k]), seed=0)
    forest.rewards = torch.linspace(0, 1, k)
    return forest


def activations(policy: TinyFlux, k: int, micro_batch: int | None) -> int:
    """Bytes beyond the weights, which are there in any case."""
    forest, objective = drawn(policy, k), load_objective("grpo")
    weights = sum(p.untyped_storage().nbytes() for p in policy.parameters())
    with peak() as found:
        backward(policy, objective, forest, micro_batch=micro_batch)
    assert found.now == 0
    return found.most - weights


def test_with_micro_batches_the_memory_of_a_pass_is_flat_from_9_to_81_leaves(policy: TinyFlux) -> None:
    # Three rows a microbatch. What is left to grow are a few numbers for each edge.
    used = {k: activations(policy, k, micro_batch=3) for k in LEAVES}
    assert max(used.values()) < 1.1 * min(used.values())


def test_in_one_pass_it_grows_with_the_distinct_parents(policy: TinyFlux) -> None:
    used = {k: activations(policy, k, micro_batch=None) for k in LEAVES}
    assert used[27] / used[9] == pytest.approx(13 / 4, rel=0.1)
    assert used[81] / used[9] == pytest.approx(40 / 4, rel=0.1)
