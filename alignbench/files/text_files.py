"""Text, JSON and tables from files that others wrote: read as what they hold, or refused in a sentence with file and line.

The content decides where it is plain (Parquet's magic bytes, JSON's brackets), then the suffix in any case; a pipe has no
suffix. What a small file can unfold to is limited before it unfolds.
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
    import pyarrow.parquet as pq

T = TypeVar("T")

MAX_BYTES = 2**28
"""Of a text file, and of a Parquet column when it is decompressed."""
MAX_ROWS = 5_000_000
MAX_CHARACTERS = 100_000
"""Of a single text in a table."""

CSV, JSON, PARQUET = (".csv", ".tsv", ".tab"), (".json", ".jsonl", ".ndjson"), (".parquet", ".pq")
MAGIC = b"PAR1"
DELIMITERS = {".csv": ",;\t", ".tsv": "\t,;", ".tab": "\t,;"}
"""Those that a table may have; the first whose head has a heading that is looked for."""
FOREIGN = (
    *(".yaml", ".yml", ".toml", ".ini", ".xml", ".html", ".htm", ".md", ".rtf", ".py", ".ipynb", ".tex"),
    *(".xls", ".xlsx", ".ods", ".doc", ".docx", ".odt", ".pdf", ".zip", ".gz", ".bz2", ".xz", ".zst", ".tar", ".7z"),
    *(".arrow", ".feather", ".orc", ".avro", ".npy", ".npz", ".h5", ".sqlite", ".db", ".pkl", ".pt"),
)
"""Suffixes of formats that are not read."""
_MARKS = {
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe\0\0": "utf-32-le",
    b"\0\0\xfe\xff": "utf-32-be",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}
"""Byte-order marks; that of UTF-32 before that of UTF-16, which it begins with."""
_JSON_START = re.compile(r'\s*(\{\s*"|\[\s*["{]|\[\s*$)', re.MULTILINE)
"""How JSON begins and prompts do not."""


@dataclass(frozen=True)
class Table:
    """Columns by heading; each row knows where in its file it stands.

    Attributes:
        unit: what `numbers` count: lines, rows or entries.
        numbers: of each row.
    """

    file: Path
    headings: list[str]
    unit: str
    numbers: Sequence[int]
    _column: Callable[[int], Sequence[Any]]

    def __len__(self) -> int:
        return len(self.numbers)

    def find(self, *names: str) -> str | None:
        """The heading that is the first name, else the one that is any of them, but for case, blanks, `_`, `-` and dots.

        Raises:
            UserError: several are.
        """
        found = [h for h in self.headings if _plain(h) == _plain(names[0])]
        found = found or [h for h in self.headings if _plain(h) in map(_plain, names)]
        if len(found) > 1:
            both = " and ".join(map(excerpt, found[:2]))
            raise UserError(f"{self.file} has the columns {both}; call the one that is meant {names[0]!r}, and no other")
        return found[0] if found else None

    def require(self, *names: str) -> str:
        """Like `find`.

        Raises:
            UserError: also where there is none.
        """
        heading = self.find(*names)
        if heading is None:
            near = [h[:40] for h in self.headings if h.strip()][:20]
            raise UserError(f"{self.file} has no column {names[0]!r}{did_you_mean(names[0], near)}")
        return heading

    def values(self, heading: str) -> Sequence[Any]:
        """A column as it is.

        Raises:
            UserError: it cannot be read, or holds what is neither text nor number (in Parquet, which has types).
        """
        return self._column(self.headings.index(heading))

    def texts(self, heading: str) -> list[str]:
        """A column of texts, without blanks around them.

        Raises:
            UserError: one is empty, too long, no valid Unicode, or no text.
        """
        known: dict[str, str] = {}  # a small Parquet file can repeat a long text millions of times
        found = []
        for row, value in enumerate(self.values(heading)):
            if not isinstance(value, str) or value not in known:
                text = self._text(heading, row, value)
                known[value] = text
            found.append(known[value])
        return found

    def place(self, row: int) -> str:
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
            problem = f"is no valid Unicode: {excerpt(value)}"
        raise UserError(f"{self.place(row)}: {excerpt(heading)} {problem}")


def stripped(text: str) -> str:
    """Without blanks at its ends, among which is a byte-order mark that joining files has left inside."""
    return text.strip().strip("\ufeff").strip()


def read_text(file: Path, what: str, *, pipe: bool = False) -> str:
    """A file's text in UTF-8, or as its byte-order mark says.

    Args:
        file: to read.
        what: it holds, in errors: `prompts`.
        pipe: also read what is no regular file, such as /dev/stdin, and wait for it.

    Raises:
        UserError: it cannot be read, is too large, or holds no text.
    """
    return _decoded(_read(file, what, pipe, parquet=False) or b"", file, what)


def read_objects(file: Path, what: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, or of a JSON list, each with the place where it stands.

    Raises:
        UserError: the file cannot be read or holds none, or a line holds something else.
    """
    unit, entries = _entries(read_text(file, what), file, what, texts=False)
    if not entries:
        raise UserError(f"{file} holds no {what}")
    return [(f"{file}, {unit} {number}", entry) for number, entry in entries]


