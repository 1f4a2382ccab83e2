"""Reads tokens from the environment or from a file; they are never settings, parts of a URL or command-line options.

What is read here does not appear in any configuration, record or message.
"""

import os
from pathlib import Path

from alignbench.errors import UserError
from alignbench.files.paths import local_path

SCORER_TOKEN = "ALIGNBENCH_SCORER_TOKEN"
MAX_LENGTH = 10_000
"""Largest length of a token."""


def scorer_authorization(file: str | Path | None = None) -> str | None:
    """The Authorization header for a scorer service; None if there is no token.

    A token is sent as `Bearer TOKEN`. A token that begins with its own scheme (`Basic dXNlcjpw...`) is sent unchanged.

    Args:
        file: file that contains the token; None for the variable ALIGNBENCH_SCORER_TOKEN.

    Raises:
        UserError: the file cannot be read or is empty, or a header cannot hold the token.
    """
    if file is None:
        source, token = f"the variable {SCORER_TOKEN}", os.environ.get(SCORER_TOKEN)
        if token is None:
            return None
    else:
        source, token = f"the token file {file}", _content(local_path(file))
    token = token.strip()
    if not token:
        raise UserError(f"{source} is empty; put the scorer's token there, or remove it")
    if len(token) > MAX_LENGTH or not (token.isascii() and token.isprintable()):
        raise UserError(f"{source} does not hold a token: a token is one line of at most {MAX_LENGTH} ASCII characters")
    return token if " " in token else f"Bearer {token}"


def _content(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_LENGTH + 100).decode()
    except UnicodeDecodeError:
        raise UserError(f"the token file {file} does not hold a token: it is not a text") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the token file {file}: {getattr(error, 'strerror', None) or error}") from None
