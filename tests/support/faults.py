"""Failures of the environment: killed processes, full disks, and folders that cannot be written."""

import ctypes
import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from multiprocessing import context, forkserver, get_context
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from alignbench import run
from alignbench.__main__ import main
from alignbench.comparison import pool
from alignbench.config.run_config import RunConfig
from alignbench.files import writing as files
from alignbench.runtime import import_path, launch

ROOT = Path(__file__).parents[2]


class _Forked(context.ForkServerProcess):
    """A process of the fork server, which is started with all its modules whoever starts the first process.

    It finds modules in the folder in which it starts, unless a variable forbids that; a module that it does not find it leaves
    out without a word, and each of its processes would import it anew.
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802  (as in multiprocessing)
        with chdir(ROOT), pytest.MonkeyPatch.context() as patch:
            for name in ("PYTHONSAFEPATH", import_path._OURS):
                patch.delenv(name, raising=False)
            forkserver.ensure_running()
        return context.ForkServerProcess._Popen(process_obj)


class _ForkServer(context.ForkServerContext):
    Process = _Forked


CONTEXT = _ForkServer()
CONTEXT.set_forkserver_preload(
    [
        "tests.support.together",
        "tests.support.plugins",
        "tests.support.quick_figures",
        "tests.support.replays",
        "tests.support.same_runs",
        "torch._dynamo",
        "pyarrow.parquet",
        "evals.diversity",
        "evals.mode_coverage",
        "evals.scenario_reward",
        "tests.support.pipelines",
        "alignbench.backbones.flux",
        "alignbench.backbones.sd3",
        "peft",
        "torch.distributed.fsdp",
        "tests.support.frozen",
    ]
)
"""Its processes are forked from one that has torch and diffusers, so that each costs milliseconds."""

PATIENCE = 240
"""Seconds to wait for another process."""


class _Forks:
    """The context of a comparison's workers that are forked, as are the processes with which they share a cell."""

    Pipe = staticmethod(CONTEXT.Pipe)

    @staticmethod
    def Process(target: Callable[..., None], args: tuple[Any, ...]) -> Any:  # noqa: N802  (as in multiprocessing)
        return CONTEXT.Process(target=_forking, args=(target, args))


def _forking(work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Does a worker's work, in a process that has not used torch yet, so that it can be forked itself."""
    launch.get_context = lambda kind: get_context("fork")  # type: ignore[attr-defined, assignment]
    work(*arguments)


def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a comparison fork its workers too, so that neither they nor those with which they share a cell import torch."""
    monkeypatch.setattr(pool, "get_context", lambda kind: _Forks)


def killed_at(moment: int | None, config: RunConfig, out: Path) -> int:
    """Runs or resumes in a new process that is killed at its call number `moment`; returns the exit code."""
    process = CONTEXT.Process(target=_counting, args=(moment, config, out, None))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode is not None
    return process.exitcode


def calls_of(config: RunConfig, out: Path) -> int:
    """Counts the function calls of a complete run."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_counting, args=(None, config, out, theirs))
    process.start()
    assert ours.poll(PATIENCE)
    count = int(ours.recv())
    process.join(PATIENCE)
    assert process.exitcode == 0
    return count


def _counting(moment: int | None, config: RunConfig, out: Path, answer: Any) -> None:
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        if event in ("call", "c_call"):
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    run(config, out, resume=(out / "config.yaml").is_file())
    sys.setprofile(None)
    if answer is not None:
        answer.send(calls)


def killed_while_writing(name: str, config: RunConfig, out: Path) -> None:
    """Runs until half of a file of that name is on the disk, and then kills the process."""
    halfway = CONTEXT.Event()
    process = CONTEXT.Process(target=_slowly, args=(name, config, out, halfway))
    process.start()
    assert halfway.wait(PATIENCE)
    process.kill()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL


def _slowly(name: str, config: RunConfig, out: Path, halfway: Any) -> None:
    def half(path: Path) -> None:
        if path.name.startswith(name):
            os.truncate(path, path.stat().st_size // 2)
            halfway.set()
            time.sleep(PATIENCE)

    files._flush = half  # a file is written, but not yet moved
    run(config, out)


@contextmanager
def command(arguments: list[str], said: Path) -> Iterator[Any]:
    """Runs the command line in a new process; its stderr goes to the file."""
    process = CONTEXT.Process(target=_command, args=(arguments, said))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join(PATIENCE)


def _command(arguments: list[str], said: Path) -> None:
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        sys.argv = ["alignbench", *arguments]
        main()


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """Limits the size of files in bytes. The system's error differs from that of a full disk only in its wording."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk(name: str, after: int = 0) -> Callable[[Path], None]:
    """What `files._flush` is replaced by, so that the disk is full whenever a file of that name is written, from the
    `after`-th time on."""
    times = 0

    def flush(file: Path) -> None:
        nonlocal times
        if name in file.name:
            times += 1
            if times > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    return flush


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Makes the folder read-only, for root as well."""
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    try:
        with _without_roots_rights():
            yield
    finally:
        folder.chmod(mode)


@contextmanager
def _without_roots_rights() -> Iterator[None]:
    """Drops the capabilities that let root ignore permissions (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH), in this thread."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    version3, this_thread = 0x20080522, 0
    header = (ctypes.c_uint32 * 2)(version3, this_thread)
    rights = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, rights) == 0
    effective = rights[0]
    rights[0] = effective & ~0b110
    assert libc.capset(header, rights) == 0
    try:
        yield
    finally:
        rights[0] = effective
        assert libc.capset(header, rights) == 0
