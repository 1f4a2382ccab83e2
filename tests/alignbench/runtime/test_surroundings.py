"""Machines without a home folder or a name for the user."""

import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from alignbench.runtime import surroundings

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
FOLDERS = ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *FOLDERS):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


def test_without_a_home_folder_caches_have_a_private_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null/nowhere")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("MPLCONFIGDIR", "/mine")
    surroundings.prepare()
    assert os.environ["MPLCONFIGDIR"] == "/mine"
    (made,) = tmp_path.iterdir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(made)
    assert made.stat().st_mode & 0o777 == 0o700


def test_with_a_home_folder_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    surroundings.prepare()
    assert not set(FOLDERS) & set(os.environ)


def test_a_user_without_a_name_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch and others ask for it, and fail where there is none."""

    def unknown(*_: Any) -> Any:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    surroundings.prepare()
    assert os.environ["USER"] == f"user{os.getuid()}"
