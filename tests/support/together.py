"""Several processes on this machine that work over gloo, as if `torchrun` had started them."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from alignbench import run
from alignbench.__main__ import main
from alignbench.config.run_config import RunConfig
from alignbench.runtime import launch
from tests.support.faults import CONTEXT, PATIENCE


def started(count: int, work: Callable[..., None], *arguments: Any, said: Path) -> list[Any]:
    """Starts `work(*arguments)` on several ranks; the stderr of rank r goes to the file r in the folder `said`."""
    said.mkdir(parents=True, exist_ok=True)
    port = launch.free_port()
    processes = [CONTEXT.Process(target=_one, args=(r, count, port, said, work, arguments)) for r in range(count)]
    for process in processes:
        process.start()
    return processes


def ended(processes: Sequence[Any]) -> list[int]:
    """Waits for processes and returns their exit codes; none may hang."""
    try:
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode is not None, "a process hangs"
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]


def runs(jobs: Sequence[tuple[RunConfig, Path]]) -> None:
    """Runs each job in turn, and resumes one that was interrupted."""
    for config, out in jobs:
        run(config, out, resume=(out / "config.yaml").is_file())


def command(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    sys.argv = ["alignbench", *arguments]
    main()


def listening() -> set[str]:
    """Lists the addresses on which this process and its children listen for TCP connections."""
    this = psutil.Process()
    found: set[str] = set()
    for process in [this, *this.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            listening = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            found |= {connection.laddr.ip.removeprefix("::ffff:") for connection in listening}
    return found


def _one(rank: int, count: int, port: int, said: Path, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= launch.environment(rank, count, port)
    sys.stderr = (said / str(rank)).open("w", buffering=1)  # stays open for what comes after a failure
    os.dup2(sys.stderr.fileno(), 2)
    work(*arguments)
