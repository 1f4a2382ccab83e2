"""Worker processes: one runs cells after another, and one that dies is replaced."""

import signal
from collections.abc import Mapping
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

from alignbench.comparison.grid import Cell
from alignbench.comparison.pool import run_in_workers
from tests.alignbench.comparison.test_compare import grid
from tests.support.faults import quick_workers


class Listener:
    """Remembers which child processes there were while cells ended."""

    def __init__(self, interrupt: bool = False) -> None:
        self.ends: list[tuple[str, str | None]] = []
        self.children: set[int | None] = set()
        self.interrupt = interrupt

    def began(self, cell: Cell) -> None: ...

    def moved(self, cell: Cell, row: Mapping[str, Any], progress: float) -> None:
        self.children |= children()
        if self.interrupt:
            raise KeyboardInterrupt

    def ended(self, cell: Cell, error: str | None) -> None:
        self.ends.append((cell.id, error))


def children() -> set[int | None]:
    """Processes that this one has started by `multiprocessing`, and that live."""
    return {process.pid for process in active_children()}


@pytest.fixture(autouse=True)
def _quick_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_workers(monkeypatch)


def test_one_worker_runs_all_cells(tmp_path: Path) -> None:
    listener, scored = Listener(), tmp_path / "scored"
    cells = grid(tmp_path, "Counted", {"file": str(scored)}, seeds=[0, 1]).cells()
    run_in_workers(cells, tmp_path / "runs", listener, workers=1)
    assert listener.ends == [(cell.id, None) for cell in cells]
    assert len(listener.children) == 1
    assert children() == set()
    # Four cells: the base model is evaluated once, on 4 prompts with 2 images each, and each trained model as well.
    assert scored.read_text().split().count("eval") == (1 + 4) * 8


def test_a_worker_that_dies_fails_its_cell_alone_and_is_replaced(tmp_path: Path) -> None:
    listener = Listener()
    cells = grid(tmp_path, objectives=["tests.support.plugins:Killing", "grpo", "tmpo"]).cells()
    run_in_workers(cells, tmp_path / "runs", listener, workers=1)
    died = f"its process died (exit code -{signal.SIGKILL}); systems do this where memory runs out, so lower --workers or set "
    assert [error for _, error in listener.ends] == [f"{died}micro_batch", None, None]


def test_an_interrupt_ends_all_workers_and_leaves_checkpoints(tmp_path: Path) -> None:
    cells = grid(tmp_path, "Hanging", objectives=["grpo"]).cells()
    with pytest.raises(KeyboardInterrupt):
        run_in_workers(cells, tmp_path / "runs", Listener(interrupt=True), workers=1)
    assert children() == set()
    (cell,) = cells
    assert any((tmp_path / "runs" / cell.id / "checkpoints").iterdir())
    assert not (tmp_path / "runs" / cell.id / "result.json").exists()
