"""Names as text, whatever they hold: one function for each format in which reports show them.

HTML is escaped by the templates' autoescape; what is left to do there is `visible`.
"""

import re
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

LONGEST_NAME = 60
"""Letters of a file's name, each of at most four bytes."""

_JOINERS = "\u200c\u200d"  # Persian and Indic scripts are misspelt without them, and emoji fall apart
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_FORMULA = tuple("=+-@\t\r＝＋－＠")
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}"}
_LATEX |= {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
_LATEX |= {c: f"\\{c}" for c in "&%$#_{}"}


def visible(text: str) -> str:
    """Letters that control a terminal, end a line, turn the direction of writing or are no Unicode as escapes, `\\x1b`."""
    return text if text.isascii() and text.isprintable() else "".join(map(_shown, text))


def _shown(letter: str) -> str:
    hidden = unicodedata.category(letter) in _HIDDEN and letter not in _JOINERS
    return repr(letter)[1:-1] if hidden or ord(letter) & 0xFFFE == 0xFFFE else letter


def markdown(text: str) -> str:
    """One line of Markdown text, which can open no tag, link, heading, list or column of a table."""
    one_line = visible(" ".join(text.split()))
    escaped = re.sub(r"[\\`*\[\]<>|#~$&@]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line)
    escaped = re.sub(r":(?=//)|(?<=\bwww)\.", r"\\\g<0>", escaped, flags=re.IGNORECASE)  # else GitHub makes links of them
    escaped = re.sub(r"^([-+])(?=\s)", r"\\\1", escaped)
    return re.sub(r"^(\d{1,9})([.)])(?=\s|$)", r"\1\\\2", escaped)


def markdown_code(text: str) -> str:
    """A name as code in a line of Markdown; not for cells of tables, where a `|` would end it."""
    one_line = visible(" ".join(text.split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", one_line)), default=0))
    return f"{fence}{one_line}{fence}" if len(fence) == 1 else f"{fence} {one_line} {fence}"


def latex(text: str) -> str:
    """LaTeX text for a cell of a table."""
    escaped = "".join(_LATEX.get(c, c) for c in visible(text))
    escaped = re.sub(r"(?<![\w.-])-(?=\d|inf)", "$-$", escaped)  # a hyphen is no minus
    return f"{{{escaped[0]}}}{escaped[1:]}" if escaped[:1] in ("[", "*") else escaped  # after `\\` these would be its options


def csv_text(text: str) -> str:
    """A cell that a spreadsheet takes for no formula: an apostrophe comes before one. A number stays a number."""
    return text if not text.startswith(_FORMULA) or _is_number(text) else f"'{text}"


def csv_frame(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The table with `csv_text` for every text in it, its heads included."""
    safe = frame.rename(columns=lambda name: csv_text(visible(str(name))))
    for at in range(len(safe.columns)):
        column = safe.iloc[:, at]
        if column.dtype.kind not in "biufM":
            safe.isetitem(at, [csv_text(visible(cell)) if isinstance(cell, str) else cell for cell in column])
    return safe


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text, flags=re.ASCII) is not None


def slug(text: str) -> str:
    """A file name of letters, digits and `_`, `.`; texts that differ in other signs share one, see `slugs`."""
    return re.sub(r"[^\w.]+", "_", text).strip("_.")[:LONGEST_NAME].strip("_.")


def slugs(texts: Iterable[str]) -> dict[str, str]:
    """A file name for each text, no two alike in any case of letters: later ones get a number."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for text in texts:
        if text not in found:
            name, number = slug(text) or "_", 1
            while (unique := name if number == 1 else f"{name}_{number}").casefold() in taken:
                number += 1
            found[text] = unique
            taken.add(unique.casefold())
    return found
