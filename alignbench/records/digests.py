"""The digests of a finished run's files (`SHA256SUMS` in its folder), by which a later change of a file is seen.

They show accidents and careless edits. Whoever edits a file can write its new digest as well: only a replay shows that.
"""

from collections.abc import Iterator
from pathlib import Path

from alignbench.files.digests import SUMS, digest_of, read_sums, sums_text
from alignbench.files.writing import write_atomically
from alignbench.records.record import CONFIG, RESULT

FILES = (CONFIG, RESULT, "*.parquet")
"""The files of a run's record. Plots are not among them: they are drawn again at any time."""
REMOVABLE = ("samples/*", "checkpoints/iteration-*/SHA256SUMS")
"""Files that a published record may leave out. The sums of a checkpoint stand for all of its files."""


def write_digests(folder: Path) -> None:
    """Writes the digests of the files of a run that has ended.

    Raises:
        UserError: a file cannot be read.
        DiskError: the list cannot be written.
    """
    text = sums_text({name: digest_of(folder / name) for name in _present(folder, (*FILES, *REMOVABLE))})
    write_atomically(folder / SUMS, lambda p: p.write_text(text, encoding="utf-8"))


def changed_files(folder: Path) -> Iterator[str]:
    """A sentence for each file of a run that is not what it was when the run ended; none without a list of digests.

    Raises:
        UserError: the list or a file cannot be read.
    """
    if not (folder / SUMS).is_file():
        return
    listed = read_sums(folder / SUMS)
    present, removable = _present(folder, FILES), _present(folder, REMOVABLE)
    for name in sorted({*listed, *present}):
        if name not in listed:
            yield f"{folder / name} is not among the files that the run left ({SUMS})"
        elif name not in present and name not in removable:
            if not any(Path(name).match(pattern) for pattern in REMOVABLE):
                yield f"{folder / name} is missing, and the run left it ({SUMS})"
        elif digest_of(folder / name) != listed[name]:
            yield f"{folder / name} was changed after the run had ended: its SHA-256 digest is not the one in {SUMS}"


def has_digests(folder: Path) -> bool:
    """Whether a run left the digests of its files, as runs do since they exist."""
    return (folder / SUMS).is_file()


def remove_digests(folder: Path) -> None:
    """Removes the list, because the run goes on and its files will change."""
    (folder / SUMS).unlink(missing_ok=True)


def _present(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    """The files of these patterns below the folder, as names with `/`."""
    found = (file for pattern in patterns for file in folder.glob(pattern) if not file.name.startswith("."))
    return [file.relative_to(folder).as_posix() for file in found]
