"""Entries of a leaderboard: a folder with its records, the command that makes them, and what its authors say of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import field_validator

from alignbench.comparison.fronts import Fronts, read_fronts
from alignbench.comparison.reading import read_results
from alignbench.comparison.results import RecordedRun
from alignbench.errors import UserError
from alignbench.files.escaping import visible
from alignbench.files.yaml_files import read_yaml
from alignbench.settings import Settings, validate
from alignbench.verification.comparison_checks import CheckedFolder, check_folder, content

FILE = "entry.yaml"
"""The file of an entry's folder that says whose it is; an entry can do without."""


class About(Settings):
    """`entry.yaml`."""

    name: str | None = None
    """What tables call the entry; null for the name of its folder."""
    authors: str = ""
    """Who made it."""
    url: str | None = None
    """Where to read about it; http or https."""
    note: str = ""
    """A sentence or two about it."""

    @field_validator("url")
    @classmethod
    def _is_web_address(cls, url: str | None) -> str | None:
        if url is not None and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc):
            raise ValueError("a url begins with http:// or https://")
        return url


@dataclass
class Entry:
    """An entry whose records agree.

    Attributes:
        name: what tables call it, unlike any other entry.
        folder: its folder.
        about: what its authors say.
        commands: the commands that make its records again.
        runs: its finished runs.
        fronts: the fronts of the tilted target that it brings.
        notes: what a reader should know of how it was made.
        contents: what no other entry may have: a digest of each run's training and scores.
    """

    name: str
    folder: Path
    about: About
    commands: list[str]
    runs: list[RecordedRun]
    fronts: Fronts
    notes: list[str] = field(default_factory=list)
    contents: set[bytes] = field(default_factory=set)


@dataclass(frozen=True)
class Refusal:
    """An entry that is not taken, and the sentence that says why."""

    name: str
    folder: Path
    reason: str


def read_entries(folders: Iterable[Path]) -> tuple[list[Entry], list[Refusal]]:
    """Reads and checks every entry; one whose records do not agree is refused and stops nothing.

    Raises:
        UserError: there is no such folder, or one is given twice.
    """
    entries: list[Entry] = []
    refused: list[Refusal] = []
    seen: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        if folder.resolve() in seen:
            raise UserError(f"{folder} is given twice")
        seen.add(folder.resolve())
        try:
            entry = read_entry(folder)
            _refuse_copies(entry, entries)
        except UserError as error:
            refused.append(Refusal(visible(folder.resolve().name), folder, str(error)))
        else:
            taken = {other.name for other in entries}
            numbered = (f"{entry.name} ({n})" for n in range(2, len(taken) + 3))
            entry.name = next(name for name in (entry.name, *numbered) if name not in taken)
            entries.append(entry)
    return entries, refused


def read_entry(folder: Path) -> Entry:
    """Reads one entry and checks its records.

    Raises:
        UserError: what it says of itself cannot be read, its records do not agree, or it names no command.
    """
    about = About()
    if (folder / FILE).is_file():
        about = validate(About, read_yaml(folder / FILE, "entry"), where=str(folder / FILE))
    checked = check_folder(folder, allow_revisions=True)
    if checked.problems:
        others = len(checked.problems) - 1
        more = f" (and {others} more such record{'s' if others > 1 else ''})" if others else ""
        raise UserError(f"{checked.problems[0]}{more}")
    commands = _commands(checked)
    if not commands:
        raise UserError(f"no record in {folder} names the command that makes it again")
    results = read_results(folder)
    notes = [*checked.notes, *results.unreadable, *results.notes]
    contents = {each for each in map(content, checked.runs.values()) if each is not None}
    name = visible(about.name or folder.resolve().name)
    return Entry(name, folder, about, commands, results.runs, read_fronts(folder), notes, contents)


def _commands(checked: CheckedFolder) -> list[str]:
    """The command of the comparison, or else those that the runs' records name."""
    if checked.comparison is not None:
        return [checked.comparison.command] if checked.comparison.command.strip() else []
    commands = (result.environment.get("command") for result in checked.results.values())
    return [str(command) for command in dict.fromkeys(commands) if command]


def _refuse_copies(entry: Entry, others: Iterable[Entry]) -> None:
    """Raises UserError where a run of an earlier entry is in this one too."""
    for other in others:
        if entry.contents & other.contents:
            raise UserError(f"{entry.folder} holds runs of the entry {other.name}: the same training and the same scores")
