"""The two kinds of failure that end a command, the text of their messages, and the hint for a misspelt name."""

import re
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches

_USERINFO = re.compile(r"(?<=://)[^\s'\"@]*@")
_QUERY = re.compile(r"([?&][\w.-]*(?:token|key|secret|password|passwd|signature|credential)[\w.-]*=)[^\s'\"&#]+", re.IGNORECASE)


_JOINERS = "\u200c\u200d"  # Persian and Indic scripts are misspelt without them, and emoji fall apart
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


class _Sentence(Exception):  # noqa: N818
    """Says in one line what happened.

    Control characters in it, for instance in the name of a file, are escaped (`visible`), so that they can neither end the line
    nor move a terminal's cursor. Passwords and tokens in URLs are replaced (`redacted`).
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(visible(redacted(sentence)))


class UserError(_Sentence):
    """The user's input is wrong. One sentence says what is wrong, where, and what to do. Exit code 2."""


class UnknownKeyError(UserError):
    """Settings have a key that does not exist.

    Attributes:
        key: the unknown key, without the keys above it.
        without_hint: the message without the hint of similar keys.
    """

    def __init__(self, without_hint: str, key: str, hint: str) -> None:
        super().__init__(without_hint + hint)
        self.without_hint, self.key = without_hint, key


class RunError(_Sentence):
    """The run itself failed, for instance because of a scorer, a non-finite value or a full disk. Exit code 1."""


class ScorerError(RunError):
    """A scorer failed or cannot be reached. No weight has changed since the last iteration, so the run can be resumed."""


class DiskError(RunError):
    """A file cannot be written: the disk is full, or the folder is read-only. Existing files are unchanged."""


class NonFiniteError(RunError):
    """A tensor holds NaN or infinity, and the run cannot continue."""


def first_line(error: BaseException) -> str:
    """Returns the first line of another package's error message, which may be long; the class's name if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Makes the hint `; did you mean 'x'?` with up to three similar names, or else `; known: ...`, for the end of a message."""
    names = sorted(set(known))
    near = nearest(word, names)
    if near:
        return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "; known: " + ", ".join(names) if names else ""


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Up to three names that are similar to a word."""
    return get_close_matches(word, sorted(set(known)), n=3, cutoff=0.5)


def redacted(text: str) -> str:
    """Replaces user names, passwords and tokens in URLs by `***`."""
    return _QUERY.sub(r"\1***", _USERINFO.sub("***@", text)) if "://" in text else text


def holds_secret(text: str) -> bool:
    """Tells whether the text has a URL with a user name, a password or a token."""
    return "://" in text and bool(re.search(r"://[^\s/?#@]*@", text) or _QUERY.search(text))


def visible(text: str) -> str:
    """Replaces characters that are invisible or have an effect by escapes such as `\\x1b`.

    Such characters control a terminal, end a line, change the direction of writing, or are not valid Unicode.
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_escaped, text))


def _escaped(letter: str) -> str:
    hidden = unicodedata.category(letter) in _HIDDEN and letter not in _JOINERS
    return repr(letter)[1:-1] if hidden or ord(letter) & 0xFFFE == 0xFFFE else letter
