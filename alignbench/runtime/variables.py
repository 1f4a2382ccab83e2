"""Environment variables that alignbench reads. A misspelt name or a wrong value is an error and not ignored."""

import os

from alignbench.errors import UserError, did_you_mean

PREFIX = "ALIGNBENCH_"
VARIABLES = {"ALIGNBENCH_SCORER_TOKEN": "token of a scorer service (see the eval `remote`)"}
"""All variables with the prefix, with their meanings."""


def check() -> None:
    """Raises UserError for a variable that has the prefix but is unknown."""
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name not in VARIABLES:
            raise UserError(f"unknown environment variable {name}{did_you_mean(name, VARIABLES)}")


def whole_number(name: str, default: int, least: int = 0) -> int:
    """The value of a variable that a launcher sets, or the default if it is missing or empty.

    Raises:
        UserError: the value is not a whole number, or it is below `least`.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise UserError(
            f"the environment has {name}={text!r}, which must be a whole number of at least {least}; unset it if there is no "
            "launcher"
        )
    return int(text)
