"""Standard streams that are closed, full, or cannot hold every letter; nothing that is worth keeping is lost by them."""

import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO, cast

NUMBERS = {"stdin": 0, "stdout": 1, "stderr": 2}


def open_closed() -> None:
    """Puts the null device in the place of standard streams that are closed.

    A file that is opened later would otherwise get a closed stream's number, and with it what libraries print there.
    """
    for name, number in NUMBERS.items():
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


class _Raw(io.FileIO):
    """Keeps the first failure instead of raising it, and drops what comes after."""

    failure: OSError | None = None

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes


class Output:
    """Stdout and stderr while `tolerant` is entered."""

    def __init__(self) -> None:
        self.raw: dict[str, _Raw] = {}

    def problem(self) -> str | None:
        """Why not all of the results could be printed; None where they were, or where their reader had seen enough."""
        sys.stdout.flush()
        failure = self.raw["stdout"].failure if "stdout" in self.raw else None
        if failure is None or failure.errno == errno.EPIPE:
            return None
        return f"cannot write to standard output: {failure.strerror or failure}"


@contextmanager
def tolerant() -> Iterator[Output]:
    """While entered, a full disk or a reader that is gone ends no command: what a run does matters more than its progress.

    Letters that a stream's encoding lacks are printed as escapes. Streams that are not the process's own, as in tests and
    notebooks, stay what they are.
    """
    output, former = Output(), {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in former.items():
        if _is_own(stream, NUMBERS[name]):
            stream.flush()
            output.raw[name] = raw = _Raw(NUMBERS[name], "w", closefd=False)
            lines = name == "stderr" or raw.isatty()
            buffered = io.BufferedWriter(cast(io.RawIOBase, raw))
            text = io.TextIOWrapper(buffered, stream.encoding, "backslashreplace", line_buffering=lines)
            setattr(sys, name, text)
    try:
        yield output
    finally:
        for name in output.raw:
            getattr(sys, name).flush()
            setattr(sys, name, former[name])


def _is_own(stream: TextIO | None, number: int) -> bool:
    try:
        return stream is not None and stream.fileno() == number
    except (OSError, ValueError, AttributeError):  # io.UnsupportedOperation is both of the former
        return False


def print_json(document: str) -> None:
    """Prints a JSON document on stdout, with its letters as JSON's own escapes where the encoding lacks some."""
    try:
        document.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        document = json.dumps(json.loads(document), indent=2)
    print(document)
