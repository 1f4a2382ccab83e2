"""Halves the number of rows in a model call when memory runs out, and tries again.

A CPU gives no error to catch: a process that takes too much memory is ended by the system. There the number is limited
beforehand, by the bytes that the model keeps of a row for the backward pass.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from alignbench.errors import RunError, first_line
from alignbench.runtime.hardware import memory_bytes
from alignbench.runtime.live_bytes import LiveBytes

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
        most: returns how many rows fit with their graph, or None if that is not known beforehand. It is asked where `rows` is
            None and more than `FEW` rows are to be evaluated.
    """

    def __init__(self, rows: int | None) -> None:
        self.rows, self.halvings = rows, 0
        self.most: Callable[[], int | None] | None = None

    def fit(self, work: Callable[[int | None], Result], rows: Callable[[], int]) -> Result:
        """Calls `work(limit)`. As long as memory runs out, it is called again with half the limit, which is kept.

        Args:
            work: takes the number of rows in one model call; it can be called again after it has failed.
            rows: returns the total number of rows; it is called if there is no limit.

        Raises:
            RunError: memory runs out with one row in a call.
        """
        if self.rows is None and self.most is not None and (count := rows()) > FEW:
            most = self.most()
            if most is not None and count > most:
                self.rows = most
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


def rows_within_memory(device: torch.device, call: Callable[[], Tensor], share: float = GRAPH_SHARE) -> int | None:
    """Computes how many rows' graphs fit into a share of this computer's memory, at least one; None if its size is not known.

    Args:
        device: the model's.
        call: evaluates the model at one row.
        share: the share.
    """
    memory = memory_bytes()
    if memory is None:
        return None
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), LiveBytes(device) as live:
        answer = call()  # what its graph keeps is alive as long as it is
        kept = live.now
    del answer
    return max(1, int(share * memory / kept))


def out_of_memory(error: Exception) -> bool:
    """Tells whether an error means that memory ran out; libraries report it in different ways."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _release() -> None:
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
