"""Where Python looks for modules: never in the folder that one happens to stand in, unless a plug-in was asked for from there.

Results folders are passed around, and a file in one that is named like an optional module of a library would otherwise run
as soon as a command is started there. Imports nothing heavy, since it must come before everything else.
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
    """Takes the current folder off the import path, where `python -m` and empty parts of PYTHONPATH put it.

    It stays if it is the checkout that this alignbench is from, or if PYTHONPATH names it in full.
    """
    named = {os.path.realpath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(part)}
    here = _here()
    if here is None:
        sys.path[:] = [entry for entry in sys.path if entry not in ("", ".")]
    elif here != str(HOME) and here not in named:
        sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != here]


def import_named(module: str) -> ModuleType:
    """The module of a plug-in that a user named as `module:Class`, which may lie in the current folder.

    If it does, that folder comes first while it is imported, as for a script there; afterwards it comes last, so that the
    plug-in finds its neighbours when it needs them.
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
    """Python processes that are started while this is entered begin without the current folder on their import path.

    They should call `begin_child`, so that processes which they start in turn are what they would be anywhere.
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
    """Forgets what `safe_children` has put into the environment."""
    if os.environ.pop(_OURS, None):
        os.environ.pop("PYTHONSAFEPATH", None)


def current_folder_exists() -> bool:
    return _here() is not None


def _here() -> str | None:
    """The current folder; None if it has been removed."""
    try:
        return os.path.realpath(os.getcwd())
    except OSError:
        return None
