"""What a verification found."""

from typing import ClassVar, Literal

from alignbench.records.base import Document, Record

State = Literal["consistent", "equal", "equal within tolerance", "not equal"]
"""`consistent`: its files agree, and it was not replayed. The others are about a replay."""


class CellFinding(Record):
    """What was found about a cell."""

    cell: str
    state: State
    detail: str = ""
    """The first difference; or in which versions or machine the replay differs from the run."""


class Verification(Document):
    """What `verify` found, as it prints with `--json`."""

    KIND: ClassVar[str] = "record of a verification"

    folder: str
    cells: list[CellFinding]
    problems: list[str]
    """A sentence for each record that is refused; nothing is replayed then."""
    notes: list[str]
    """What could not be checked, and what a reader should know."""

    @property
    def exit_code(self) -> int:
        """0: all that was checked is equal; 1: a replay is not; 2: records are refused."""
        if self.problems:
            return 2
        return int(any(cell.state == "not equal" for cell in self.cells))

    @property
    def replayed(self) -> list[CellFinding]:
        """The cells that were run again."""
        return [cell for cell in self.cells if cell.state != "consistent"]
