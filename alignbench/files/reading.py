"""What records are read through: regular files alone, within limits, and one sentence for whatever else is there.

A results folder may come from anywhere. So a named pipe, a device or a folder in place of a file is not waited for, and what
a small file would unfold to is known before it does.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from alignbench.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

MAX_JSON_BYTES = 2**26
MAX_DEPTH = 60
"""Of lists and mappings inside one another in a JSON file."""
MAX_TABLE_BYTES = 2**30
"""Of a Parquet file, and of all texts that it unfolds to."""
MAX_ROWS, MAX_COLUMNS, MAX_VALUES = 10_000_000, 10_000, 100_000_000
"""Of a Parquet file; the last is rows times columns."""

Kind = Literal["whole", "number", "text"]
_MEANING: dict[Kind, str] = {"whole": "whole numbers", "number": "numbers", "text": "texts"}


def open_regular(file: Path) -> BinaryIO:
    """The file opened for reading its bytes.

    Raises:
        UserError: it is not there, cannot be read, or is not a regular file, such as a folder or a named pipe.
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


def read_json(file: Path) -> dict[str, Any]:
    """The keys and values of a JSON file: finite numbers that 64 bits hold, texts that are valid Unicode.

    Raises:
        UserError: it cannot be read, is no JSON, or holds anything else.
    """
    with open_regular(file) as opened:
        try:
            content = opened.read(MAX_JSON_BYTES + 1)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    if len(content) > MAX_JSON_BYTES:
        raise UserError(f"cannot read {file}: it is larger than {MAX_JSON_BYTES >> 20} MiB")
    try:
        data = json.loads(content.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{file} is not valid JSON{where}; it may have been altered") from None
    if not isinstance(data, dict):
        raise UserError(f"{file} is not a record: it holds no keys and values")
    why = _unusable(data)
    if why:
        raise UserError(f"{file} is not a record: it holds {why}")
    return data


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def _unusable(data: Any) -> str | None:
    """What in the data no record has."""
    level = [data]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str) and not value.isascii() and any(0xD800 <= ord(c) <= 0xDFFF for c in value):
                return "a text that is not valid Unicode"
            elif isinstance(value, float) and not math.isfinite(value):
                return "a number that is not finite"
            elif isinstance(value, int) and not -(2**63) <= value < 2**63:
                return "a number that does not fit into 64 bits"
        if not below:
            return None
        level = below
    return f"more than {MAX_DEPTH} levels of lists and mappings"


def read_table(
    file: Path, columns: Mapping[str, Kind] | None = None, optional: Mapping[str, Kind] | None = None
) -> "pd.DataFrame":
    """A Parquet table of numbers and texts.

    Args:
        columns: those that it must have, without missing values but NaN of numbers; others are whatever they are.
        optional: what other columns hold where they are there.

    Raises:
        UserError: it cannot be read, is no such table, or would unfold beyond the limits.
    """
    try:
        return _read_table(file, columns or {}, optional or {})
    except UserError:
        raise
    except Exception as error:  # pyarrow raises its own errors, and whatever damaged bytes lead it to
        why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read {file}: {why}") from None


def _read_table(file: Path, columns: Mapping[str, Kind], optional: Mapping[str, Kind]) -> "pd.DataFrame":
    import pyarrow as pa
    import pyarrow.parquet as pq

    def refuse(why: str) -> UserError:
        return UserError(f"cannot read {file}: {why}")

    with open_regular(file) as opened:
        if os.fstat(opened.fileno()).st_size > MAX_TABLE_BYTES:
            raise refuse(f"it is larger than {MAX_TABLE_BYTES >> 20} MiB")
        found = pq.ParquetFile(opened)
        rows, names = found.metadata.num_rows, found.schema_arrow.names
        if rows > MAX_ROWS or len(names) > MAX_COLUMNS or rows * len(names) > MAX_VALUES:
            raise refuse(f"{rows} rows of {len(names)} columns are more than a record has")
        if len(set(names)) < len(names):
            raise refuse("two of its columns have the same name")
        for name in columns:
            if name not in names:
                raise refuse(f"it has no column {name!r}")
        kinds: dict[str, Kind | None] = {}
        for column in found.schema_arrow:
            kind, wanted = _kind(column.type), {**columns, **optional}.get(column.name)
            fits = kind == wanted or (kind, wanted) == ("whole", "number") if wanted else kind is not None
            if not fits and not pa.types.is_null(column.type):
                holds = _MEANING[wanted] if wanted else "numbers or texts"
                raise refuse(f"its column {column.name!r} should hold {holds}, but holds {column.type}")
            kinds[column.name] = kind
        # Dictionaries keep a text that stands in many rows once, in memory too.
        texts = [name for name, kind in kinds.items() if kind == "text"]
        table = pq.ParquetFile(opened, read_dictionary=texts).read()
    if sum(map(_text_bytes, (table.column(name) for name in texts))) > MAX_TABLE_BYTES:
        raise refuse(f"its texts are longer than {MAX_TABLE_BYTES >> 20} MiB")
    for name, kind in columns.items():
        if table.column(name).null_count and kind != "number":
            raise refuse(f"its column {name!r} has missing values")
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True)
    return frame.astype(dict.fromkeys(texts, object) | {n: "float64" for n, kind in kinds.items() if kind is None})


def _kind(kind: "pa.DataType") -> Kind | None:
    """None for what no record has, and where all values are missing."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind):
        return "whole"
    if pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return "number"
    return "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def _text_bytes(column: "pa.ChunkedArray") -> int:
    """How long the texts of a column of dictionaries are, each as often as it stands there."""
    import pyarrow.compute as pc

    total = 0
    for chunk in column.chunks:
        total += pc.sum(pc.take(pc.binary_length(chunk.dictionary), chunk.indices)).as_py() or 0
    return total
