"""Reads texts and tables from files of other programs, or refuses them in a sentence with the file and the line.

The content decides how a file is read if it is unmistakable (Parquet's magic bytes, JSON's brackets), and otherwise the suffix,
whose case does not matter; a pipe has no suffix. The size in memory is checked before a file is decompressed.
"""

import csv
import io
import json
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alignbench.errors import UserError, did_you_mean
from alignbench.files.json_files import json_problem, parse_json
from alignbench.files.text import excerpt

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

T = TypeVar("T")

MAX_BYTES = 2**28
"""Largest text file, and largest decompressed Parquet column."""
MAX_ROWS = 5_000_000
MAX_CHARACTERS = 100_000
"""Largest length of a single text in a table."""

CSV, JSON, PARQUET = (".csv", ".tsv", ".tab"), (".json", ".jsonl", ".ndjson"), (".parquet", ".pq")
MAGIC = b"PAR1"
DELIMITERS = {".csv": ",;\t", ".tsv": "\t,;", ".tab": "\t,;"}
"""Possible delimiters, by suffix. The first one with which the header row has an expected heading is used."""
FOREIGN = (
    *(".yaml", ".yml", ".toml", ".ini", ".xml", ".html", ".htm", ".md", ".rtf", ".py", ".ipynb", ".tex"),
    *(".xls", ".xlsx", ".ods", ".doc", ".docx", ".odt", ".pdf", ".zip", ".gz", ".bz2", ".xz", ".zst", ".tar", ".7z"),
    *(".arrow", ".feather", ".orc", ".avro", ".npy", ".npz", ".h5", ".sqlite", ".db", ".pkl", ".pt"),
)
"""Suffixes of formats that are not supported."""
_MARKS = {
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe\0\0": "utf-32-le",
    b"\0\0\xfe\xff": "utf-32-be",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}
"""Byte-order marks. Those of UTF-32 come before those of UTF-16, with which they begin."""
_JSON_START = re.compile(r'\s*(\{\s*"|\[\s*["{]|\[\s*$)', re.MULTILINE)
"""A beginning that JSON can have and prompts cannot."""


@dataclass(frozen=True)
class Table:
    """The columns of a table, by heading, and the place of each row in its file.

    Attributes:
        file: the file.
        headings: headings of the columns.
        unit: what `numbers` count: `line`, `row` or `entry`.
        numbers: number of each row's line, row or entry.
    """

    file: Path
    headings: list[str]
    unit: str
    numbers: Sequence[int]
    _column: Callable[[int], Sequence[Any]]

    def __len__(self) -> int:
        return len(self.numbers)

    def find(self, *names: str) -> str | None:
        """The heading that equals the first name, or else any of the names; case, blanks, `_`, `-` and dots are ignored.

        Raises:
            UserError: several headings match.
        """
        matches = [h for h in self.headings if _plain(h) == _plain(names[0])]
        matches = matches or [h for h in self.headings if _plain(h) in map(_plain, names)]
        if len(matches) > 1:
            both = " and ".join(map(excerpt, matches[:2]))
            raise UserError(f"{self.file} has the columns {both}; call only one of them {names[0]!r} and rename the other")
        return matches[0] if matches else None

    def require(self, *names: str) -> str:
        """Like `find`, but a missing column is an error.

        Raises:
            UserError: no heading or several headings match.
        """
        heading = self.find(*names)
        if heading is None:
            near = [h[:40] for h in self.headings if h.strip()][:20]
            raise UserError(f"{self.file} has no column {names[0]!r}{did_you_mean(names[0], near)}")
        return heading

    def values(self, heading: str) -> Sequence[Any]:
        """The values of a column, unchanged.

        Raises:
            UserError: the column cannot be read, or (in Parquet) its type is neither text nor integer.
        """
        return self._column(self.headings.index(heading))

    def texts(self, heading: str) -> list[str]:
        """The texts of a column, without white space at their ends.

        Raises:
            UserError: a value is empty, too long, not valid Unicode, or not a text.
        """
        checked: dict[str, str] = {}  # a small Parquet file can repeat a long text millions of times
        texts = []
        for row, value in enumerate(self.values(heading)):
            if not isinstance(value, str) or value not in checked:
                checked[value] = self._text(heading, row, value)
            texts.append(checked[value])
        return texts

    def place(self, row: int) -> str:
        """Names the file and the line of a row, for messages."""
        return f"{self.file}, {self.unit} {self.numbers[row]}"

    def _text(self, heading: str, row: int, value: Any) -> str:
        if isinstance(value, str) and (text := stripped(value)) and len(text) <= MAX_CHARACTERS and _is_unicode(text):
            return text
        if value is None or (isinstance(value, str) and not stripped(value)):
            problem = "is empty"
        elif not isinstance(value, str):
            problem = f"must be a text, got {excerpt(value)}"
        elif len(value) > MAX_CHARACTERS:
            problem = f"has {len(value):,} characters; at most {MAX_CHARACTERS:,} are read"
        else:
            problem = f"is not valid Unicode: {excerpt(value)}"
        raise UserError(f"{self.place(row)}: {excerpt(heading)} {problem}")


