"""The command line: in a process of its own, as a user meets it, or in this one, which spares the import of torch."""

import io
import os
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from alignbench import __main__ as program

ROOT = Path(__file__).parents[2]


def alignbench(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return in_a_process([sys.executable, "-m", "alignbench", *arguments], cwd)


def in_a_process(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Any command, to which Python finds this checkout's alignbench."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=240, check=False)


def in_this_process(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """As `alignbench`, from the arguments to the exit code, but for signals, which stay pytest's."""
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
