"""A table of a report whose cells are written in Python, with the numbers that its columns are sorted by."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from alignbench.reports.formatting import SIGNIFICANT, number, with_interval


class Cell(NamedTuple):
    """What a cell shows, and the number or text that it is sorted by."""

    text: str
    value: float | str


@dataclass(frozen=True)
class TextTable:
    """A table.

    Attributes:
        title: its heading.
        note: what its numbers are, in a sentence or two.
        head: headings of the columns.
        rows: the cells of each row.
        folded: whether a page folds it away.
    """

    title: str
    note: str
    head: list[str]
    rows: list[list[Cell]]
    folded: bool = False


def name(text: str) -> Cell:
    """A cell that names a row."""
    return Cell(text, text)


def count(value: float) -> Cell:
    """A cell with a number alone."""
    return Cell("never" if math.isinf(value) else number(value), value)


def bounded(row: Mapping[Any, Any], *, missing: str = "-", over: str = "") -> Cell:
    """`0.12 [0.08, 0.16] *`: an estimate with its interval, and a star where its corrected p value is below `SIGNIFICANT`.

    Args:
        row: with `value`, `lower`, `upper`.
        missing: what stands where there is no value.
        over: what is added behind.
    """
    value, lower, upper = (float(row[key]) for key in ("value", "lower", "upper"))
    if math.isnan(value):
        return Cell(missing, math.nan)
    star = " *" if row.get("p_holm", math.nan) < SIGNIFICANT else ""
    return Cell(f"{with_interval(value, lower, upper)}{star}{over}", value)