def stripped(text: str) -> str:
    """The text without white space and byte-order marks at its ends; joining files can leave such marks inside a file."""
    return text.strip().strip("\ufeff").strip()


def read_text(file: Path, what: str, *, pipe: bool = False) -> str:
    """Reads a text file in UTF-8, or in the encoding of its byte-order mark.

    Args:
        file: the file to read.
        what: what the file holds, for messages: `prompts`.
        pipe: whether a pipe such as /dev/stdin is read too, waiting for it.

    Raises:
        UserError: the file cannot be read, is too large, or is not a text.
    """
    return _decoded(_read(file, what, pipe, parquet=False) or b"", file, what)


def read_objects(file: Path, what: str) -> list[tuple[str, dict[str, Any]]]:
    """Reads the objects of a file of JSON lines, or of a JSON list, each with its place in the file.

    Raises:
        UserError: the file cannot be read or has no object, or a line is not an object.
    """
    unit, entries = _entries(read_text(file, what), file, what, texts=False)
    if not entries:
        raise UserError(f"{file} holds no {what}")
    return [(f"{file}, {unit} {number}", entry) for number, entry in entries]


def read_table(file: Path, what: str, *headings: str, lines: bool = False, pipe: bool = False) -> Table:
    """Reads a table from CSV (with commas, semicolons or tabs), JSON lines, a JSON list, or Parquet.

    Args:
        file: the file to read.
        what: what the file holds, for messages: `prompts`.
        headings: possible headings of the required column. Any of them identifies a header row and its delimiter.
        lines: whether other text is read too, as one column with the first heading and a row for each line that is not blank,
            and a JSON list of texts as well.
        pipe: whether a pipe such as /dev/stdin is read too, waiting for it.

    Raises:
        UserError: the file cannot be read, has no row or too many rows, or is damaged.
    """
    suffix = file.suffix.lower()
    if suffix in FOREIGN:
        raise UserError(
            f"cannot read the {what} in {file}: {suffix} is not one of the formats txt, csv, tsv, json, jsonl, parquet"
        )
    data = _read(file, what, pipe)
    if data is None or data.startswith(MAGIC) or suffix in PARQUET:
        table = _parquet(file, what, data)
    else:
        text = _decoded(data, file, what)
        if suffix in JSON or _JSON_START.match(text):
            table = _json_table(text, file, what, headings[0] if lines else None)
        elif suffix in CSV or _has_head(text, headings[0]) or not lines:
            table = _csv_table(text, file, what, headings)
        else:
            rows = _limited(_lines(text), file, what)
            table = Table(file, [headings[0]], "line", [n for n, _ in rows], lambda _: [line for _, line in rows])
    if not len(table):
        raise UserError(f"{file} holds no {what}")
    _check_rows(len(table), file, what)
    return table


def _cannot(what: str, file: Path, why: object) -> UserError:
    return UserError(f"cannot read the {what} in {file}: {why}")


def _read(file: Path, what: str, pipe: bool, *, parquet: bool = True) -> bytes | None:
    """Reads all bytes of a file; None for a regular Parquet file, which is read in parts."""
    try:
        regular = stat.S_ISREG(file.stat().st_mode)
        if not regular and not pipe and not file.is_dir():
            raise _cannot(what, file, "it is not a regular file")
        with file.open("rb") as opened:
            data = opened.read(4)
            if regular and parquet and (data == MAGIC or file.suffix.lower() in PARQUET):
                return None
            data += opened.read(MAX_BYTES)
    except OSError as error:
        raise _cannot(what, file, error.strerror) from None
    except ValueError as error:  # a name that a file cannot have
        raise _cannot(what, file, error) from None
    if len(data) > MAX_BYTES:
        raise _cannot(what, file, f"it is larger than {MAX_BYTES // 2**20} MiB")
    return data


