"""Normal forms of text, so that two spellings of one text are equal, and the identity of a prompt."""

import re
import reprlib
import unicodedata
from collections.abc import Iterable

_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)
"""Invisible characters: Unicode's default-ignorable characters, control characters except white space, and blank letters."""
_PUNCTUATION = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u02b9\u2032", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        "\u2044": "/",
    }
)
"""Maps typographic quotation marks, dashes and the fraction slash to the characters of a keyboard."""


def plain_form(text: str) -> str:
    """The text in a normal spelling that keeps case and white space; printable ASCII is unchanged.

    Compatibility characters (full-width letters, ligatures, fractions) and composed letters are normalised by NFKC, quotation
    marks and dashes become ASCII, and invisible characters are removed.
    """
    if text.isascii() and text.isprintable():
        return text
    return unicodedata.normalize("NFKC", _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).translate(_PUNCTUATION))


def normal_form(text: str) -> str:
    """The text in a normal spelling and lower case; for printable ASCII this is `str.lower`.

    Two texts have the same normal form if they are a compatibility caseless match in Unicode's terms.
    """
    if text.isascii() and text.isprintable():
        return text.lower()
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFD", text).casefold()).casefold()
    return plain_form(decomposed)


def prompt_identity(prompt: str) -> str:
    """A text that is equal for prompts that differ only in case, white space and spelling of characters."""
    return " ".join(normal_form(prompt).split())


def distinct(prompts: Iterable[str]) -> list[str]:
    """The prompts without repetitions (`prompt_identity`), in their order."""
    first: dict[str, str] = {}
    for prompt in prompts:
        first.setdefault(prompt_identity(prompt), prompt)
    return list(first.values())


def excerpt(value: object, limit: int = 80) -> str:
    """The beginning of a value's `repr`, for a message; it is short however long or deep the value is."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxstring, brief.maxother = 2, limit - 20, limit - 20
    text = brief.repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
