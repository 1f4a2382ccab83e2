"""The one JSON reader: for records, configurations of models, and lines of prompt files."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from alignbench.errors import UserError
from alignbench.files.opening import open_regular
from alignbench.files.text import excerpt

MAX_BYTES = 2**26
"""Largest JSON file that is read, unless the caller has another limit."""


def read_json(file: Path, what: str, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Reads the keys and values of a JSON file, which may begin with a byte-order mark.

    Args:
        file: the file to read.
        what: what the file holds, for messages: `record`.
        limit: largest size in bytes.

    Raises:
        UserError: the file cannot be read, is too large, is not valid JSON, or does not hold keys and values.
    """
    with open_regular(file) as opened:
        try:
            content = opened.read(limit + 1)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    if len(content) > limit:
        raise UserError(f"cannot read {file}: it is larger than {limit >> 20} MiB")
    try:
        data = parse_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"cannot read the {what} in {file}: it is not UTF-8 text") from None
    except ValueError as error:
        raise UserError(f"cannot read the {what} in {file}: it is not valid JSON ({json_problem(error)})") from None
    if not isinstance(data, dict):
        raise UserError(f"cannot read the {what} in {file}: it does not hold keys and values")
    return data


def parse_json(text: str) -> Any:
    """Parses JSON text like `json.loads`, but refuses a key that occurs twice.

    Raises:
        ValueError: the text is not valid JSON, is nested too deeply, or has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_problem(error: ValueError) -> str:
    """What `parse_json` found wrong, with the place where it is known."""
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    return str(error)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has the key {excerpt(twice)} twice")
    return entries
