"""Writes files atomically, without following links, and without overwriting files of others.

A writer never opens its target. It writes into a new folder beside the target, whose name is unpredictable and in which nobody
else writes, and a rename moves the result into place. Two writers of one file therefore never mix their output, and a link at
the target is replaced instead of followed.
"""

import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from alignbench.errors import DiskError, UserError

LOCK, REPORT_LOCK = ".lock", ".report.lock"
MARK = ".alignbench"
"""Name of the file that marks a folder whose content alignbench rewrites each time, such as `tables/` of a report."""
PARTIAL = ".partial"
_LEFTOVER = re.compile(r"\..+\.partial(\.\w+)?")
_LITTER = re.compile(
    r"\.DS_Store|\._.*|\.nfs[0-9a-fA-F]+|\.directory|\.Spotlight-V100|\.Trashes|\.fseventsd|__MACOSX"
    r"|Thumbs\.db|ehthumbs\.db|desktop\.ini|@eaDir|lost\+found|\.fuse_hidden[0-9a-fA-F]+",
    re.IGNORECASE,
)
PATIENCE = 60
"""Seconds to wait for another report of the same folder, which takes a few seconds."""


def is_litter(name: str) -> bool:
    """Whether this is a name of files that desktops, NFS or archives leave in any folder."""
    return _LITTER.fullmatch(name) is not None


def is_file_name(name: str) -> bool:
    """Whether a folder or file can have this name and then lies directly in its parent folder."""
    return name not in ("", ".", "..") and "/" not in name and name.isprintable() and len(os.fsencode(name)) <= 200


# ---------------------------------------------------------------------------------------------------- writing


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path of the same name, then moves the complete file to `path`.

    A file at `path` is replaced. If two processes write, the later one wins, and the file is complete in any case.

    Raises:
        DiskError: the disk is full, or the folder cannot be written; a former file at `path` is still there.
    """
    with _disk_errors(path), _scratch(path) as partial:
        write(partial)
        _flush(partial)
        os.replace(partial, path)


def write_new(path: Path, write: Callable[[Path], Any]) -> None:
    """Like `write_atomically`, but does not replace a file, even one that appears while `write` runs.

    Raises:
        UserError: a file exists at `path`.
        DiskError: the file cannot be written.
    """
    if os.path.lexists(path):
        raise UserError(f"{path} exists already; choose another --out")
    with _disk_errors(path), _scratch(path) as partial:
        write(partial)
        _flush(partial)
        try:
            os.link(partial, path)  # a rename would replace a file that has appeared meanwhile
        except FileExistsError:
            raise UserError(f"{path} exists already; choose another --out") from None
        except OSError:  # a file system without hard links
            if os.path.lexists(path):
                raise UserError(f"{path} exists already; choose another --out") from None
            partial.rename(path)


def write_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a new folder, then moves the complete folder to `path`. A folder at `path` is replaced.

    After the return the folder survives a power cut, so that the one that it supersedes can be removed.

    Raises:
        DiskError: the disk is full, or the parent folder cannot be written.
    """
    with _disk_errors(path), _scratch(path) as partial:
        partial.mkdir()
        write(partial)
        _flush_tree(partial)
        if os.path.lexists(path):
            path.rename(partial.with_name("former"))
        partial.rename(path)
        _flush(path.parent)


def fill(out: Path, write: Callable[[Path], Any], last: str) -> None:
    """Calls `write` with a new folder in `out`, then moves its content into `out`.

    Args:
        out: a folder that must still be free (`refuse_taken`) when everything has been written.
        write: writes the content into the folder that it is given.
        last: the entry that is moved last; it tells readers that the folder is complete.

    Raises:
        UserError: something has appeared in `out` meanwhile; it is left unchanged.
        DiskError: the disk is full, or the folder cannot be written; nothing is left behind.
    """
    with _disk_errors(out), _scratch(out / "content") as partial:
        partial.mkdir()
        write(partial)
        _flush_tree(partial)
        refuse_taken(out)
        moved: list[Path] = []
        try:
            for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == last):
                entry.rename(out / entry.name)
                moved.append(out / entry.name)
        except OSError:
            for entry in moved:
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
            raise


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """Yields a path of the same name in a new folder beside `path`; the folder is removed in the end.

    The folder is locked while it is in use. A folder that a killed process left behind is not locked, and the next writer
    removes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name[:100]}."
    for entry in list(os.scandir(path.parent)):
        if entry.name.startswith(prefix) and entry.name.endswith(PARTIAL) and entry.is_dir(follow_symlinks=False):
            _sweep(Path(entry.path))
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=PARTIAL, dir=path.parent))
        held = _hold(folder)
        if held is not None:
            break
    try:
        yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _hold(folder: Path) -> int | None:
    """Locks a scratch folder; None if another writer has removed it meanwhile, because it was not locked yet."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        return descriptor  # a file system without locks, on which nothing is swept
    if not folder.exists():
        os.close(descriptor)
        return None
    return descriptor


def _sweep(folder: Path) -> None:
    """Removes a scratch folder that no running process has locked."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _flush(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk, so that a renamed file is complete after a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(folder: Path) -> None:
    for entry in [*folder.rglob("*"), folder]:
        if not entry.is_symlink():
            _flush(entry)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise disk_error(path, error) from error


def disk_error(path: Path, error: Exception) -> DiskError:
    """Makes the error for a path that cannot be written, with the operating system's reason."""
    return DiskError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}")


