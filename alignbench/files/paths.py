"""One rule for paths, in every key and command alike.

`~` is the home folder. A relative path on a command line is relative to the current folder, and one in a file to that file's
folder, so that a configuration, a task or a comparison means the same from wherever it is used. What a run writes is absolute.

Where a path could be a name as well (a backbone, weights of the Hugging Face hub), what begins with `./`, `../`, `/` or `~/` is
a path.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignbench.errors import UserError

RELATIVE = ("./", "../")


def local_path(name: str | os.PathLike[str], folder: Path | None = None) -> Path:
    """The path that a name means.

    Args:
        folder: where a relative one starts; None leaves it relative, to the current folder.
    """
    path = Path(os.path.expanduser(name))
    if folder is None or path.is_absolute():
        return path
    return folder / path


def current_folder() -> Path:
    """The folder that a command runs in; raises UserError where it is gone."""
    try:
        return Path.cwd()
    except OSError:
        raise UserError("the current folder is gone; change to another one") from None


def absolute(folder: Path) -> Path:
    """The folder as an absolute path, links in it as they are."""
    return folder if folder.is_absolute() else current_folder() / folder


def placed(data: Any, folder: Path | None) -> Any:
    """Data with every text that begins as a path does made the absolute path of it.

    Args:
        folder: where relative ones start; None leaves them relative, to the current folder.
    """
    if isinstance(data, Mapping):
        return {key: placed(value, folder) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [placed(value, folder) for value in data]
    if isinstance(data, str) and (data.startswith("~/") or (folder is not None and data.startswith(RELATIVE))):
        return str(local_path(data, None if folder is None else absolute(folder)))
    return data
