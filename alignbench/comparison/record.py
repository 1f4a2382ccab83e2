"""The record of a comparison, `comparison.json`: its grid, and how each cell ended."""

from pathlib import Path
from typing import ClassVar, Literal

from alignbench.comparison.grid import Cell, Grid
from alignbench.records.base import Document, Record

RECORD, RUNS = "comparison.json", "runs"
"""The record in a comparison's folder, and the folder of its cells."""
Status = Literal["complete", "failed", "pending"]


class CellRecord(Record):
    """The state of a cell."""

    id: str
    part: str = ""
    """The name of its part; empty in a comparison without parts."""
    objective: str
    sampler: str
    task: str
    seed: int
    status: Status
    error: str | None = None
    """The sentence that says why it failed."""

    @classmethod
    def of(cls, cell: Cell, status: Status) -> "CellRecord":
        axes = {key: getattr(cell, key) for key in ("id", "part", "objective", "sampler", "task", "seed")}
        return cls(**axes, status=status)


class ComparisonRecord(Document):
    """`comparison.json`."""

    KIND: ClassVar[str] = "record of a comparison"

    command: str
    """The command that makes the comparison again."""
    grid: Grid
    cells: list[CellRecord]


def read_comparison(folder: Path) -> ComparisonRecord:
    """The record in a comparison's folder.

    Raises:
        UserError: it cannot be read, or is not such a record.
    """
    return ComparisonRecord.read(folder / RECORD)