# ---------------------------------------------------------------------------------------------------- whose it is


def is_free(out: Path) -> bool:
    """Whether `out` does not exist, or is a folder with nothing but locks, litter and leftovers of killed processes.

    Raises:
        OSError: the folder cannot be listed.
    """
    if not out.exists():
        return not out.is_symlink()
    return out.is_dir() and all(
        entry.name in (LOCK, REPORT_LOCK) or _LEFTOVER.fullmatch(entry.name) or is_litter(entry.name) for entry in out.iterdir()
    )


def refuse_taken(out: Path, instead: str = "choose another --out") -> None:
    """Raises UserError if `out` is not free (`is_free`), or if its name cannot be stored in a record."""
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise UserError(f"the name {str(out)!r} is not valid UTF-8; {instead}") from None
    try:
        free = is_free(out)
    except OSError as error:
        raise UserError(f"cannot list {out}: {error.strerror or error}; {instead}") from None
    if not free:
        raise UserError(f"{out} exists already; {instead}")


def refuse_links(folder: Path, *names: str) -> None:
    """Raises UserError if one of these folders below `folder` is a link or not a folder, so that files would go elsewhere."""
    for below in (folder / name for name in names):
        if below.is_symlink():
            raise UserError(f"{below} is a link, and alignbench writes through no link in a results folder; replace it")
        if below.exists() and not below.is_dir():
            raise UserError(f"{below} is not a folder; move it away")


def refuse_foreign(file: Path, *marks: bytes) -> None:
    """Raises UserError if `file` exists and has none of the marks by which files of alignbench are recognised."""
    try:
        status = file.lstat()
    except OSError:
        return
    written = file.read_bytes() if stat.S_ISREG(status.st_mode) else b""
    if not any(mark in written for mark in marks):
        raise UserError(f"{file} was not written by alignbench, and would be overwritten; move it away")


def own_folders(root: Path, *names: str, known: bool = False) -> None:
    """Creates folders below `root` whose files alignbench rewrites each time.

    Args:
        root: the parent folder.
        names: names of the folders.
        known: whether their content is known to be alignbench's although they have no `MARK`.

    Raises:
        UserError: a folder is a link, or holds files that alignbench did not write; no folder has been created.
        DiskError: a folder cannot be created.
    """
    refuse_links(root, *names)
    marks = [root / name / MARK for name in names]
    unmarked = [mark for mark in marks if mark.is_symlink() or not mark.is_file()]
    for folder in (mark.parent for mark in unmarked):
        if not (known or is_free(folder)):
            raise UserError(f"{folder} holds files that alignbench did not write, and could overwrite them; move them away")
    for mark in unmarked:
        with _disk_errors(mark.parent):
            mark.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError), mark.open("x", encoding="utf-8") as file:
                file.write("alignbench rewrites the files of this folder; keep your own files elsewhere.\n")


# ---------------------------------------------------------------------------------------------------- one at a time


@contextmanager
def exclusive(folder: Path, lock: str = LOCK, patience: float = 0.0) -> Iterator[None]:
    """Locks the folder, which is created if it is missing, for this process. The lock ends with the process.

    If the file system has no locks (some network mounts), the block runs without one.

    Args:
        folder: the folder.
        lock: name of the lock file.
        patience: seconds to wait for another process.

    Raises:
        UserError: another process has the lock.
        DiskError: the folder cannot be created or written.
    """
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        if not _locked(descriptor, patience):
            raise UserError(f"another process is using {folder}; wait for it, or choose another --out")
        yield
    finally:
        os.close(descriptor)


def is_in_use(folder: Path, lock: str = LOCK) -> bool:
    """Whether another process holds the lock of the folder; False where there is none."""
    try:
        descriptor = os.open(folder / lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    else:
        return False
    finally:
        os.close(descriptor)


def _locked(descriptor: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        except OSError:
            return True


@contextmanager
def claimed(out: Path | None, instead: str = "choose another --out") -> Iterator[None]:
    """Reserves the folder `out` for this process, which fills it once. None reserves nothing.

    A folder that was created for this and is still empty in the end is removed.

    Args:
        out: the folder.
        instead: what the user can do if the folder is taken, for the message.

    Raises:
        UserError: the folder is not free, or another process has reserved it.
        DiskError: the folder cannot be created or written.
    """
    if out is None:
        yield
        return
    refuse_taken(out, instead)
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        with exclusive(out):
            refuse_taken(out, instead)
            try:
                yield
            finally:
                (out / LOCK).unlink(missing_ok=True)
    finally:
        remove_empty(*missing)


def remove_empty(*folders: Path) -> None:
    """Removes these folders, in this order, up to the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def reserved(folder: Path) -> Iterator[Path]:
    """Creates a new folder with this name, or with `-2`, `-3` ... appended; removes it in the end if it is empty.

    Raises:
        DiskError: the folder cannot be created.
    """
    missing = [parent for parent in folder.parents if not parent.exists()]
    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        number, made = 1, folder
        while True:
            try:
                made.mkdir()
                break
            except FileExistsError:
                number += 1
                made = folder.with_name(f"{folder.name}-{number}")
    try:
        yield made
    finally:
        remove_empty(made, *missing)
