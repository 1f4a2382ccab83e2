import os
from pathlib import Path

import pytest

from alignbench import UserError
from alignbench.config.run_config import load_config
from alignbench.load import threads_of
from alignbench.runtime import launch


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of /sys/fs/cgroup, without any limit, and no OMP_NUM_THREADS."""
    monkeypatch.setattr(launch, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(launch, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.delenv("OMP_NUM_THREADS")
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


def test_without_a_launcher_there_is_one_process() -> None:
    assert (launch.count(), launch.on_this_machine(), launch.is_first(), launch.asks_for_sharding()) == (1, 1, True, False)


def test_what_a_launcher_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in launch.environment(1, 4, 12345).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of four processes two are on another machine
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert (launch.count(), launch.on_this_machine(), launch.is_first(), launch.asks_for_sharding()) == (4, 2, False, True)


def test_processes_share_the_machines_threads(monkeypatch: pytest.MonkeyPatch, cgroups: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    config = load_config(preset="smoke")
    assert threads_of(config) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert threads_of(config) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert threads_of(config) == 1
    assert threads_of(load_config(preset="smoke", options={"threads": 5})) == 5
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert [threads_of(config, beside) for beside in (1, 2, 5, 13)] == [8, 6, 2, 1]


def test_omp_num_threads_is_heeded_unless_the_configuration_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, cgroups: Path
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))
    config = load_config(preset="smoke")
    for value, threads in (("1", 1), ("6", 6), ("3,2", 3), ("", 4), ("0", 4), ("many", 4), ("-2", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert threads_of(config) == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads_of(load_config(preset="smoke", options={"threads": 2})) == 2


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/", {}, 16),
        ("0::/", {"cpu.max": "max 100000"}, 16),
        ("0::/", {"cpu.max": "400000 100000"}, 4),
        ("0::/", {"cpu.max": "250000 100000"}, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/pod/job", {"pod/job/cpu.max": "max 100000", "pod/cpu.max": "300000 100000"}, 3),  # that of a group around it
        ("0::/not/seen/from/inside", {"cpu.max": "200000 100000"}, 2),
        ("5:cpu,cpuacct:/docker/x\n4:cpuset:/", {"cpu/cpu.cfs_quota_us": "600000", "cpu/cpu.cfs_period_us": "100000"}, 6),
        ("5:cpu:/x", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, 16),
        ("0::/", {"cpu.max": "4000000 100000"}, 16),  # more than it is bound to
        ("0::/", {"cpu.max": "garbage"}, 16),
    ],
)
def test_usable_cores_are_within_a_containers_share(
    monkeypatch: pytest.MonkeyPatch, cgroups: Path, own: str, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    launch.OWN_CGROUPS.write_text(own + "\n")
    for name, text in files.items():
        (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / name).write_text(text + "\n")
    assert launch.usable_cores() == cores


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two', which must be a whole number of at least 1; unset it"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but not RANK and MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a"}, "not MASTER_PORT; launchers such as torchrun .*; unset them"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK=1 must be below WORLD_SIZE=1"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE='x'"),
    ],
)
def test_variables_that_a_dead_job_left_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        (launch.count(), launch.on_this_machine())
    assert launch.speaks()  # or nobody would say so


def test_empty_variables_are_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
    assert (launch.count(), launch.on_this_machine(), launch.is_first()) == (1, 1, True)


def test_prompts_must_be_shared_equally() -> None:
    launch.check_share(12, 4)
    with pytest.raises(UserError, match="prompts_per_iteration=12 cannot be divided equally between 5 processes"):
        launch.check_share(12, 5)
