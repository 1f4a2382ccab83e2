"""Nothing is imported from the folder that one stands in, but for plug-ins that were asked for from there."""

import os
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest

from alignbench import registry
from alignbench.errors import UserError
from alignbench.objective import Objective
from alignbench.runtime import import_path
from tests.support.command_line import ROOT, in_a_process


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, first on the import path, as `python -m` has it."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep + str(ROOT))
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return folder


def test_the_current_folder_is_taken_off_however_it_is_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here.parent / "link").symlink_to(here)
    rest = sys.path[1:]
    monkeypatch.setattr(sys, "path", ["", ".", str(here), str(here.parent / "link"), *rest])
    import_path.leave_out_current_folder()
    assert sys.path == rest


def test_a_checkout_stays_on_the_path_of_its_own_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a file dropped into `objectives/` is found there."""
    monkeypatch.chdir(import_path.HOME)
    monkeypatch.setattr(sys, "path", [str(import_path.HOME), "elsewhere"])
    import_path.leave_out_current_folder()
    assert sys.path == [str(import_path.HOME), "elsewhere"]


def test_a_folder_that_pythonpath_names_in_full_was_asked_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(here))
    import_path.leave_out_current_folder()
    assert sys.path[0] == str(here)


def test_a_plug_in_of_the_current_folder_is_found_with_its_neighbours(here: Path) -> None:
    (here / "mine_x.py").write_text(
        "from alignbench import Objective\nimport neighbour_x\n"
        "class Mine(Objective):\n    def loss(self, terms, forest):\n        import late_x\n        return late_x.answer\n"
    )
    (here / "neighbour_x.py").write_text("")
    (here / "late_x.py").write_text("answer = 42")
    import_path.leave_out_current_folder()
    found = registry.find("objectives", "mine_x:Mine", Objective)
    assert found.loss(None, None, None) == 42
    assert sys.path[-1] == str(here)  # behind everything else, so that it hides nothing


def test_naming_a_plug_in_of_another_place_opens_no_folder(here: Path) -> None:
    import_path.leave_out_current_folder()
    registry.find("objectives", "tests.support.plugins:Failing", Objective)
    with pytest.raises(UserError, match="cannot be imported"):
        registry.find("objectives", "nowhere_x:Mine", Objective)
    assert str(here) not in sys.path


def test_a_command_runs_no_file_of_the_folder_it_is_started_in(tmp_path: Path) -> None:
    """`pandas` imports bottleneck and numexpr where they are found; other names are of the standard library."""
    for name in ("bottleneck", "numexpr", "random", "socket", "typer", "yaml"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    done = in_a_process([sys.executable, "-m", "alignbench", "report", "nowhere"], tmp_path)
    assert (done.returncode, done.stderr) == (2, "alignbench: error: there is no folder nowhere\n")
    assert not (tmp_path / "ran").exists()


def _names_of_environment(answer: "object") -> None:
    import_path.begin_child()
    answer.send(("PYTHONSAFEPATH" in os.environ, sys.flags.safe_path))  # type: ignore[attr-defined]


def test_processes_that_it_starts_run_none_either(here: Path) -> None:
    """And what these start in turn has the usual path again."""
    (here / "random.py").write_text(f"open({str(here / 'ran')!r}, 'w')\n")
    import_path.leave_out_current_folder()
    ours, theirs = get_context("spawn").Pipe(duplex=False)
    child = get_context("spawn").Process(target=_names_of_environment, args=(theirs,))
    with import_path.safe_children():
        child.start()
    assert "PYTHONSAFEPATH" not in os.environ
    assert ours.poll(60)
    assert ours.recv() == (False, True)
    child.join()
    assert not (here / "ran").exists()