def read_table(file: Path, what: str, *headings: str, lines: bool = False, pipe: bool = False) -> Table:
    """The table that a file holds: CSV (with commas, semicolons or tabs), JSON lines, a JSON list, or Parquet.

    Args:
        file: to read.
        what: it holds, in errors: `prompts`.
        headings: of the column that it must have; any of them tells a head and its delimiter.
        lines: other text is taken too, as a column of the first heading with a row per line that is not blank, and so is a
            JSON list of texts.
        pipe: also read what is no regular file, such as /dev/stdin, and wait for it.

    Raises:
        UserError: the file cannot be read, holds no row, has too many, or is damaged.
    """
    suffix = file.suffix.lower()
    if suffix in FOREIGN:
        raise UserError(
            f"cannot read the {what} in {file}: {suffix} is none of the formats txt, csv, tsv, json, jsonl, parquet"
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
    """All bytes of a file; None for a regular Parquet file, which is read in parts."""
    try:
        regular = stat.S_ISREG(file.stat().st_mode)
        if not regular and not pipe and not file.is_dir():
            raise _cannot(what, file, "it is no regular file")
        with file.open("rb") as opened:
            data = opened.read(4)
            if regular and parquet and (data == MAGIC or file.suffix.lower() in PARQUET):
                return None
            data += opened.read(MAX_BYTES)
    except OSError as error:
        raise _cannot(what, file, error.strerror) from None
    except ValueError as error:  # a name that no file has
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
        raise _cannot(what, file, f"line {line} is no {encoding.upper()} ({error.reason}); save it as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise _cannot(what, file, f"line {line} holds a NUL; it is no text, or UTF-16 without a byte-order mark")
    return text


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers.

    They end with a line feed, a carriage return or both, and at no other separator: those can stand inside a text.
    """
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line := stripped(line):
            yield number, line


def _limited(rows: Iterator[T], file: Path, what: str) -> list[T]:
    found = list(islice(rows, MAX_ROWS + 2))  # one of them may be a head
    if len(found) == MAX_ROWS + 2:
        raise _cannot(what, file, f"it has more rows than the {MAX_ROWS:,} that are read")
    return found


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
    """`line` or `entry`, and the objects with their numbers; or texts, from a list of nothing but texts."""
    first = next((line for _, line in _lines(text)), "")
    if first.startswith("[") or (first.startswith("{") and not _is_json(first) and _is_json(text)):
        whole = _parsed(text, file, what)
        if isinstance(whole, dict):
            whole = [whole]
        for number, entry in enumerate(whole, start=1):
            if not isinstance(entry, type(whole[0])) or not isinstance(entry, dict | str if texts else dict):
                wanted = "objects alone, or texts alone" if texts else "objects"
                raise _cannot(what, file, f"entry {number} is {excerpt(entry)}; the list must hold {wanted}")
        return "entry", list(enumerate(whole, start=1))
    found = []
    for number, line in _limited(_lines(text), file, what):
        try:
            entry = parse_json(line)
        except ValueError as error:
            why = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else error
            raise _cannot(what, file, f"line {number} is damaged, {why}") from None
        if not isinstance(entry, dict):
            raise _cannot(what, file, f"line {number} must be an object in braces, got {excerpt(entry)}")
        found.append((number, entry))
    return "line", found


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
    """The first row that is not empty, by each delimiter."""
    found = {}
    for delimiter in delimiters:
        try:
            found[delimiter] = next((row for _, row in _csv_rows(text[:MAX_CHARACTERS], delimiter)), [])
        except csv.Error:
            continue
    return found


def _csv_table(text: str, file: Path, what: str, headings: Sequence[str]) -> Table:
    """All texts, as they are. pandas' own reader takes what is before a field too many for the name of the row."""
    delimiters = DELIMITERS.get(file.suffix.lower(), DELIMITERS[".csv"])
    offset = 0
    if match := re.match(r"sep=([,;\t|])(?:\r\n|\n|\r)", text):  # which Excel writes and heeds
        delimiters, text, offset = match[1], text[match.end() :], 1
    wanted = {_plain(heading) for heading in headings}
    heads = _heads(text, delimiters)
    delimiter = next((d for d, head in heads.items() if wanted & set(map(_plain, head))), delimiters[0])
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
            why = f"line {line + offset} has {len(row)} fields and the head {len(head)}; a text that holds the delimiter "
            raise _cannot(what, file, f"{why}{delimiter!r} needs quotes")
        table.append((line + offset, row))
    return Table(file, head, "line", [line for line, _ in table], lambda column: [row[column] for _, row in table])


def _with_blanks_before_quotes(text: str, delimiter: str) -> list[tuple[int, list[str]]] | None:
    """The rows where quotes may come after blanks, as in `a.png, "one, two"`; None where the text is not written so."""
    try:
        return list(_csv_rows(text, delimiter, skipinitialspace=True))
    except csv.Error:
        return None


def _csv_rows(text: str, delimiter: str, skipinitialspace: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not empty, with the lines on which they begin."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=skipinitialspace)
    begin = 1
    try:
        for row in reader:
            if row:
                yield begin, row
            begin = reader.line_num + 1
    except csv.Error as error:
        raise csv.Error(f"line {begin}: {error}; a text with quotes is quoted, and its quotes doubled") from None


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
        except Exception as error:  # pyarrow raises its own errors, and whatever damaged bytes lead it to
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
            raise UserError(f"{file}: the column {excerpt(heading)} holds {str(kind)[:60]}, no texts")
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == heading)
        if size > MAX_BYTES:
            raise _cannot(
                what, file, f"its column {excerpt(heading)} unfolds to {size // 2**20:,} MiB; limit {MAX_BYTES // 2**20}"
            )
        # A text that is repeated is kept once, as in the file.
        with opened([heading]) as parquet:
            read = parquet.read(columns=[heading]).column(0)
        if len(read) != rows:
            raise ValueError(f"the column {heading!r} has {len(read)} rows of {rows}")
        values: list[Any] = []
        for chunk in read.chunks:
            if pa.types.is_dictionary(chunk.type):
                known = chunk.dictionary.to_pylist()
                values += [None if i is None else known[i] for i in chunk.indices.to_pylist()]
            else:
                values += chunk.to_pylist()
        return values

    return Table(file, list(schema.names), "row", range(1, rows + 1), lambda index: guarded(lambda: column(index)))
