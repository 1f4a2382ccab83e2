"""Runs that several processes share: what a launcher told this one, and starting some here. Imports nothing heavy."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from alignbench.errors import RunError, UserError
from alignbench.runtime import variables
from alignbench.runtime.import_path import begin_child, safe_children

LOOPBACK = "127.0.0.1"
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
MOST_THREADS = 8
"""More than so many threads gain little on models of the sizes that are trained on a CPU."""
_REMEDY = "launchers such as torchrun set these variables; unset them if none is at work"
PATIENCE = 60
"""Seconds that the others get to end once the first process has."""


def count() -> int:
    """Processes that were started together; 1 without a launcher.

    Raises:
        UserError: the launcher's variables cannot be, as when a job that has ended left some of them behind.
    """
    processes = variables.whole_number("WORLD_SIZE", 1, least=1)
    if processes > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise UserError(f"the environment has WORLD_SIZE={processes}, but no {' or '.join(missing)}; {_REMEDY}")
    if os.environ.get("WORLD_SIZE") and variables.whole_number("RANK", 0, least=0) >= processes:
        raise UserError(f"there is no RANK={os.environ['RANK']} among WORLD_SIZE={processes} processes; {_REMEDY}")
    return processes


def on_this_machine() -> int:
    """Those of them that share this machine's cores."""
    return variables.whole_number("LOCAL_WORLD_SIZE", 1, least=1)


def is_first() -> bool:
    """Whether this is the one that writes files."""
    return count() == 1 or variables.whole_number("RANK", 0, least=0) == 0


def speaks() -> bool:
    """Whether this is the one that says what ended all of them; also where the variables are wrong."""
    try:
        return is_first()
    except UserError:
        return True


def meeting_place() -> str:
    """Where the processes meet, in the words of the variables that say so."""
    return ", ".join(f"{name}={os.environ.get(name, '')}" for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"))


def asks_for_sharding() -> bool:
    """Whether `accelerate launch --use_fsdp` started it."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def check_share(prompts: int, processes: int) -> None:
    """Raises UserError where that many prompts an iteration cannot be shared equally."""
    if prompts % processes:
        unequal = f"prompts_per_iteration={prompts} cannot be shared equally by {processes} processes"
        raise UserError(f"{unequal}; take a multiple of their number")


def threads(beside: int = 1) -> int:
    """CPU threads of a process: OMP_NUM_THREADS, else its share of the usable cores, at most `MOST_THREADS`.

    Args:
        beside: how many processes work at the same time, each with as many threads.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # `4,2` is of nested loops
    if asked.isdecimal() and int(asked):
        return int(asked)
    return min(MOST_THREADS, max(1, usable_cores() // (on_this_machine() * beside)))


def usable_cores() -> int:
    """CPU cores that this process may use: those that it is bound to, within its container's share of time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([bound, *_time_shares()])))


def _time_shares() -> Iterator[float]:
    """Cores' worth of time that each control group around this process grants, where it has a limit; of either version."""
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        roots = [CGROUPS / name for name in (controllers, "cpu")] if controllers else [CGROUPS, CGROUPS / "unified"]
        inner = Path(path.lstrip("/"))
        for folder in (root / below for root in roots for below in (inner, *inner.parents)):
            with suppress(OSError, ValueError, ZeroDivisionError):
                if controllers:
                    limit, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
                else:
                    limit, period = map(int, (folder / "cpu.max").read_text().split())  # ValueError: "max" is no limit
                if limit > 0:
                    yield limit / period


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
    with safe_children():
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
        free.bind((LOOPBACK, 0))
        return int(free.getsockname()[1])


def listening(port: int) -> socket.socket:
    """A socket that listens on that port, to this machine alone."""
    made = socket.socket()
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((LOOPBACK, port))
        made.listen()
    except OSError as error:
        made.close()
        raise RunError(f"cannot listen on {LOOPBACK}:{port}: {error.strerror}") from None
    return made


def loopback_interface() -> str | None:
    """`lo` on Linux, `lo0` on macOS."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


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
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
    }


def _other(environment: dict[str, str], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    begin_child()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is told, and tells
    os.environ |= environment
    end_with_parent()
    with suppress(KeyboardInterrupt, UserError, RunError):  # the first process has it too, and speaks
        work(*arguments)
