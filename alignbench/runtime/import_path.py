"""Where Python looks for modules: not in the current folder, unless the user names a plug-in there.

Results folders are passed around. A file in one that has the name of a library's optional module would otherwise run as soon
as a command is started in that folder. This module imports nothing heavy, because it must run before everything else.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

HOME = Path(__file__).resolve().parents[2]
"""The folder that holds the package: a checkout, or `site-packages`."""
_OURS = "_ALIGNBENCH_SAFEPATH"


def leave_out_current_folder() -> None:
    """Removes the current folder from the import path, where `python -m` and empty parts of PYTHONPATH put it.

    It stays if it is the checkout of this alignbench, or if PYTHONPATH contains its absolute path.
    """
    named = {os.path.realpath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(part)}
    here = _here()
    if here is None:
        sys.path[:] = [entry for entry in sys.path if entry not in ("", ".")]
    elif here != str(HOME) and here not in named:
        sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != here]


def import_named(module: str) -> ModuleType:
    """Imports the module of a plug-in that a user named as `module:Class`; it may lie in the current folder.

    In that case the folder comes first on the import path during the import, as for a script in it. Afterwards it comes last,
    so that the plug-in can still import modules beside it.
    """
    here, top = _here(), module.partition(".")[0]
    if here is None or here in sys.path or not (Path(here, top).is_dir() or Path(here, f"{top}.py").is_file()):
        return importlib.import_module(module)
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(here)
        sys.path.append(here)


@contextmanager
def safe_children() -> Iterator[None]:
    """Makes Python processes that are started inside this context begin without the current folder on their import path.

    They should call `begin_child`, so that processes which they start in turn are not affected.
    """
    if "PYTHONSAFEPATH" in os.environ:
        yield
        return
    os.environ["PYTHONSAFEPATH"] = os.environ[_OURS] = "1"
    try:
        yield
    finally:
        begin_child()


def begin_child() -> None:
    """Removes the variables that `safe_children` has set."""
    if os.environ.pop(_OURS, None):
        os.environ.pop("PYTHONSAFEPATH", None)


def current_folder_exists() -> bool:
    """Tells whether the current folder still exists."""
    return _here() is not None


def _here() -> str | None:
    """The real path of the current folder; None if it has been removed."""
    try:
        return os.path.realpath(os.getcwd())
    except OSError:
        return None
