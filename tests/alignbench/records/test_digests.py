import subprocess
from pathlib import Path

import pytest

from alignbench.records.digests import changed_files, has_digests, remove_digests, write_digests


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with the files of a run, whatever is in them."""
    for name in ("result.json", "config.yaml", "evals.parquet", "samples/base.png", "checkpoints/iteration-3/SHA256SUMS"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".lock").touch()
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "training.png").touch()
    write_digests(tmp_path)
    return tmp_path


def test_the_digests_are_a_list_that_sha256sum_checks(run: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=run, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:5] == [
        f"{name}: OK"
        for name in ("checkpoints/iteration-3/SHA256SUMS", "config.yaml", "evals.parquet", "result.json", "samples/base.png")
    ]


def test_untouched_files_and_redrawn_plots_are_no_change(run: Path) -> None:
    (run / "plots" / "training.png").write_text("drawn again")
    assert list(changed_files(run)) == []


def test_a_changed_a_missing_and_a_new_file_are_named(run: Path) -> None:
    (run / "result.json").write_text("better")
    (run / "evals.parquet").unlink()
    (run / "curve.parquet").touch()
    said = list(changed_files(run))
    assert [sentence.split(" ")[0].rpartition("/")[2] for sentence in said] == ["curve.parquet", "evals.parquet", "result.json"]
    assert "is not among the files that the run left" in said[0]
    assert "is missing, and the run left it" in said[1]
    assert "was changed after the run had ended" in said[2]


def test_samples_and_checkpoints_may_be_left_out_but_not_swapped(run: Path) -> None:
    (run / "samples" / "base.png").unlink()
    assert list(changed_files(run)) == []
    (run / "checkpoints" / "iteration-3" / "SHA256SUMS").write_text("those of another run")
    assert ["iteration-3" in sentence for sentence in changed_files(run)] == [True]


def test_a_run_that_goes_on_has_no_digests(run: Path) -> None:
    assert has_digests(run)
    remove_digests(run)
    assert not has_digests(run)
    assert list(changed_files(run)) == []
