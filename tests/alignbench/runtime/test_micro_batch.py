import pytest
import torch

from alignbench.errors import RunError
from alignbench.runtime.micro_batch import MicroBatch


def cramped(room: int, tried: list[int | None], message: str = "CUDA out of memory. Tried to allocate 1 GiB.") -> object:
    def work(rows: int | None) -> str:
        tried.append(rows)
        if rows is None or rows > room:
            raise torch.OutOfMemoryError(message)
        return f"{rows} at a time"

    return work


def test_the_rows_of_a_call_halve_until_they_fit_and_stay_so() -> None:
    tried: list[int | None] = []
    size = MicroBatch(None)
    assert size.fit(cramped(3, tried), lambda: 13) == "2 at a time"  # type: ignore[arg-type]
    assert tried == [None, 7, 4, 2]
    assert (size.rows, size.halvings) == (2, 3)
    assert size.fit(cramped(3, tried), lambda: 13) == "2 at a time"  # type: ignore[arg-type]
    assert tried[4:] == [2]


def test_one_row_that_does_not_fit_ends_the_run_in_one_line() -> None:
    with pytest.raises(RunError, match=r"^out of memory with one row in a model call: CUDA out of memory\.$"):
        MicroBatch(2).fit(cramped(0, [], "CUDA out of memory.\nThe whole state of the allocator."), lambda: 2)  # type: ignore[arg-type]


def test_memory_that_the_cpu_does_not_have_counts_and_other_errors_do_not() -> None:
    def work(rows: int | None) -> int:
        if rows != 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ...")
        return rows

    assert MicroBatch(4).fit(work, lambda: 9) == 1
    size = MicroBatch(4)

    def wrong(rows: int | None) -> int:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        size.fit(wrong, lambda: 9)
    assert (size.rows, size.halvings) == (4, 0)
