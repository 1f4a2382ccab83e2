import os

import pytest

from alignbench import UserError, launch
from alignbench.config import load_config
from alignbench.load import threads_of


def test_without_a_launcher_there_is_one_process() -> None:
    assert (launch.count(), launch.on_this_machine(), launch.is_first(), launch.asks_for_sharding()) == (1, 1, True, False)


def test_what_a_launcher_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in launch.environment(1, 4, 12345).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of four processes two are on another machine
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert (launch.count(), launch.on_this_machine(), launch.is_first(), launch.asks_for_sharding()) == (4, 2, False, True)


def test_processes_share_the_machines_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    config = load_config(preset="smoke")
    assert threads_of(config) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert threads_of(config) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert threads_of(config) == 1
    assert threads_of(load_config(preset="smoke", options={"threads": 5})) == 5


def test_prompts_must_be_shared_equally() -> None:
    launch.check_share(12, 4)
    with pytest.raises(UserError, match="prompts_per_iteration=12 cannot be shared equally by 5 processes"):
        launch.check_share(12, 5)
