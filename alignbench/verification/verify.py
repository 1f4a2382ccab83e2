"""What `verify` does: checks the records of a folder, and replays some of its cells."""

import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from alignbench.errors import UserError, did_you_mean
from alignbench.evaluation.evaluate import Evaluation
from alignbench.files.writing import claimed
from alignbench.training.progress import Console, Silent
from alignbench.verification.comparison_checks import CheckedFolder, check_folder
from alignbench.verification.record import CellFinding, Verification
from alignbench.verification.replay import refuse_unrepeatable, replay

SAMPLE = 3
"""Cells that are replayed where nobody says how many."""


def verify(
    folder: Path,
    *,
    cells: Sequence[str] = (),
    sample: int = SAMPLE,
    every: bool = False,
    records_only: bool = False,
    allow_revisions: bool = False,
    out: Path | None = None,
    rng: random.Random | None = None,
    console: Console | None = None,
    began: Callable[[str, int, int], None] = lambda cell, done, total: None,
) -> Verification:
    """Checks the records of a comparison or a run, and replays some of its cells if nothing is wrong with them.

    Args:
        folder: the folder of a comparison or of a run.
        cells: the cells to replay, instead of a sample.
        sample: how many cells are drawn to be replayed.
        every: replay all cells that can be.
        records_only: replay none.
        allow_revisions: accept cells of several git revisions; the sample has one of each.
        out: a new folder that keeps the replays; None for a temporary one.
        rng: draws the sample. By default nobody can foresee which cells it has.
        console: shows the progress of a replay.
        began: called before each replay with the cell, the number of cells replayed so far, and the number of all.

    Raises:
        UserError: the folder holds neither, there is no such cell, or one cannot be replayed here.
        RunError: a replay failed.
    """
    checked = check_folder(folder, allow_revisions=allow_revisions)
    unknown = [name for name in cells if name not in checked.runs]
    if unknown:
        raise UserError(f"{folder} has no finished cell {unknown[0]!r}{did_you_mean(unknown[0], checked.runs)}")
    found = {name: CellFinding(cell=name, state="consistent") for name, run in checked.runs.items() if not run.problem}
    chosen: list[str] = []
    if not records_only and not checked.problems:
        chosen = list(cells) or _drawn(checked, len(checked.runs) if every else sample, rng or random.SystemRandom())
        place: AbstractContextManager[None] = nullcontext() if out is None else claimed(out)
        with place, tempfile.TemporaryDirectory(prefix="alignbench-verify-") as temporary:
            bases: dict[str, Evaluation] = {}
            for done, name in enumerate(chosen):
                began(name, done, len(chosen))
                below = (out or Path(temporary)) / name
                found[name] = replay(name, checked.runs[name], below, bases, console or Silent())
    return Verification(
        folder=str(folder), cells=list(found.values()), problems=checked.problems, notes=[*checked.notes, *_left_out(checked)]
    )


def _drawn(checked: CheckedFolder, count: int, rng: random.Random) -> list[str]:
    """Cells that can be replayed, drawn without replacement; one of each git revision comes first."""
    able = {name for name in checked.results if _is_repeatable(name, checked)}
    if not able:
        raise UserError(f"no cell of {checked.folder} can be replayed; check its records alone with --records-only")
    order = rng.sample(sorted(able), len(able))
    of_revision = [next((name for name in order if name in names), None) for names in checked.revisions.values()]
    first = [name for name in of_revision if name is not None]
    return [*first, *(name for name in order if name not in first)][: max(count, len(first))]


def _is_repeatable(name: str, checked: CheckedFolder) -> bool:
    try:
        refuse_unrepeatable(name, checked.results[name])
    except UserError:
        return False
    return True


def _left_out(checked: CheckedFolder) -> list[str]:
    """A note about the cells that no replay can give again."""
    unable = [name for name in checked.results if not _is_repeatable(name, checked)]
    return [f"{len(unable)} cells cannot be replayed, such as {unable[0]}"] if unable else []
