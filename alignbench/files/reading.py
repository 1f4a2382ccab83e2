"""Reads records: JSON files and Parquet tables of a results folder, which may come from anywhere.

Only regular files are opened, so a named pipe, a device or a folder in place of a file is refused at once. Before a small file
is decompressed, its size in memory is known. Whatever is not a record is refused in one sentence.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alignbench.errors import UserError
from alignbench.files.json_files import read_json
from alignbench.files.opening import open_regular

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

MAX_DEPTH = 60
"""Largest nesting depth of lists and mappings in a JSON record."""
MAX_TABLE_BYTES = 2**30
"""Largest Parquet file, and largest total of its texts in memory."""
MAX_ROWS, MAX_COLUMNS, MAX_VALUES = 10_000_000, 10_000, 100_000_000
"""Largest Parquet table; the last number limits rows times columns."""

Kind = Literal["whole", "number", "text"]
_MEANING: dict[Kind, str] = {"whole": "whole numbers", "number": "numbers", "text": "texts"}


def read_record(file: Path) -> dict[str, Any]:
    """Reads the keys and values of a JSON record: finite numbers that fit into 64 bits, and texts that are valid Unicode.

    Raises:
        UserError: the file cannot be read, is not valid JSON, or holds anything else.
    """
    data = read_json(file, "record")
    problem = _unusable(data)
    if problem:
        raise UserError(f"{file} is not a record: it holds {problem}")
    return data


def _unusable(data: Any) -> str | None:
    """What the data holds that a record must not hold; None if it is usable."""
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
    """Reads a Parquet table of numbers and texts.

    Args:
        file: the file to read.
        columns: the columns that the table must have, with their kinds. Numbers may be NaN; no other value may be missing.
        optional: the kinds of further columns, if the table has them. All other columns are read as they are.

    Raises:
        UserError: the file cannot be read, is not such a table, or would exceed the limits in memory.
    """
    try:
        return _read_table(file, columns or {}, optional or {})
    except UserError:
        raise
    except Exception as error:  # pyarrow raises its own errors, and others for damaged bytes
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
        parquet = pq.ParquetFile(opened)
        rows, names = parquet.metadata.num_rows, parquet.schema_arrow.names
        if rows > MAX_ROWS or len(names) > MAX_COLUMNS or rows * len(names) > MAX_VALUES:
            raise refuse(f"{rows} rows of {len(names)} columns are more than a record can have")
        if len(set(names)) < len(names):
            raise refuse("two of its columns have the same name")
        for name in columns:
            if name not in names:
                raise refuse(f"it has no column {name!r}")
        kinds: dict[str, Kind | None] = {}
        for column in parquet.schema_arrow:
            kind, required = _kind(column.type), {**columns, **optional}.get(column.name)
            fits = kind == required or (kind, required) == ("whole", "number") if required else kind is not None
            if not fits and not pa.types.is_null(column.type):
                holds = _MEANING[required] if required else "numbers or texts"
                raise refuse(f"its column {column.name!r} should hold {holds}, but holds {column.type}")
            kinds[column.name] = kind
        # As dictionaries, texts that occur in many rows are kept once in memory too.
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
    """The kind of a column; None for a type that records do not use, and for a column without values."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind):
        return "whole"
    if pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return "number"
    return "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def _text_bytes(column: "pa.ChunkedArray") -> int:
    """The total length of the texts in a dictionary column, with repetitions."""
    import pyarrow.compute as pc

    total = 0
    for chunk in column.chunks:
        total += pc.sum(pc.take(pc.binary_length(chunk.dictionary), chunk.indices)).as_py() or 0
    return total
