"""Runs on several processes: they come to the same as on one, and end together."""

import atexit
import json
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignbench import NonFiniteError, RunError, UserError, run
from alignbench.config.run_config import RunConfig
from alignbench.files import writing as files
from alignbench.rollouts.executor import rollout
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.noise import group_keys
from alignbench.runtime import launch
from alignbench.runtime.micro_batch import MicroBatch
from alignbench.runtime.processes import SETTLING, SINGLE_PROCESS, DistributedProcesses, join, on_loopback
from tests.support.faults import PATIENCE, full_disk
from tests.support.pairs import in_turn
from tests.support.plugins import toy_config, write_task
from tests.support.replays import SMALL, TRAINING
from tests.support.same_runs import CALM, ROUNDING, assert_same_but_for_rounding, record, weights
from tests.support.together import command, ended, runs, started
from tests.support.toys import ToyBackbone, tree

KINDS = ["tmpo", "grpo", "ppo", "gardo", "ftb", "dpo", "nft", "awm", "crd"]
"""An objective of each kind: on whole paths, on steps, with a value network, with doubted rewards, with parameters of its own,
on pairs of final images, with a behaviour policy, on weighted final images, and on a contrast of them."""
PAIRS = {2: in_turn(TRAINING, list(SMALL)), 4: in_turn(KINDS, list(SMALL))}
"""What several processes train: every objective on two, and every sampler on two and on four. Neither of them can ask how many
there are; on four there is more than one other to gather from."""


