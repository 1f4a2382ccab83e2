"""What to do when memory runs out: the same again, with half the rows in a model call."""

from collections.abc import Callable
from typing import TypeVar

import torch

from alignbench.errors import RunError

Found = TypeVar("Found")


class MicroBatch:
    """How many rows go into one model call.

    Attributes:
        rows: at most so many; None for all.
        halvings: how often memory ran out.
    """

    def __init__(self, rows: int | None) -> None:
        self.rows, self.halvings = rows, 0

    def fit(self, work: Callable[[int | None], Found], rows: Callable[[], int]) -> Found:
        """`work(limit)`; for as long as memory runs out, the same with half the limit, which then stays.

        Args:
            work: takes the rows of one model call, and can be called again after it has failed.
            rows: how many rows `work` has in all; asked where memory ran out without a limit.

        Raises:
            RunError: memory runs out with one row in a call.
        """
        while True:
            try:
                return work(self.rows)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                held = self.rows or rows()
                if held <= 1:
                    raise RunError(f"out of memory with one row in a model call: {first_line(error)}") from error
            # Out here nothing holds the tensors of the failed call any more.
            self.rows, self.halvings = (held + 1) // 2, self.halvings + 1
            _release()


def first_line(error: BaseException) -> str:
    """Of its message; torch's fill a screen."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def out_of_memory(error: Exception) -> bool:
    """Whether that is what an error says, in whichever words."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _release() -> None:
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
