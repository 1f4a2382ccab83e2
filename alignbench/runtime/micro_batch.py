"""Halves the number of rows in a model call when memory runs out, and tries again.

A CPU gives no error to catch: a process that takes too much memory is ended by the system. There the number is limited
beforehand, by the bytes that the model keeps of a row for the backward pass.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from alignbench.errors import RunError, first_line
from alignbench.runtime.hardware import memory_bytes

Result = TypeVar("Result")
GRAPH_SHARE = 0.25
"""Share of a computer's memory that the graph of one pass may take; the rest is for other processes, gradients and scorers."""


FEW = 64
"""So many rows are taken in one call without asking how many fit."""


class MicroBatch:
    """The size of a micro-batch: how many rows go into one model call.

    Attributes:
        rows: the largest number of rows; None if one call takes all rows.
        halvings: how often memory ran out.
    """

    def __init__(self, rows: int | None, most: Callable[[], int | None] = lambda: None) -> None:
        """Starts with a number of rows.

        Args:
            rows: the number; None for all rows in one call.
            most: how many rows fit at most, or None if that is not known beforehand. It is asked once, if `rows` is None and
                more than `FEW` rows are to be evaluated.
        """
        self.rows, self.halvings = rows, 0
        self._most: Callable[[], int | None] | None = most
        self._known_most: int | None = None

    def fit(self, work: Callable[[int | None], Result], rows: Callable[[], int]) -> Result:
        """Calls `work(limit)`. As long as memory runs out, it is called again with half the limit, which is kept.

        Args:
            work: takes the number of rows in one model call; it can be called again after it has failed.
            rows: returns the total number of rows; it is called if memory runs out without a limit.

        Raises:
            RunError: memory runs out with one row in a call.
        """
        if self.rows is None:
            self._limit(rows)
        while True:
            try:
                return work(self.rows)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                limit = self.rows or rows()
                if limit <= 1:
                    raise RunError(f"out of memory with one row in a model call: {first_line(error)}") from error
            # At this point nothing refers to the tensors of the failed call any more.
            self.rows, self.halvings = (limit + 1) // 2, self.halvings + 1
            _release()

    def _limit(self, rows: Callable[[], int]) -> None:
        """Limits the rows if more are asked for than fit."""
        if self._most is not None and rows() > FEW:
            self._known_most, self._most = self._most(), None
        if self._known_most is not None and rows() > self._known_most:
            self.rows = self._known_most


def rows_within_memory(model: nn.Module, call: Callable[[], Tensor], share: float = GRAPH_SHARE) -> int | None:
    """Computes how many rows' graphs fit into a share of this computer's memory, at least one; None if its size is not known.

    Args:
        model: what is trained; its own weights do not count.
        call: evaluates the model at one row with a graph.
        share: the share.
    """
    memory = memory_bytes()
    if memory is None:
        return None
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        answer = call()  # alive until its tensors are counted, so that no storage is used twice
    total = sum(kept.values()) + answer.untyped_storage().nbytes()
    return max(1, int(share * memory / total))


def out_of_memory(error: Exception) -> bool:
    """Tells whether an error means that memory ran out; libraries report it in different ways."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _release() -> None:
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
