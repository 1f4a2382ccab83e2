"""Opens files of a folder that may come from anywhere: regular files only, without waiting for a pipe or a device."""

import hashlib
import os
import stat
from io import BufferedReader
from pathlib import Path

from alignbench.errors import UserError


def open_regular(file: Path) -> BufferedReader:
    """Opens a file to read its bytes.

    Raises:
        UserError: the file does not exist, cannot be read, or is not a regular file, such as a folder or a named pipe.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    except ValueError as error:  # a NUL in the name
        raise UserError(f"cannot read {file}: {error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"cannot read {file}: it is not a regular file")
    return os.fdopen(descriptor, "rb")


def sha256_of(file: Path) -> str:
    """The SHA-256 digest of a file's content, in hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
