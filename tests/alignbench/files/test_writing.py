"""Writers of files: whole or not there, through no link, and over nothing that is somebody else's."""

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignbench import UserError
from alignbench.errors import DiskError
from alignbench.files import writing as files
from alignbench.files.writing import (
    LOCK,
    MARK,
    claimed,
    exclusive,
    fill,
    is_file_name,
    is_free,
    own_folders,
    refuse_foreign,
    refuse_links,
    refuse_taken,
    reserved,
    write_atomically,
    write_folder,
    write_new,
)


def saying(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text)


def two_files(folder: Path) -> None:
    (folder / "a").write_text("1")
    (folder / "b").write_text("2")


# ---------------------------------------------------------------------------------------------------- whole or not there


def test_of_two_writers_at_once_each_file_in_place_is_whole(tmp_path: Path) -> None:
    """The first one ends while the second one is half done; nobody sees the half, and nobody fails."""
    file, half, ended = tmp_path / "report.html", threading.Event(), threading.Event()

    def slowly(path: Path) -> None:
        with path.open("w") as opened:
            opened.write("begin B ")
            opened.flush()
            half.set()
            assert ended.wait(10)
            opened.write("end B")

    second = threading.Thread(target=write_atomically, args=(file, slowly))
    second.start()
    assert half.wait(10)
    write_atomically(file, saying("begin A end A"))
    assert file.read_text() == "begin A end A"
    ended.set()
    second.join()
    assert file.read_text() == "begin B end B"
    assert [f.name for f in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("write", [write_atomically, write_new])
def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path, write: Callable[..., None]) -> None:
    def failing(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if write is write_atomically:
        (tmp_path / "file").write_text("old")
    with pytest.raises(DiskError, match=r"cannot write .*file: No space left on device"):
        write(tmp_path / "file", failing)
    assert [f.read_text() for f in tmp_path.iterdir()] == (["old"] if write is write_atomically else [])


def test_the_next_writer_removes_what_a_killed_process_left_and_a_living_one_keeps(tmp_path: Path) -> None:
    for name in ("dead", "live"):
        (tmp_path / f".file.{name}0000.partial").mkdir()
        (tmp_path / f".file.{name}0000.partial" / "file").write_text("half")
    descriptor = os.open(tmp_path / ".file.live0000.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    write_atomically(tmp_path / "file", saying("new"))
    assert sorted(f.name for f in tmp_path.iterdir()) == [".file.live0000.partial", "file"]
    os.close(descriptor)
    write_atomically(tmp_path / "file", saying("new"))
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_files_have_the_rights_that_the_umask_says(tmp_path: Path) -> None:
    former = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", saying("x"))
        write_folder(tmp_path / "folder", two_files)
    finally:
        os.umask(former)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_a_folder_is_on_the_disk_before_what_it_supersedes_may_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files, itself and the folder that it is renamed into are flushed, in this order."""
    flushed: list[str] = []
    monkeypatch.setattr(files, "_flush", lambda path: flushed.append(path.name))
    write_folder(tmp_path / "iteration-1", two_files)
    assert sorted(flushed[:2]) == ["a", "b"]
    assert flushed[2:] == ["iteration-1", tmp_path.name]


# ---------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("planted", ["file", ".file.partial", ".file.partial.csv"])
def test_no_writer_follows_a_planted_link(tmp_path: Path, planted: str) -> None:
    """Neither at the target nor at the names that temporary files once had."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / planted).symlink_to(victim)
    write_atomically(folder / "file", saying("new"))
    assert victim.read_text() == "mine"
    assert (folder / "file").read_text() == "new"
    assert not (folder / "file").is_symlink()


def test_a_link_in_place_of_a_folder_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis").write_text("mine")
    (tmp_path / "iteration-1").symlink_to(victim)
    write_folder(tmp_path / "iteration-1", two_files)
    assert (victim / "thesis").read_text() == "mine"
    assert sorted(f.name for f in (tmp_path / "iteration-1").iterdir()) == ["a", "b"]
    assert not (tmp_path / "iteration-1").is_symlink()


def test_a_lock_that_is_a_link_is_refused_and_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(DiskError, match="symbolic links"), exclusive(tmp_path / "run"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"


def test_folders_below_a_results_folder_are_no_links(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tables").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "plots").write_text("")
    with pytest.raises(UserError, match="tables is a link"):
        refuse_links(tmp_path, "samples", "tables")
    with pytest.raises(UserError, match="plots is not a folder"):
        refuse_links(tmp_path, "plots")
    with pytest.raises(UserError, match="tables is a link"):
        own_folders(tmp_path, "tables", known=True)
    assert not any((tmp_path / "elsewhere").iterdir())


# ---------------------------------------------------------------------------------------------------- whose it is


def test_a_folder_is_free_but_for_locks_litter_and_leftovers(tmp_path: Path) -> None:
    refuse_taken(tmp_path / "new")
    for name in (LOCK, ".DS_Store", "Thumbs.db", ".nfs000000000123abcd", "._x", ".config.yaml.partial.yaml"):
        (tmp_path / name).touch()
    (tmp_path / ".config.yaml.ab12cd34.partial").mkdir()
    refuse_taken(tmp_path)
    (tmp_path / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="exists already; choose another --out"):
            refuse_taken(taken)


def test_a_link_to_nothing_is_not_free(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert not is_free(tmp_path / "link")


@pytest.mark.parametrize("name", ["\udcff", "a\udcffb/c"])
def test_a_folder_that_no_record_could_name_is_refused_before_anything_is_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"\\udcff.* is not valid UTF-8; choose another --out"):
        refuse_taken(tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_a_new_file_replaces_nothing_that_came_while_it_was_written(tmp_path: Path) -> None:
    def meanwhile(path: Path) -> None:
        path.write_text("ours")
        (tmp_path / "file").write_text("theirs")

    with pytest.raises(UserError, match="file exists already"):
        write_new(tmp_path / "file", meanwhile)
    assert [f.read_text() for f in tmp_path.iterdir()] == ["theirs"]


def test_a_folder_is_filled_with_its_last_entry_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    rename = Path.rename

    def noted(self: Path, target: Path) -> Path:
        moved.append(self.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", noted)
    with claimed(tmp_path / "out"):
        fill(tmp_path / "out", two_files, last="a")
    assert moved == ["b", "a"]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["a", "b"]


def test_what_comes_while_a_folder_is_filled_stays_and_nothing_is_added(tmp_path: Path) -> None:
    def meanwhile(folder: Path) -> None:
        two_files(folder)
        (tmp_path / "out" / "theirs").write_text("mine")

    with pytest.raises(UserError, match="exists already"), claimed(tmp_path / "out"):
        fill(tmp_path / "out", meanwhile, last="a")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["theirs"]


def test_the_current_folder_can_be_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with claimed(Path()):
        fill(Path(), two_files, last="a")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "b"]


def test_a_claim_that_comes_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "results" / "out"):
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "there"):
        raise ZeroDivisionError
    assert [f.name for f in tmp_path.iterdir()] == ["there"]


def test_a_claimed_folder_is_nobody_elses(tmp_path: Path) -> None:
    with (
        claimed(tmp_path / "out"),
        pytest.raises(UserError, match=r"another process is using .*out"),
        claimed(tmp_path / "out"),
    ):
        pass


def test_folders_reserved_in_one_second_differ_and_vanish_unused(tmp_path: Path) -> None:
    name = tmp_path / "results" / "20260101-000000-x"
    with reserved(name) as first, reserved(name) as second, reserved(name) as third:
        (second / "result.json").touch()
    assert [f.name for f in (first, second, third)] == [name.name, f"{name.name}-2", f"{name.name}-3"]
    assert [f.name for f in name.parent.iterdir()] == [f"{name.name}-2"]
    (second / "result.json").unlink()
    with reserved(tmp_path / "other" / "x"):
        pass
    assert not (tmp_path / "other").exists()


def test_a_file_without_the_mark_is_foreign(tmp_path: Path) -> None:
    file = tmp_path / "report.md"
    refuse_foreign(file, b"by alignbench")
    file.write_text("what I found, by hand")
    with pytest.raises(UserError, match=r"report\.md was not written by alignbench, .*; move it away"):
        refuse_foreign(file, b"by alignbench")
    file.write_text("numbers <!-- by alignbench -->")
    refuse_foreign(file, b"by alignbench", b"older")
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(UserError, match="was not written by alignbench"):
        refuse_foreign(tmp_path / "link", b"by alignbench")


def test_a_folder_of_ones_own_is_known_by_its_mark(tmp_path: Path) -> None:
    own_folders(tmp_path, "new")
    (tmp_path / "new" / "runs.csv").touch()
    own_folders(tmp_path, "new")
    assert (tmp_path / "new" / MARK).is_file()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "runs.csv").touch()
    with pytest.raises(UserError, match="theirs holds files that alignbench did not write"):
        own_folders(tmp_path, "newer", "theirs")
    assert not (tmp_path / "newer").exists()
    own_folders(tmp_path, "theirs", known=True)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../../escaped", "/etc", "a\nb", "\x00", "\udcff", "x" * 201])
def test_what_leads_elsewhere_or_breaks_a_line_is_no_file_name(name: str) -> None:
    assert not is_file_name(name)
    assert is_file_name("frozen tmpo, β=3")


# ---------------------------------------------------------------------------------------------------- locks


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_work_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, recwarn: pytest.WarningsRecorder
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refused)
    with exclusive(tmp_path):
        write_atomically(tmp_path / "file", saying("x"))
    assert (tmp_path / "file").read_text() == "x"
    assert not recwarn.list


def test_a_lock_can_be_waited_for(tmp_path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive(tmp_path):
            entered.set()
            assert leave.wait(10)

    other = threading.Thread(target=hold)
    other.start()
    assert entered.wait(10)
    with pytest.raises(UserError, match="another process is using"), exclusive(tmp_path):
        pass
    threading.Timer(0.1, leave.set).start()
    with exclusive(tmp_path, patience=10):
        assert leave.is_set()
    other.join()
