"""The base of every record: strict fields, text that JSON can hold, and one way to read and write a record's file."""

import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from alignbench.errors import UserError
from alignbench.files.reading import read_record
from alignbench.files.writing import write_atomically
from alignbench.settings import first_problem

SCHEMA_VERSION = 1
_SURROGATE, _UNPAIRED = re.compile("[\ud800-\udfff]"), re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Surrogates: those that stand for a byte that is not text (U+DC80 to U+DCFF), and those that stand for nothing."""


def _finite(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, by None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
"""A finite float; NaN and infinity are stored as null and read as None."""


def as_text(value: Any) -> Any:
    """Makes every string in the value valid Unicode. Bytes of file names that were not text are decoded as UTF-8."""
    if isinstance(value, str):
        return value if value.isascii() or not _SURROGATE.search(value) else _decoded(value)
    if isinstance(value, dict):
        return {as_text(key): as_text(item) for key, item in value.items()}
    return [as_text(item) for item in value] if isinstance(value, list | tuple) else value


def _decoded(text: str) -> str:
    return text.encode("utf-8", "surrogateescape" if not _UNPAIRED.search(text) else "replace").decode("utf-8", "replace")


class Record(BaseModel):
    """A part of a record. An unknown key is an error: it would be a number that a reader silently ignores."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, data: Any) -> Any:
        return as_text(data)


class Document(Record):
    """A record with a file of its own. Files of another schema version are refused."""

    KIND: ClassVar[str] = "record"
    """What messages call it: `file is not a KIND`."""

    schema_version: int = SCHEMA_VERSION

    @classmethod
    def read(cls, file: Path) -> Self:
        """Reads the record in a JSON file.

        Raises:
            UserError: the file cannot be read, has another schema version, or is not such a record.
        """
        data = read_record(file)
        if data.get("schema_version") != SCHEMA_VERSION:
            raise UserError(f"{file} has schema version {data.get('schema_version')!r}; this alignbench reads {SCHEMA_VERSION}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(f"{file} is not a {cls.KIND}: {first_problem(error, 'the record')}") from None

    def write(self, file: Path) -> None:
        """Writes the record into a JSON file, which is replaced atomically.

        Raises:
            DiskError: it cannot be written.
        """
        text = self.model_dump_json(indent=2) + "\n"
        write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))
