from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from alignbench.errors import RunError
from alignbench.runtime import hardware
from alignbench.runtime.micro_batch import MicroBatch, rows_within_memory


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


def test_rows_that_do_not_fit_beforehand_are_cut_before_memory_runs_out() -> None:
    asked: list[int] = []

    def most() -> int:
        asked.append(1)
        return 100

    size = MicroBatch(None)
    size.most = cache(most)
    tried: list[int | None] = []
    assert size.fit(lambda rows: tried.append(rows) or "done", lambda: 64) == "done"  # type: ignore[func-returns-value]
    assert not asked  # so few fit anyhow
    assert size.fit(lambda rows: tried.append(rows) or "done", lambda: 100) == "done"  # type: ignore[func-returns-value]
    assert size.fit(lambda rows: tried.append(rows) or "done", lambda: 101) == "done"  # type: ignore[func-returns-value]
    assert (tried, size.rows, size.halvings) == ([None, None, 100], 100, 0)
    assert asked == [1]
    given = MicroBatch(9)
    given.most = most
    given.fit(lambda rows: rows, lambda: 1000)
    assert (given.rows, asked) == (9, [1])


def test_the_rows_within_memory_are_counted_from_what_a_row_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The square keeps 1,000 float32 of its input, and the answer has 1,000: 8,000 bytes a row; weights do not count."""
    cpu, model, square = torch.device("cpu"), nn.Linear(10, 1000, bias=False), torch.randn(1, 1000, requires_grad=True)
    monkeypatch.setattr("alignbench.runtime.micro_batch.memory_bytes", lambda: 800_000)
    assert rows_within_memory(cpu, lambda: square.clone() ** 2, 0.5) == 50
    # The input's 40 bytes are kept for the weight's gradient: 4,040 bytes.
    assert rows_within_memory(cpu, lambda: model(torch.ones(1, 10)), 1.0) == 800_000 // 4_040
    assert rows_within_memory(cpu, lambda: model(torch.ones(1, 10)), 1e-6) == 1
    monkeypatch.setattr("alignbench.runtime.micro_batch.memory_bytes", lambda: None)
    assert rows_within_memory(cpu, lambda: model(torch.ones(1, 10))) is None


def test_the_memory_of_a_container_counts_where_it_is_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(hardware, "CONTAINER_LIMIT", limit)
    whole = hardware.memory_bytes()
    assert whole is not None
    limit.write_text("max\n")
    assert hardware.memory_bytes() == whole
    limit.write_text("1048576\n")
    assert hardware.memory_bytes() == 2**20
