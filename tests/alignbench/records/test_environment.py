import pytest
import torch

from alignbench.records import environment as recording
from alignbench.records.environment import environment, git_revision


def test_an_environment_names_the_instructions_on_which_bits_depend() -> None:
    found = environment("cpu", 1)
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert (found["device"], found["threads"], found["processes"]) == ("cpu", 1, 1)


def test_a_process_keeps_the_revision_that_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    began = git_revision()
    monkeypatch.setattr(recording, "_git", lambda *_: "committed meanwhile")
    assert git_revision() == began
