"""Halves the number of rows in a model call when memory runs out, and tries again."""

from collections.abc import Callable
from typing import TypeVar

import torch

from alignbench.errors import RunError

Found = TypeVar("Found")


class MicroBatch:
    """The microbatch: how many rows go into one model call.

    Attributes:
        rows: largest number of rows; None for all rows.
        halvings: how often memory ran out.
    """

    def __init__(self, rows: int | None) -> None:
        self.rows, self.halvings = rows, 0

    def fit(self, work: Callable[[int | None], Found], rows: Callable[[], int]) -> Found:
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


def first_line(error: BaseException) -> str:
    """The first line of an error's message; messages of torch can fill a screen."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out; libraries report it in different ways."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _release() -> None:
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
