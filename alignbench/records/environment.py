"""What numbers depend on besides the configuration: versions, hardware, and the command that was typed."""

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from alignbench.errors import redacted
from alignbench.records.base import as_text

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "easyocr", "rapidocr", "numpy", "scipy")


def environment(device: str, threads: int, processes: int = 1) -> dict[str, Any]:
    """Collects what the numbers of a record depend on besides its configuration.

    Args:
        device: the device that the model was on.
        threads: CPU threads of each process.
        processes: how many processes shared the work.
    """
    import torch

    from alignbench.runtime.hardware import has_fast_bfloat16

    libraries = {name: _version(name) for name in LIBRARIES}
    return {
        "python": platform.python_version(),
        "torch": libraries.pop("torch"),
        "alignbench": _version("alignbench"),
        "git_revision": git_revision(),
        "device": device,
        "processor": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fast_bfloat16": has_fast_bfloat16(torch.device(device)),
        "threads": threads,
        "processes": processes,
        "platform": platform.platform(),
        "libraries": libraries,
        "command": command(),
    }


def command() -> str | None:
    """Returns the command line of this process, ready for a shell; None if it is not alignbench's, as in a notebook."""
    program = Path(sys.argv[0])
    ours = program.name == "alignbench" or program == Path(__file__).parents[1] / "__main__.py"
    if not ours:
        return None
    return str(as_text(shlex.join(["alignbench", *map(redacted, sys.argv[1:])])))


@cache
def git_revision() -> str | None:
    """Returns the commit of the checkout that alignbench runs from, with `-dirty` for local changes; None outside one.

    It is read once, when a process begins: a long process goes on with the code that it has loaded, whatever is committed
    meanwhile.
    """
    return revision_of(Path(__file__).parents[2])


def revision_of(checkout: Path) -> str | None:
    """Returns the commit of a checkout; None where the folder is none, such as a package folder inside another repository."""
    try:
        if Path(_git(checkout, "rev-parse", "--show-toplevel")) != checkout.resolve():
            return None
        revision = _git(checkout, "rev-parse", "HEAD")
        return revision + ("-dirty" if _git(checkout, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def now() -> str:
    """Returns the time in UTC, in ISO 8601 format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
