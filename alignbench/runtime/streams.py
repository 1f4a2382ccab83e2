"""Keeps a command running if standard streams are closed, full, or cannot encode every character."""

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
    """Opens the null device in place of standard streams that are closed.

    Otherwise a file that is opened later would get the number of a closed stream, and libraries would print into it.
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
    """A stream that records its first failure instead of raising it, and discards all later output."""

    failure: OSError | None = None

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes


class Output:
    """Stdout and stderr inside the context `tolerant`."""

    def __init__(self) -> None:
        self.raw: dict[str, _Raw] = {}

    def problem(self) -> str | None:
        """Why results could not be printed; None if they were, or if their reader closed the pipe."""
        sys.stdout.flush()
        failure = self.raw["stdout"].failure if "stdout" in self.raw else None
        if failure is None or failure.errno == errno.EPIPE:
            return None
        return f"cannot write to standard output: {failure.strerror or failure}"


@contextmanager
def tolerant() -> Iterator[Output]:
    """Keeps a command running although the disk is full or the reader of its output has gone.

    Characters that a stream cannot encode are printed as escapes. Streams that are not the process's own, as in tests and
    notebooks, are not changed.
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
    except (OSError, ValueError, AttributeError):  # io.UnsupportedOperation is an OSError and a ValueError
        return False


def print_json(document: str) -> None:
    """Prints a JSON document on stdout; if the stream cannot encode some characters, they become JSON escapes."""
    try:
        document.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        document = json.dumps(json.loads(document), indent=2)
    print(document)