def _decoded(data: bytes, file: Path, what: str) -> str:
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = data[len(mark) : len(mark) + error.start].decode(encoding, errors="replace").count("\n") + 1
        raise _cannot(what, file, f"line {line} is not valid {encoding.upper()} ({error.reason}); save it as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise _cannot(what, file, f"line {line} holds a NUL; it is not a text, or it is UTF-16 without a byte-order mark")
    return text


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers.

    Lines end with a line feed, a carriage return or both. Other separators can occur inside a text.
    """
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line := stripped(line):
            yield number, line


def _limited(rows: Iterator[T], file: Path, what: str) -> list[T]:
    taken = list(islice(rows, MAX_ROWS + 2))  # one of them may be a header row
    if len(taken) == MAX_ROWS + 2:
        raise _cannot(what, file, f"it has more rows than the {MAX_ROWS:,} that are read")
    return taken


def _check_rows(rows: int, file: Path, what: str) -> None:
    if rows > MAX_ROWS:
        raise _cannot(what, file, f"it has {rows:,} rows; at most {MAX_ROWS:,} are read")


def _plain(heading: str) -> str:
    return re.sub(r"[ \xa0_.-]+", "", heading.casefold())


def _is_unicode(text: str) -> bool:
    return text.isascii() or text.encode(errors="ignore").decode() == text


# ------------------------------------------------------------------------------------------------------------- JSON


def _parsed(text: str, file: Path, what: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise _cannot(what, file, json_problem(error)) from None


def _entries(text: str, file: Path, what: str, *, texts: bool) -> tuple[str, list[tuple[int, Any]]]:
    """The unit (`line` or `entry`) and the objects with their numbers; also texts, if a list has only texts."""
    first = next((line for _, line in _lines(text)), "")
    if first.startswith("[") or (first.startswith("{") and not _is_json(first) and _is_json(text)):
        whole = _parsed(text, file, what)
        if isinstance(whole, dict):
            whole = [whole]
        for number, entry in enumerate(whole, start=1):
            if not isinstance(entry, type(whole[0])) or not isinstance(entry, dict | str if texts else dict):
                expected = "only objects, or only texts" if texts else "only objects"
                raise _cannot(what, file, f"entry {number} is {excerpt(entry)}; the list must hold {expected}")
        return "entry", list(enumerate(whole, start=1))
    entries = []
    for number, line in _limited(_lines(text), file, what):
        try:
            entry = parse_json(line)
        except ValueError as error:
            why = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else error
            raise _cannot(what, file, f"line {number} is damaged, {why}") from None
        if not isinstance(entry, dict):
            raise _cannot(what, file, f"line {number} must be an object in braces, got {excerpt(entry)}")
        entries.append((number, entry))
    return "line", entries


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _json_table(text: str, file: Path, what: str, heading_of_texts: str | None) -> Table:
    unit, entries = _entries(text, file, what, texts=heading_of_texts is not None)
    numbers = [number for number, _ in entries]
    if heading_of_texts is not None and entries and isinstance(entries[0][1], str):
        return Table(file, [heading_of_texts], unit, numbers, lambda _: [entry for _, entry in entries])
    headings = list(dict.fromkeys(key for _, entry in entries for key in entry))
    return Table(file, headings, unit, numbers, lambda column: [entry.get(headings[column]) for _, entry in entries])


# -------------------------------------------------------------------------------------------------------------- CSV


def _has_head(text: str, heading: str) -> bool:
    """Whether a text that no suffix calls a table begins like one."""
    return any(_plain(heading) in map(_plain, head) for head in _heads(text, DELIMITERS[".csv"]).values())


def _heads(text: str, delimiters: str) -> dict[str, list[str]]:
    """The first row that is not empty, for each delimiter."""
    heads = {}
    for delimiter in delimiters:
        try:
            heads[delimiter] = next((row for _, row in _csv_rows(text[:MAX_CHARACTERS], delimiter)), [])
        except csv.Error:
            continue
    return heads


def _csv_table(text: str, file: Path, what: str, headings: Sequence[str]) -> Table:
    """Reads a CSV table of texts. pandas' own reader would take the first field of a row with too many fields for its name."""
    delimiters = DELIMITERS.get(file.suffix.lower(), DELIMITERS[".csv"])
    offset = 0
    if match := re.match(r"sep=([,;\t|])(?:\r\n|\n|\r)", text):  # a line that Excel writes and reads
        delimiters, text, offset = match[1], text[match.end() :], 1
    expected = {_plain(heading) for heading in headings}
    heads = _heads(text, delimiters)
    delimiter = next((d for d, head in heads.items() if expected & set(map(_plain, head))), delimiters[0])
    try:
        rows = _limited(_csv_rows(text, delimiter), file, what)
        if re.search(rf'(^|{re.escape(delimiter)}) +"', text, re.MULTILINE):
            rows = _with_blanks_before_quotes(text, delimiter) or rows
    except csv.Error as error:
        raise _cannot(what, file, error) from None
    head = [stripped(name) for name in rows[0][1]] if rows else []
    table = []
    for line, row in rows[1:]:
        if len(row) > 1 and not any(row):
            continue
        if len(row) < len(head) or any(row[len(head) :]):
            why = f"line {line + offset} has {len(row)} fields and the header row {len(head)}; a text with the delimiter "
            raise _cannot(what, file, f"{why}{delimiter!r} needs quotes")
        table.append((line + offset, row))
    return Table(file, head, "line", [line for line, _ in table], lambda column: [row[column] for _, row in table])


def _with_blanks_before_quotes(text: str, delimiter: str) -> list[tuple[int, list[str]]] | None:
    """The rows, if quotes may follow blanks as in `a.png, "one, two"`; None if the text cannot be read in this way."""
    try:
        return list(_csv_rows(text, delimiter, skipinitialspace=True))
    except csv.Error:
        return None


def _csv_rows(text: str, delimiter: str, skipinitialspace: bool = False) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, with the numbers of the lines on which they begin."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=skipinitialspace)
    begin = 1
    try:
        for row in reader:
            if row:
                yield begin, row
            begin = reader.line_num + 1
    except csv.Error as error:
        raise csv.Error(f"line {begin}: {error}; a text with quotes must be in quotes, and its own quotes doubled") from None


# ---------------------------------------------------------------------------------------------------------- Parquet


def _parquet(file: Path, what: str, data: bytes | None) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def opened(texts: list[str]) -> "pq.ParquetFile":
        source = str(file) if data is None else pa.BufferReader(data)
        return pq.ParquetFile(source, read_dictionary=texts)

    def guarded(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except UserError:
            raise
        except Exception as error:  # pyarrow raises its own errors, and others for damaged bytes
            why = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
            raise _cannot(what, file, why) from None

    def described() -> tuple["pq.FileMetaData", "pa.Schema"]:
        with opened([]) as parquet:
            return parquet.metadata, parquet.schema_arrow

    metadata, schema = guarded(described)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    rows = max(metadata.num_rows, sum(group.num_rows for group in groups))
    _check_rows(rows, file, what)

    def column(index: int) -> list[Any]:
        heading, kind = schema.names[index], schema.types[index]
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (
            pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind) or pa.types.is_integer(kind)
        ):
            raise UserError(f"{file}: the column {excerpt(heading)} holds {str(kind)[:60]}, not texts")
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == heading)
        if size > MAX_BYTES:
            mib = f"{size // 2**20:,} MiB in memory; at most {MAX_BYTES // 2**20} are read"
            raise _cannot(what, file, f"its column {excerpt(heading)} takes {mib}")
        # A repeated text is kept once, as in the file.
        with opened([heading]) as parquet:
            read = parquet.read(columns=[heading]).column(0)
        if len(read) != rows:
            raise ValueError(f"the column {heading!r} has {len(read)} rows of {rows}")
        return _values(read)

    return Table(file, list(schema.names), "row", range(1, rows + 1), lambda index: guarded(lambda: column(index)))


def _values(read: "pa.ChunkedArray") -> list[Any]:
    """The values of a column as Python's; equal texts of a dictionary are one object."""
    import pyarrow as pa

    values: list[Any] = []
    for chunk in read.chunks:
        if pa.types.is_dictionary(chunk.type):
            known = chunk.dictionary.to_pylist()
            values += [None if i is None else known[i] for i in chunk.indices.to_pylist()]
        else:
            values += chunk.to_pylist()
    return values
