import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from alignbench.verification import verify as verifying
from alignbench.verification.record import CellFinding
from alignbench.verification.verify import verify
from tests.support.command_line import in_this_process
from tests.support.tampering import GRPO, TMPO, edit_json, edit_result

ALL = [f"{method}-s{seed}" for seed in (0, 1) for method in (TMPO, GRPO)]


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells that are replayed, all of them equal but grpo's."""
    names: list[str] = []

    def replay(name: str, *_: object) -> CellFinding:
        names.append(name)
        return CellFinding(cell=name, state="not equal" if name.startswith("grpo") else "equal", detail="told")

    monkeypatch.setattr(verifying, "replay", replay)
    return names


def test_a_sample_has_so_many_different_cells(original: Path, replayed: list[str]) -> None:
    verify(original, sample=3, rng=random.Random(0))
    assert len(replayed) == len(set(replayed)) == 3
    replayed.clear()
    verify(original, sample=9)
    assert sorted(replayed) == sorted(ALL)


def _at(revision: str, data: dict[str, Any]) -> None:
    data["environment"]["git_revision"] = revision


def test_a_sample_has_a_cell_of_each_revision(comparison: Path, replayed: list[str]) -> None:
    for revision, name in (("1" * 40, ALL[2]), ("2" * 40, ALL[3])):
        edit_result(comparison / "runs" / name, partial(_at, revision))
    verify(comparison, sample=1, allow_revisions=True)
    assert len(replayed) == 3
    assert set(ALL[2:]) < set(replayed)


def test_the_exit_code_says_equal_not_equal_or_refused(comparison: Path, replayed: list[str]) -> None:
    done = in_this_process("verify", str(comparison), "--cells", ALL[0])
    assert (done.returncode, "the records of 4 runs agree; 1 equal, 3 consistent" in done.stdout) == (0, True)
    done = in_this_process("verify", str(comparison), "--cells", ",".join(ALL[:2]))
    assert (done.returncode, "1 not equal" in done.stdout) == (1, True)
    edit_json(comparison / "runs" / ALL[0] / "result.json", lambda d: d["metrics"]["lgmd"]["final"].update(value=9.0))
    replayed.clear()
    done = in_this_process("verify", str(comparison), "--all")
    assert (done.returncode, replayed) == (2, [])
    assert "alignbench: error: " in done.stderr
    assert "says lgmd final value 9, but the scores in evals.parquet give" in done.stderr


def test_records_only_replays_nothing(original: Path, replayed: list[str]) -> None:
    done = in_this_process("verify", str(original), "--records-only", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, replayed) == (0, [])
    assert [cell["state"] for cell in found["cells"]] == ["consistent"] * 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cells", "tmpo-fixed_tree-equal_modes-s7"], "has no finished cell 'tmpo-fixed_tree-equal_modes-s7'; did you mean"),
        (["--all", "--records-only"], "--all and --records-only exclude each other"),
        (["--records-only", "--out", "x"], "--out keeps replays, and --records-only makes none"),
    ],
)
def test_what_does_not_fit_together_is_refused(original: Path, arguments: list[str], says: str) -> None:
    done = in_this_process("verify", str(original), *arguments)
    assert (done.returncode, says in done.stderr) == (2, True)


def test_a_folder_for_replays_must_be_new(original: Path, tmp_path: Path, replayed: list[str]) -> None:
    (tmp_path / "mine").write_text("notes")
    done = in_this_process("verify", str(original), "--out", str(tmp_path))
    assert (done.returncode, "exists already" in done.stderr, replayed) == (2, True, [])
