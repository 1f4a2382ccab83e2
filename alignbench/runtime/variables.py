"""Environment variables that alignbench itself reads: a misspelt name or a value of the wrong kind is told, not passed over."""

import os

from alignbench.errors import UserError, did_you_mean

PREFIX = "ALIGNBENCH_"
VARIABLES = {"ALIGNBENCH_SCORER_TOKEN": "token of a scorer service (see the eval `remote`)"}
"""All that begin with the prefix -> what they are."""


def check() -> None:
    """Raises UserError for a variable that begins as ours do and is none of them."""
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name not in VARIABLES:
            raise UserError(f"alignbench reads no environment variable {name}{did_you_mean(name, VARIABLES)}")


def whole_number(name: str, default: int, least: int = 0) -> int:
    """The value of a variable that a launcher sets; the default where it is missing or empty.

    Raises:
        UserError: it is no whole number, or below `least`.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise UserError(
            f"the environment has {name}={text!r}, which must be a whole number of at least {least}; unset it if no launcher "
            "is at work"
        )
    return int(text)
