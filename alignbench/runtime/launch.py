"""Runs on several ranks: what the launcher's variables say, and starting ranks on this machine. Imports nothing heavy."""

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
"""Largest default number of threads. More gain little for models that are small enough to be trained on a CPU."""
_REMEDY = "launchers such as torchrun set these variables; unset them if there is no launcher"
PATIENCE = 60
"""Seconds that the other ranks have to end after rank zero has ended."""


def count() -> int:
    """The number of ranks; 1 without a launcher.

    Raises:
        UserError: the launcher's variables contradict each other, for instance because an ended job left some of them behind.
    """
    processes = variables.whole_number("WORLD_SIZE", 1, least=1)
    if processes > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise UserError(f"the environment has WORLD_SIZE={processes}, but not {' and '.join(missing)}; {_REMEDY}")
    if os.environ.get("WORLD_SIZE") and variables.whole_number("RANK", 0, least=0) >= processes:
        raise UserError(f"RANK={os.environ['RANK']} must be below WORLD_SIZE={processes}; {_REMEDY}")
    return processes


def on_this_machine() -> int:
    """The number of ranks on this machine, which share its cores."""
    return variables.whole_number("LOCAL_WORLD_SIZE", 1, least=1)


def is_first() -> bool:
    """Whether this is rank zero, which writes files."""
    return count() == 1 or variables.whole_number("RANK", 0, least=0) == 0


def speaks() -> bool:
    """Whether this rank prints the error that ended all ranks. It does if the launcher's variables are wrong."""
    try:
        return is_first()
    except UserError:
        return True


def meeting_place() -> str:
    """The launcher's variables, for messages about ranks that do not connect."""
    return ", ".join(f"{name}={os.environ.get(name, '')}" for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"))


def asks_for_sharding() -> bool:
    """Whether `accelerate launch --use_fsdp` started this process."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def check_share(prompts: int, processes: int) -> None:
    """Raises UserError if the prompts of an iteration cannot be divided equally between the ranks."""
    if prompts % processes:
        unequal = f"prompts_per_iteration={prompts} cannot be divided equally between {processes} processes"
        raise UserError(f"{unequal}; choose a multiple of {processes}")


def threads(beside: int = 1) -> int:
    """CPU threads of a process: OMP_NUM_THREADS, or else its share of the usable cores, at most `MOST_THREADS`.

    Args:
        beside: number of processes that work at the same time with as many threads each.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # `4,2` has a number for each nesting level
    if asked.isdecimal() and int(asked):
        return int(asked)
    return min(MOST_THREADS, max(1, usable_cores() // (on_this_machine() * beside)))


def usable_cores() -> int:
    """CPU cores that this process may use, limited by its CPU affinity and by its container's CPU quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([bound, *_time_shares()])))


def _time_shares() -> Iterator[float]:
    """The CPU quotas, in cores, of all control groups around this process (cgroups version 1 or 2)."""
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
                    limit, period = map(int, (folder / "cpu.max").read_text().split())  # ValueError: "max" means no limit
                if limit > 0:
                    yield limit / period


@contextmanager
def several(processes: int, work: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    """Makes this process rank zero of several; the other ranks are started here and run `work(*arguments)`.

    This does what `torchrun --standalone` does, for a process that continues afterwards.
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
    """A free port of this machine."""
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        return int(free.getsockname()[1])


def listening(port: int) -> socket.socket:
    """A socket that listens on the port, for connections from this machine only.

    Raises:
        RunError: the port cannot be listened on, for instance because it is taken.
    """
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
    """The name of the loopback interface: `lo` on Linux, `lo0` on macOS."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


def end_with_parent() -> None:
    """Sends this process SIGTERM once its parent has ended."""

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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank zero receives Ctrl-C and informs the other ranks
    os.environ |= environment
    end_with_parent()
    with suppress(KeyboardInterrupt, UserError, RunError):  # rank zero raises it too and prints it
        work(*arguments)