def grid(folder: Path, out: Path, pairs: Iterable[tuple[str, str]]) -> list[tuple[RunConfig, Path]]:
    """Two iterations of four groups of four for each pair."""
    changes = {
        "iterations": 2,
        "prompts_per_iteration": 4,
        "updates_per_rollout": 2,
        "optimizer": CALM,
        "evaluation": {"prompts": 6, "images_per_prompt": 4, "steps": 4},
    }
    task = write_task(folder, "ThirdOfFour")
    return [
        (
            toy_config(task, objective=objective, sampler={"name": sampler, **SMALL[sampler]}, **changes),
            out / f"{objective}-{sampler}",
        )
        for objective, sampler in dict.fromkeys(pairs)
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    for config, folder in grid(out, out, [*PAIRS[2], *PAIRS[4]]):
        run(config, folder)
    return out


@pytest.mark.parametrize("count", PAIRS)
def test_any_pair_comes_to_the_same_on_several_processes(tmp_path: Path, alone: Path, count: int) -> None:
    jobs = grid(alone, tmp_path, PAIRS[count])
    assert {config.objective.name for config, _ in jobs} == set(TRAINING if count == 2 else KINDS)
    assert {config.sampler.name for config, _ in jobs} == set(SMALL)
    assert ended(started(count, runs, jobs, said=tmp_path / "said")) == [0] * count
    for _, out in jobs:
        assert_same_but_for_rounding(alone / out.name, out)
        assert record(out)["environment"]["processes"] == count


def test_keepers_of_diversity_come_to_the_same_on_two_processes(tmp_path: Path) -> None:
    keepers = {"cluster_bonus": 0.3, "distance_bonus": 0.2, "reward_share": 0.75, "data": 0.5, "data_from": "base"}
    task, sampler = write_task(tmp_path), {"name": "trunk_tree", **SMALL["trunk_tree"]}
    changes = {"prompts_per_iteration": 4, "optimizer": CALM, "keepers": keepers}
    config = toy_config(task, objective="ppo", sampler=sampler, **changes)
    run(config, tmp_path / "alone")
    assert ended(started(2, runs, [(config, tmp_path / "two")], said=tmp_path / "said")) == [0, 0]
    assert_same_but_for_rounding(tmp_path / "alone", tmp_path / "two")


def gathering(folder: Path) -> None:
    """Writes what this process has after gathering."""
    processes = join(torch.device("cpu"))
    prompts, policy, plan = ["a", "b", "a", "c"], ToyBackbone(), tree(4, [1, 2])
    keys, own = group_keys(prompts), processes.share(range(4))
    part = rollout(policy, [prompts[g] for g in own], plan, 7, keys=[keys[g] for g in own])
    whole = part.gathered(processes)
    uneven = torch.arange(processes.rank * 3).view(-1, 3) % 2 == 0
    torch.save(
        {
            "prompts": whole.prompts,
            "states": whole.states,
            "leaves": whole.leaf_latents,
            "groups": whole.row_group,
            "log_prob": whole.path_sum(whole.old_log_prob),
            "uneven": torch.cat(processes.all_gather(uneven)),
            "told": processes.all_gather_object({"rank": processes.rank, "nan": [float("nan")]}),
        },
        folder / f"{processes.rank}.pt",
    )


def test_groups_survive_gathering_to_the_bit(tmp_path: Path) -> None:
    assert ended(started(2, gathering, tmp_path, said=tmp_path / "said")) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    prompts, policy, plan = ["a", "b", "a", "c"], ToyBackbone(), tree(4, [1, 2])
    keys = group_keys(prompts)
    halves = [rollout(policy, prompts[i : i + 2], plan, 7, keys=keys[i : i + 2]) for i in (0, 2)]
    whole = RolloutForest.joined(halves)
    for found in (first, second):
        assert found["prompts"] == prompts
        assert torch.equal(found["states"], whole.states)
        assert torch.equal(found["leaves"], whole.leaf_latents)
        assert torch.equal(found["groups"], whole.row_group)
        assert torch.equal(found["log_prob"], whole.path_sum(whole.old_log_prob))
        assert torch.equal(found["uneven"], torch.tensor([[True, False, True]]))  # of process 1 alone
        assert [told["rank"] for told in found["told"]] == [0, 1]
    # The first and third group share a prompt, and each has noise of its own.
    assert not torch.equal(whole.leaf_latents[:9], whole.leaf_latents[18:27])


def test_a_process_lets_the_threads_of_gloo_end_their_work_before_it_ends(tmp_path: Path) -> None:
    """Without this, two of five pairs of processes that ended right after a collective were aborted by one of these threads."""
    assert ended(started(2, leaving, tmp_path, said=tmp_path / "said")) == [0, 0]
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [["sleep", SETTLING]]


def leaving(folder: Path) -> None:
    """Joins, and writes what is left for the end of this process."""
    registered: list[list[Any]] = []
    atexit.register = lambda work, *arguments: registered.append([work.__name__, *arguments])  # type: ignore[assignment]
    processes = join(torch.device("cpu"))
    ours = [call for call in registered if call[0] == "sleep"]  # libraries leave work of their own
    (folder / f"{processes.rank}.json").write_text(json.dumps(ours))


def test_shares_are_as_long_and_say_what_is_repeated() -> None:
    three = DistributedProcesses.__new__(DistributedProcesses)
    three.count = 3
    shares, kept = [], []
    for three.rank in range(3):
        shares.append(three.share("abcd"))
        kept.append(three.unpadded_length("abcd"))
    assert shares == [["a", "b"], ["c", "d"], ["d", "d"]]
    assert kept == [2, 2, 0]
    assert SINGLE_PROCESS.share("abcd") == list("abcd")
    assert SINGLE_PROCESS.unpadded_length("abcd") == 4


def test_a_chosen_interface_and_processes_on_several_machines_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in launch.environment(1, 4, 12345).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert on_loopback() == {}
    assert "NCCL_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # `torchrun` has a store of its own
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")  # so that the test leaves nothing behind
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    assert on_loopback() == {}
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth7", launch.loopback_interface())


def test_a_failure_of_one_process_ends_all_with_its_message_and_the_run_resumes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = toy_config(write_task(tmp_path, "DyingInSecondProcess"), iterations=4, optimizer=CALM)
    processes = started(2, runs, [(config, out)], said=tmp_path / "said")
    assert ended(processes) == [1, 1]
    for rank in range(2):
        assert "the server is gone" in (tmp_path / "said" / str(rank)).read_text()
    assert "rank 1: scorer 'brightness' failed in iteration 2" in (tmp_path / "said" / "0").read_text()
    assert not (out / "result.json").exists()
    assert max(p.name for p in (out / "checkpoints").iterdir()) == "iteration-2"  # both stood there
    write_task(tmp_path)  # the server is back
    run(config, out, resume=True)
    run(config, tmp_path / "undisturbed")
    assert_same_but_for_rounding(tmp_path / "undisturbed", out)


def test_processes_stop_by_the_same_rule_and_return_to_the_same_weights(tmp_path: Path) -> None:
    rules: Any = {"evaluation": {"prompts": 6, "images_per_prompt": 4, "steps": 4, "every": 2, "validation_images": 3}}
    rules |= {"stop": {"path_kl": 0.05, "restore": True}, "iterations": 9, "optimizer": CALM}
    config = toy_config(write_task(tmp_path), **rules)
    assert ended(started(2, runs, [(config, tmp_path / "several")], said=tmp_path / "said")) == [0, 0]
    run(config, tmp_path / "one")
    stops = [record(tmp_path / name)["stop"] for name in ("several", "one")]
    assert stops[0]["rule"] == "path_kl"
    assert [(stop["iteration"], stop["names"]) for stop in stops] == [(stops[0]["iteration"], stops[0]["names"])] * 2
    assert stops[0]["iteration"] < 9
    assert_same_but_for_rounding(tmp_path / "one", tmp_path / "several")


def failing(folder: Path) -> None:
    """Both processes fail, each in its own way; writes what each raises."""
    processes = join(torch.device("cpu"))

    def work() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory") if processes.is_rank_zero else UserError("no such thing")

    try:
        processes.on_all_ranks(work)
    except Exception as error:
        wrapped = RunError("about it")
        wrapped.__cause__ = error
        told = [type(error).__name__, str(error), processes.raised_on_all_ranks(error), processes.raised_on_all_ranks(wrapped)]
        (folder / f"{processes.rank}.json").write_text(json.dumps([*told, processes.raised_on_all_ranks(ValueError())]))


def test_of_two_failures_all_raise_the_first_processs(tmp_path: Path) -> None:
    assert ended(started(2, failing, tmp_path, said=tmp_path / "said")) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == ["OutOfMemoryError", "CUDA out of memory", True, True, False]
    assert second == ["OutOfMemoryError", "rank 0: CUDA out of memory", True, True, False]


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_one_process_ends_all_with_a_checkpoint(tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    config = toy_config(write_task(tmp_path, "Waiting", meeting=str(tmp_path)))
    config_file = tmp_path / "config.yaml"
    config_file.write_text(json.dumps(config.resolved()))
    arguments = ["run", "--config", str(config_file), "--out", str(out)]
    processes = started(2, command, arguments, said=tmp_path / "said")
    wait_for(tmp_path / "waiting-0", tmp_path / "waiting-1")
    os.kill(processes[1].pid, number)
    (tmp_path / "go").touch()
    assert ended(processes) == [130, 130]
    assert "interrupted; resume with: alignbench run --resume" in (tmp_path / "said" / "0").read_text()
    assert (tmp_path / "said" / "1").read_text().count("alignbench:") == 0  # one speaks for all
    reached = max(int(p.name.rpartition("-")[2]) for p in (out / "checkpoints").iterdir())
    assert reached < 3
    assert ended(started(2, command, ["run", "--resume", str(out)], said=tmp_path / "said")) == [0, 0]
    whole = tmp_path / "whole"
    assert ended(started(2, runs, [(config, whole)], said=tmp_path / "said")) == [0, 0]
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(out)[name], tensor)  # to the bit, on as many processes


def test_a_process_that_is_killed_takes_the_others_with_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    task = write_task(tmp_path, "Waiting", meeting=str(tmp_path))
    config = toy_config(task, checkpoint_every=1, optimizer=CALM)
    processes = started(2, runs, [(config, out)], said=tmp_path / "said")
    wait_for(tmp_path / "waiting-0", tmp_path / "waiting-1")
    assert (out / "checkpoints" / "iteration-2").exists()
    processes[1].kill()
    (tmp_path / "go").touch()
    first, second = ended(processes)
    assert (first, second) == (1, -signal.SIGKILL)
    assert "RunError: another process of this run has ended or cannot be reached" in (tmp_path / "said" / "0").read_text()
    assert not (out / "result.json").exists()
    run(config, out, resume=True)  # on one process
    run(config, tmp_path / "whole")
    assert_same_but_for_rounding(tmp_path / "whole", out)


def test_a_full_disk_of_the_first_process_ends_all(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert ended(started(2, disk_full, toy_config(write_task(tmp_path)), out, said=tmp_path / "said")) == [1, 1]
    for rank in range(2):
        assert "No space left on device" in (tmp_path / "said" / str(rank)).read_text()


def disk_full(config: RunConfig, out: Path) -> None:
    setattr(files, "_flush", full_disk("metrics.parquet"))  # noqa: B010 - mypy knows it for a function
    run(config, out)


def test_where_memory_runs_out_in_one_process_all_halve_their_micro_batch(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    cramped = toy_config(task, backbone="tests.support.plugins:CrampedInSecondProcess", optimizer=CALM)
    assert ended(started(2, runs, [(cramped, tmp_path / "cramped")], said=tmp_path / "said")) == [0, 0]
    run(toy_config(task, optimizer=CALM), tmp_path / "roomy")
    spent = record(tmp_path / "cramped")["budget"]
    assert spent["micro_batch_halvings"] >= 1
    assert spent["micro_batch"] <= 3
    for name, tensor in weights(tmp_path / "roomy").items():
        torch.testing.assert_close(weights(tmp_path / "cramped")[name], tensor, rtol=0, atol=ROUNDING)


def test_processes_that_start_from_other_weights_are_refused(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path), backbone="tests.support.plugins:DriftingInSecondProcess")
    assert ended(started(2, runs, [(config, tmp_path / "run")], said=tmp_path / "said")) == [1, 1]
    assert "process 1 has other weights than process 0 at iteration 0" in (tmp_path / "said" / "0").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--set", "prompts_per_iteration=3"], "cannot be divided equally between 2 processes"),
        (["run", "--objective", "tmpoo"], "did you mean 'tmpo'"),
        (["list"], "`list` cannot run under a distributed launcher (WORLD_SIZE=2)"),
        (["run", "--set", "sharded=true"], "backbone 'gaussian_mixture' cannot be sharded"),
    ],
)
def test_what_cannot_be_shared_is_said_once(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    toy = ["--backbone", "gaussian_mixture", "--task", "equal_modes", "--preset", "smoke", "--out", str(tmp_path / "run")]
    given = [*arguments, *(toy if arguments[0] == "run" else [])]
    assert ended(started(2, command, given, said=tmp_path / "said")) == [2, 2]
    assert sentence in (tmp_path / "said" / "0").read_text()
    assert (tmp_path / "said" / "1").read_text() == ""
    assert not (tmp_path / "run" / "result.json").exists()


def of_shards(monkeypatch: pytest.MonkeyPatch) -> DistributedProcesses:
    """Rank 1 of a sharded run, in a process of its own; a failure there asks no other rank."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return DistributedProcesses(torch.device("cpu"), sharded=True)


def test_a_rank_of_a_sharded_model_that_fails_ends_with_its_own_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processes, failure = of_shards(monkeypatch), NonFiniteError("the loss is not finite")

    def fails() -> None:
        raise failure

    with pytest.raises(NonFiniteError) as raised:
        processes.on_all_ranks(fails, calls_model=True)
    assert raised.value is failure
    assert not processes.raised_on_all_ranks(failure)  # and comes to an end
    assert capsys.readouterr().err == "alignbench: rank 1 ends: the loss is not finite\n"


def test_a_rank_of_a_sharded_model_does_not_try_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    processes, limits = of_shards(monkeypatch), []

    def work(limit: int | None) -> None:
        limits.append(limit)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(RunError, match="out of memory"):
        MicroBatch(8).fit(lambda limit: processes.on_all_ranks(lambda: work(limit), calls_model=True), lambda: 8)
    assert limits == [8]
