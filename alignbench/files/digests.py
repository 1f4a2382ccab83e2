"""Lists of SHA-256 digests as `sha256sum -c` reads them: a line for each file of a folder."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from alignbench.errors import UserError
from alignbench.files.opening import open_regular
from alignbench.files.text import excerpt

SUMS = "SHA256SUMS"
"""Name of the list in the folder whose files it lists."""
MAX_BYTES = 2**22
"""Largest list that is read."""
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


def digest_of(file: Path) -> str:
    """The SHA-256 digest of a regular file's content, in hexadecimal digits.

    Raises:
        UserError: the file cannot be read, or is not a regular file.
    """
    with open_regular(file) as opened:
        try:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from None


def sums_text(digests: Mapping[str, str]) -> str:
    """The content of a list for digests by file name, in the order of the names."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))


def read_sums(file: Path) -> dict[str, str]:
    """Reads a list: file name -> digest.

    Raises:
        UserError: the list cannot be read, or a line of it is not a digest with the name of a file below its folder.
    """
    with open_regular(file) as opened:
        try:
            text = opened.read(MAX_BYTES + 1).decode("utf-8")
        except (OSError, UnicodeDecodeError):
            raise UserError(f"cannot read {file}: it is not a list of digests") from None
    if len(text) > MAX_BYTES:
        raise UserError(f"cannot read {file}: it is larger than {MAX_BYTES >> 20} MiB")
    digests = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = _LINE.fullmatch(line)
        if not match or match[2] in digests or not _is_below(match[2].split("/")):
            raise UserError(f"cannot read {file}: line {number} is not a digest and the name of a file: {excerpt(line)}")
        digests[match[2]] = match[1]
    return digests


def _is_below(parts: Iterable[str]) -> bool:
    """Whether a path with these parts lies below its folder."""
    return all(part not in ("", ".", "..") for part in parts)
