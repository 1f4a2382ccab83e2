"""Runs that several processes share: what a launcher told this one, and starting some here. Imports nothing heavy."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from typing import Any

from alignbench import variables
from alignbench.errors import RunError, UserError

PATIENCE = 60
"""Seconds that the others get to end once the first process has."""


def count() -> int:
    """Processes that were started together; 1 without a launcher."""
    return variables.whole_number("WORLD_SIZE", 1, least=1)


def on_this_machine() -> int:
    """Those of them that share this machine's cores."""
    return variables.whole_number("LOCAL_WORLD_SIZE", 1, least=1)


def is_first() -> bool:
    """Whether this is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def asks_for_sharding() -> bool:
    """Whether `accelerate launch --use_fsdp` started it."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def check_share(prompts: int, processes: int) -> None:
    """Raises UserError where that many prompts an iteration cannot be shared equally."""
    if prompts % processes:
        unequal = f"prompts_per_iteration={prompts} cannot be shared equally by {processes} processes"
        raise UserError(f"{unequal}; take a multiple of their number")


@contextmanager
def several(processes: int, work: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    """While entered, this process is the first of so many; the others, started here, do `work(*arguments)`.

    What `torchrun --standalone` does, for a process that goes on afterwards.
    """
    if processes == 1:
        yield
        return
    port = free_port()
    context = get_context("spawn")
    others = [
        context.Process(target=_other, args=(environment(rank, processes, port), work, arguments), daemon=True)
        for rank in range(1, processes)
    ]
    for other in others:
        other.start()
    mine = environment(0, processes, port)
    former = {name: os.environ.get(name) for name in mine}
    os.environ |= mine
    try:
        yield
    finally:
        for other in others:
            other.join(PATIENCE)
            other.kill()
        for name, value in former.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def end_with_parent() -> None:
    """From now on this process is asked to end once its parent has ended."""

    def wait() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What a launcher would tell the process of that rank, on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _other(environment: dict[str, str], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is told, and tells
    os.environ |= environment
    end_with_parent()
    with suppress(KeyboardInterrupt, UserError, RunError):  # the first process has it too, and speaks
        work(*arguments)
