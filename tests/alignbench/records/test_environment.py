import subprocess
from pathlib import Path

import pytest
import torch

from alignbench.records import environment as recording
from alignbench.records.environment import environment, git_revision, revision_of


def test_an_environment_names_the_instructions_on_which_bits_depend() -> None:
    found = environment("cpu", 1)
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert (found["device"], found["threads"], found["processes"]) == ("cpu", 1, 1)


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_revision_is_that_of_the_checkout_and_not_of_a_repository_around_it(tmp_path: Path) -> None:
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert revision_of(tmp_path) is None
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert revision_of(tmp_path) == commit
    assert revision_of(inside) is None
    (tmp_path / "file").write_text("2")
    assert revision_of(tmp_path) == f"{commit}-dirty"


def test_a_process_keeps_the_revision_that_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    began = git_revision()
    monkeypatch.setattr(recording, "_git", lambda *_: "committed meanwhile")
    assert git_revision() == began
