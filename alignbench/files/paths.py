"""The rule for paths, which is the same for all keys and commands.

`~` is the home folder. A relative path on a command line is relative to the current folder; in a file it is relative to the
folder of that file, so that a configuration, a task or a comparison means the same everywhere. A run writes absolute paths.

If a value can be a name or a path (a backbone, weights of the Hugging Face hub), it is a path if it begins with `./`, `../`,
`/` or `~/`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignbench.errors import UserError

RELATIVE = ("./", "../")


def local_path(name: str | os.PathLike[str], folder: Path | None = None) -> Path:
    """Expands `~` in a path, and makes a relative path absolute if a folder is given.

    Args:
        name: the path.
        folder: folder to which a relative path refers; None leaves it relative to the current folder.
    """
    path = Path(os.path.expanduser(name))
    if folder is None or path.is_absolute():
        return path
    return folder / path


def current_folder() -> Path:
    """The current folder; raises UserError if it has been removed."""
    try:
        return Path.cwd()
    except OSError:
        raise UserError("the current folder has been removed; change to another one") from None


def absolute(folder: Path) -> Path:
    """The folder as an absolute path; links are not resolved."""
    return folder if folder.is_absolute() else current_folder() / folder


def placed(data: Any, folder: Path | None) -> Any:
    """Makes every text in the data absolute that begins like a path.

    Args:
        data: nested data.
        folder: folder to which relative paths refer; None leaves them relative to the current folder.
    """
    if isinstance(data, Mapping):
        return {key: placed(value, folder) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [placed(value, folder) for value in data]
    if isinstance(data, str) and (data.startswith("~/") or (folder is not None and data.startswith(RELATIVE))):
        return str(local_path(data, None if folder is None else absolute(folder)))
    return data
