"""Worker processes of this machine that run cells one after another, and are replaced when they die."""

import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from alignbench.comparison.cells import run_cell
from alignbench.comparison.grid import Cell
from alignbench.runtime import launch
from alignbench.runtime.import_path import begin_child, safe_children

PEAK_RESET = Path("/proc/self/clear_refs")
"""Where Linux resets a process's peak memory."""


class Listener(Protocol):
    """Receives what happens to cells; see `runner.Progress`."""

    def began(self, cell: Cell) -> None: ...
    def moved(self, cell: Cell, row: Mapping[str, Any], progress: float) -> None: ...
    def ended(self, cell: Cell, error: str | None) -> None: ...


class Done(NamedTuple):
    """What a worker sends when a cell has ended."""

    error: str | None


class _Worker:
    """A process with one end of its pipe, and the cell it works on."""

    def __init__(self, processes: int) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, processes))
        with safe_children():
            self.process.start()
        theirs.close()  # so that the end of the process ends the pipe
        self.cell: Cell | None = None

    def take(self, cell: Cell, folder: Path) -> None:
        self.cell = cell
        with suppress(OSError):  # a dead worker is seen when its pipe is read
            self.pipe.send((cell.config, folder))

    def stop(self) -> None:
        """Lets an idle worker end."""
        self.pipe.close()
        self.process.join()


def run_in_workers(cells: Iterable[Cell], runs: Path, listener: Listener, workers: int, processes: int = 1) -> None:
    """Runs all cells, each in one of several worker processes.

    Models are loaded anew for each cell, so a result does not depend on the worker. A worker that dies fails its cell alone.

    Args:
        runs: the folder of the cells' folders.
        listener: receives what happens to cells.
        workers: number of worker processes.
        processes: how many processes share a cell; with more than one, a worker is replaced after each cell.

    Raises:
        KeyboardInterrupt: after the cells at work have left a checkpoint.
    """
    waiting = iter(cells)
    at_work: dict[Any, _Worker] = {}

    def assign(worker: _Worker | None) -> None:
        """Gives the worker, or a new one, the next cell; without one it ends."""
        cell = next(waiting, None)
        if cell is None:
            if worker is not None:
                worker.stop()
            return
        worker = worker or _Worker(processes)
        at_work[worker.pipe] = worker
        listener.began(cell)
        worker.take(cell, runs / cell.id)

    try:
        for _ in range(workers):
            assign(None)
        while at_work:
            ready: list[Any] = connection.wait(list(at_work))
            for pipe in ready:
                ended = _receive(at_work[pipe], listener)
                if ended is not None:
                    worker = at_work.pop(pipe)
                    if worker.cell is not None:
                        listener.ended(worker.cell, ended.error)
                    reusable = worker.process.is_alive() and processes == 1 and not pipe.closed
                    if not reusable:
                        worker.stop()
                    assign(worker if reusable else None)
    except BaseException:
        for worker in at_work.values():
            worker.process.terminate()
        for worker in at_work.values():
            worker.process.join()
        raise


def _receive(worker: _Worker, listener: Listener) -> Done | None:
    """Takes one message; returns how the worker's cell ended, or None while it goes on."""
    try:
        message = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        code = worker.process.exitcode
        killed = "; systems do this where memory runs out, so lower --workers or set micro_batch"
        return Done(f"its process died (exit code {code}){killed if code == -signal.SIGKILL else ''}")
    if isinstance(message, Done):
        return message
    if worker.cell is not None:
        listener.moved(worker.cell, *message)
    return None


def _work(pipe: Any, processes: int) -> None:
    """Runs the cells that come through the pipe until it ends; leaves a checkpoint if its parent ends.

    Sends a tuple for each iteration, and `Done` after each cell.
    """
    begin_child()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then sends SIGTERM
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    launch.end_with_parent()
    bases: dict[str, Any] = {}

    def send(message: Any) -> None:
        with suppress(OSError):  # nobody listens any more
            pipe.send(message)

    def report(row: Mapping[str, Any], progress: float) -> None:
        send((row, progress))

    with suppress(KeyboardInterrupt, EOFError, OSError):
        while True:
            config, folder = pipe.recv()
            with suppress(OSError):
                PEAK_RESET.write_text("5")
            send(Done(run_cell(config, folder, bases, report, processes)))
