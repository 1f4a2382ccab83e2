"""The two kinds of failure that end a command, and the hint that goes with a misspelt name."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

_USERINFO = re.compile(r"(?<=://)[^\s'\"@]*@")
_QUERY = re.compile(r"([?&][\w.-]*(?:token|key|secret|password|passwd|signature|credential)[\w.-]*=)[^\s'\"&#]+", re.IGNORECASE)


class _Sentence(Exception):  # noqa: N818
    """Says in one line what happened; whatever a name in it holds neither ends the line nor moves a terminal's cursor.

    Passwords and tokens in URLs are left out.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in redacted(sentence)))


class UserError(_Sentence):
    """The user's input is wrong: one sentence that says what, where and what to do. Exit code 2."""


class RunError(_Sentence):
    """The run itself failed: a scorer, a non-finite value, a full disk. Exit code 1."""


class ScorerError(RunError):
    """A scorer failed or cannot be reached. No weight has changed since the last iteration, so that the run can go on."""


class DiskError(RunError):
    """A file cannot be written: the disk is full, or the folder is read-only. What was there before is still there."""


class NonFiniteError(RunError):
    """A tensor holds NaN or infinity where a run cannot go on."""


def first_line(error: BaseException) -> str:
    """Of what an exception of another package says, which may be long; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with up to three near names, else `; known: ...`."""
    names = sorted(set(known))
    near = get_close_matches(word, names, n=3, cutoff=0.5)
    if near:
        return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "; known: " + ", ".join(names) if names else ""


def redacted(text: str) -> str:
    """The text with `***` for user names, passwords and tokens in URLs."""
    return _QUERY.sub(r"\1***", _USERINFO.sub("***@", text)) if "://" in text else text


def holds_secret(text: str) -> bool:
    """Whether the text has a URL with a user name, a password or a token in it."""
    return "://" in text and bool(re.search(r"://[^\s/?#@]*@", text) or _QUERY.search(text))
