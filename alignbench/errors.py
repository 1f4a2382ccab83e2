"""The exceptions that end a command, and the hint that goes with a misspelt name."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

_USERINFO = re.compile(r"(?<=://)[^\s'\"@]*@")
_QUERY = re.compile(r"([?&][\w.-]*(?:token|key|secret|password|passwd|signature|credential)[\w.-]*=)[^\s'\"&#]+", re.IGNORECASE)


class _Sentence(Exception):  # noqa: N818
    """An exception whose message is one printable line, without the passwords and tokens of URLs.

    Control characters in it, for instance in the name of a file, are escaped, so that they cannot end the line or move a
    terminal's cursor.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in redacted(sentence)))


class UserError(_Sentence):
    """The user's input is wrong. The message is one sentence: what is wrong, where, and what to do. Exit code 2."""


class RunError(_Sentence):
    """The run itself failed, for instance because of a scorer, a non-finite value or a full disk. Exit code 1."""


class ScorerError(RunError):
    """A scorer failed or cannot be reached. No weight has changed since the last iteration, so the run can be resumed."""


class DiskError(RunError):
    """A file cannot be written, because the disk is full or the folder is read-only. An earlier version of it is kept."""


class NonFiniteError(RunError):
    """A tensor contains NaN or infinity, with which the run cannot continue."""


def first_line(error: BaseException) -> str:
    """Returns the first line of another package's exception, whose message may be long; its class name if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Makes the end of a message about an unknown name.

    Args:
        word: the unknown name.
        known: the valid names.

    Returns:
        `; did you mean 'x'?` with up to three similar names, or else `; known: ...` with all of them.
    """
    names = sorted(set(known))
    near = get_close_matches(word, names, n=3, cutoff=0.5)
    if near:
        return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "; known: " + ", ".join(names) if names else ""


def redacted(text: str) -> str:
    """Replaces user names, passwords and tokens in URLs by `***`."""
    return _QUERY.sub(r"\1***", _USERINFO.sub("***@", text)) if "://" in text else text


def holds_secret(text: str) -> bool:
    """Tells whether the text contains a URL with a user name, a password or a token."""
    return "://" in text and bool(re.search(r"://[^\s/?#@]*@", text) or _QUERY.search(text))
