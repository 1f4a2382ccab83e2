"""Halves the number of rows in a model call when memory runs out, and tries again."""

from collections.abc import Callable
from typing import TypeVar

import torch

from alignbench.errors import RunError, first_line

Result = TypeVar("Result")


class MicroBatch:
    """The size of a micro-batch: how many rows go into one model call.

    Attributes:
        rows: the largest number of rows; None if one call takes all rows.
        halvings: how often memory ran out.
    """

    def __init__(self, rows: int | None) -> None:
        self.rows, self.halvings = rows, 0

    def fit(self, work: Callable[[int | None], Result], rows: Callable[[], int]) -> Result:
        """Calls `work(limit)`. As long as memory runs out, it is called again with half the limit, which is kept.

        Args:
            work: takes the number of rows in one model call; it can be called again after it has failed.
            rows: returns the total number of rows; it is called if memory runs out without a limit.

        Raises:
            RunError: memory runs out with one row in a call.
        """
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


def out_of_memory(error: Exception) -> bool:
    """Tells whether an error means that memory ran out; libraries report it in different ways."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _release() -> None:
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
