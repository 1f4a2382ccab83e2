"""The record of a comparison, `comparison.json`: its grid, and how each cell ended."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

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
    base_method: str = ""
    """Its objective and sampler without the values of sweeps; the points of a sweep share it. Empty in older records."""
    swept: dict[str, Any] = Field(default_factory=dict)
    """The key of each sweep that its method is a point of -> the value there; empty for a method without a sweep."""
    status: Status
    error: str | None = None
    """The sentence that says why it failed."""

    @classmethod
    def of(cls, cell: Cell, status: Status) -> "CellRecord":
        axes = {key: getattr(cell, key) for key in ("id", "part", "objective", "sampler", "task", "seed")}
        return cls(**axes, base_method=cell.method.base, swept=cell.method.swept, status=status)


class ComparisonRecord(Document):
    """`comparison.json`."""

    KIND: ClassVar[str] = "record of a comparison"

    command: str
    """The command that makes the comparison again."""
    grid: Grid
    cells: list[CellRecord]
    complete_before_contrasts: int = 0
    """How many cells were complete when the grid's contrasts were set: 0 for contrasts that were planned before any run."""


def read_comparison(folder: Path) -> ComparisonRecord:
    """The record in a comparison's folder.

    Raises:
        UserError: it cannot be read, or is not such a record.
    """
    return ComparisonRecord.read(folder / RECORD)
