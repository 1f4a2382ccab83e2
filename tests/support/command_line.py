"""Runs the command line: in a new process, as a user does, or in this one."""

import io
import os
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from alignbench import __main__ as program
from tests.support.faults import CONTEXT, PATIENCE

ROOT = Path(__file__).parents[2]


def alignbench(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process with its own streams, forked from one that has imported torch."""
    with TemporaryDirectory() as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        process = CONTEXT.Process(target=_command, args=(arguments, cwd, out, err))
        process.start()
        process.join(PATIENCE)
        assert process.exitcode is not None, "the command does not end"
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


def _command(arguments: tuple[str, ...], cwd: Path, out: Path, err: Path) -> None:
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ["COLUMNS"] = "160"
    sys.argv = ["alignbench", *arguments]
    program.main()


def in_a_process(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs any command; Python finds this checkout's alignbench in it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=240, check=False)


def in_this_process(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs the command line in this process, from the arguments to the exit code; signals stay pytest's."""
    out, err = io.StringIO(), io.StringIO()
    with (
        chdir(cwd),
        mock.patch.object(sys, "argv", ["alignbench", *arguments]),
        mock.patch.object(program, "interrupt_on_every_end"),
        mock.patch.object(sys, "path", list(sys.path)),
        mock.patch.dict(os.environ, COLUMNS="160"),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            program.main()
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(arguments, int(code or 0), out.getvalue(), err.getvalue())
