"""Escapes names for the formats of reports: one function for each format.

The templates' autoescape takes care of HTML, after `visible`.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from alignbench.errors import visible as visible

if TYPE_CHECKING:
    import pandas as pd

LONGEST_NAME = 60
"""Largest number of letters in a file's name; each has at most four bytes."""

_FORMULA = tuple("=+-@\t\r＝＋－＠")
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}"}
_LATEX |= {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
_LATEX |= {c: f"\\{c}" for c in "&%$#_{}"}


def markdown(text: str) -> str:
    """Makes one line of Markdown that cannot open a tag, link, heading, list or table column."""
    one_line = visible(" ".join(text.split()))
    escaped = re.sub(r"[\\`*\[\]<>|#~$&@]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line)
    escaped = re.sub(r":(?=//)|(?<=\bwww)\.", r"\\\g<0>", escaped, flags=re.IGNORECASE)  # else GitHub makes links of them
    escaped = re.sub(r"^([-+])(?=\s)", r"\\\1", escaped)
    return re.sub(r"^(\d{1,9})([.)])(?=\s|$)", r"\1\\\2", escaped)


def latex(text: str) -> str:
    """Escapes a text for a cell of a LaTeX table."""
    escaped = "".join(_LATEX.get(c, c) for c in visible(text))
    escaped = re.sub(r"(?<![\w.-])-(?=\d|inf)", "$-$", escaped)  # a hyphen is not a minus sign
    return f"{{{escaped[0]}}}{escaped[1:]}" if escaped[:1] in ("[", "*") else escaped  # after `\\` these would be its options


def csv_text(text: str) -> str:
    """Puts an apostrophe before a text that a spreadsheet would take for a formula. A number stays a number."""
    return text if not text.startswith(_FORMULA) or _is_number(text) else f"'{text}"


def csv_frame(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Applies `csv_text` to every text and every heading of a table."""
    safe = frame.rename(columns=lambda name: csv_text(visible(str(name))))
    for at in range(len(safe.columns)):
        column = safe.iloc[:, at]
        if column.dtype.kind not in "biufM":
            safe.isetitem(at, [csv_text(visible(cell)) if isinstance(cell, str) else cell for cell in column])
    return safe


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text, flags=re.ASCII) is not None


def slug(text: str) -> str:
    """Makes a file name of letters, digits, `_` and `.`. Texts that differ only in other characters share one; see `slugs`."""
    return re.sub(r"[^\w.]+", "_", text).strip("_.")[:LONGEST_NAME].strip("_.")


def slugs(texts: Iterable[str]) -> dict[str, str]:
    """Makes a file name for each text. No two are equal when case is ignored: later ones get a number."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for text in texts:
        if text not in names:
            name, number = slug(text) or "_", 1
            while (unique := name if number == 1 else f"{name}_{number}").casefold() in taken:
                number += 1
            names[text] = unique
            taken.add(unique.casefold())
    return names
