import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alignbench import UserError, load_objective
from alignbench.files.digests import SUMS
from alignbench.training.checkpoint import (
    STATE,
    Checkpoint,
    best_iteration,
    load_checkpoint,
    policy_weights,
    save_checkpoint,
)
from alignbench.training.tensors import EMA, TrainedTensors
from tests.support.toys import ToyBackbone


def trained(steps: int = 2) -> tuple[nn.Module, torch.optim.AdamW]:
    model = ToyBackbone().net
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
        optimizer.step()
    return model, optimizer


def state(iteration: int, rewards: list[float] | None = None, **fields: Any) -> Checkpoint:
    metrics = [{"reward": reward} for reward in rewards or []]
    return Checkpoint(
        iteration=iteration, config={"seed": 0}, budget={}, metrics=metrics, ratio_deviation=0.0, started="", **fields
    )


def save(folder: Path, iteration: int, **options: Any) -> Path:
    model, optimizer = trained()
    objective = load_objective("tmpo")
    checkpoint = state(iteration, objective=objective.state())
    return save_checkpoint(folder, checkpoint, TrainedTensors(model, optimizer, None, objective), **options)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    ema = EMA(list(model.parameters()), 0.5, 1)
    reference = [p.detach() + 1 for p in model.parameters()]
    objective = load_objective("flowrl")
    saved = state(2, [0.1, float("nan")], sampler={"low": 0.1 + 0.2}, micro_batch=3, micro_batch_halvings=2)
    old = [p.detach() - 1 for p in model.parameters()]
    save_checkpoint(tmp_path / "checkpoints", saved, TrainedTensors(model, optimizer, ema, objective, reference, old))

    other, other_optimizer = trained(0)
    other_ema = EMA(list(other.parameters()), 0.5, 1)
    tensors = TrainedTensors(other, other_optimizer, other_ema, load_objective("flowrl"))
    found = load_checkpoint(tmp_path / "checkpoints", {"seed": 0}, tensors)
    assert found.checkpoint.model_dump_json() == saved.model_dump_json()
    assert found.checkpoint.metrics[1]["reward"] != found.checkpoint.metrics[1]["reward"]  # NaN is no null
    assert found.passed_over == []
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for key, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(value, other_optimizer.state_dict()["state"][key][name])
    assert all(torch.equal(a, b) for a, b in zip(ema.average, other_ema.average, strict=True))
    for given, back in ((reference, tensors.reference), (old, tensors.behaviour)):
        assert back is not None
        assert all(torch.equal(a, b) for a, b in zip(given, back, strict=True))


def test_averages_are_applied_and_the_live_weights_come_back_unchanged(tmp_path: Path) -> None:
    model, _ = trained()
    ema = EMA(list(model.parameters()), 0.5, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    ema.update(1)  # the first step's decay is min(2 / 11, 0.5)
    live = [p.detach().clone() for p in model.parameters()]

    def fails_while_judged() -> None:
        with ema.applied():
            for parameter, before in zip(model.parameters(), live, strict=True):
                torch.testing.assert_close(parameter.detach(), before * (2 / 11 / 3 + 9 / 11))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails_while_judged()
    assert all(torch.equal(p, before) for p, before in zip(model.parameters(), live, strict=True))


def test_sha256sum_finds_the_checkpoint_whole(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    done = subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("OK") == 3  # weights, optimizer, state


def test_the_newest_so_many_stay_and_nothing_hidden(tmp_path: Path) -> None:
    (tmp_path / ".iteration-7.partial").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "iteration-x").mkdir()
    for iteration in (1, 2, 10, 11):
        save(tmp_path, iteration, keep=2)
    assert {f.name for f in tmp_path.iterdir()} == {"iteration-10", "iteration-11", "notes", "iteration-x"}


def test_a_checkpoint_of_the_iteration_is_written_again_only_if_damaged(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    before = (path / STATE).stat().st_ino
    save(tmp_path, 1)
    assert (path / STATE).stat().st_ino == before
    (path / "weights.safetensors").write_bytes(b"")
    save(tmp_path, 1)
    assert policy_weights(tmp_path).iteration == 1


def test_a_checkpoint_under_anothers_name_is_recognised(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=2)
    shutil.copytree(tmp_path / "iteration-1", tmp_path / "iteration-2")
    with pytest.raises(UserError, match=r"iteration-2 is damaged: it holds iteration 1; it was renamed or copied"):
        policy_weights(tmp_path)
    save(tmp_path, 2, keep=2)
    assert policy_weights(tmp_path).iteration == 2


@pytest.mark.parametrize("name", [".DS_Store", ".nfs00000000abcdef01", "Thumbs.db", "._state.json", "desktop.ini"])
def test_what_desktops_and_nfs_leave_in_a_checkpoint_does_no_harm(tmp_path: Path, name: str) -> None:
    (save(tmp_path, 1) / name).write_bytes(b"x")
    assert policy_weights(tmp_path).iteration == 1


def test_the_best_is_by_the_mean_reward_of_the_iterations_before_it() -> None:
    metrics = [{"reward": r} for r in (9.0, 0.0, 3.0, 4.0, 3.5, 3.5, float("nan"), float("nan"))]
    # Windows of two: 4.5 at 2, 1.5 at 3, 3.5 at 4, 3.75 at 5, 3.5 at 6, 3.5 at 7 (one reward), none at 8.
    assert best_iteration([1, 2, 4, 6], metrics, 2) == 2
    assert best_iteration([4, 6, 7, 8], metrics, 2) == 7  # the newest of equals
    assert best_iteration([3, 4, 5, 8], metrics, 2) == 5
    # The reward of the iteration after a checkpoint is another model's.
    assert best_iteration([1, 3], [{"reward": r} for r in (5.0, 0.0, 0.0, 9.0)], 1) == 1
    assert best_iteration([1], metrics, 2) is None
    assert best_iteration([8], metrics, 2) is None


def test_the_best_checkpoint_outlives_newer_ones(tmp_path: Path) -> None:
    model, optimizer = trained()
    rewards = [0.0, 1.0, 0.5, 0.25, 0.125]
    for n in range(1, 6):
        checkpoint = state(n, rewards[:n])
        save_checkpoint(
            tmp_path,
            checkpoint,
            TrainedTensors(model, optimizer, None, load_objective("tmpo")),
            keep=1,
            best_window=1,
        )
    assert {f.name for f in tmp_path.iterdir()} == {"iteration-2", "iteration-5"}
    assert policy_weights(tmp_path).iteration == 5
    assert policy_weights(tmp_path, best_window=1).iteration == 2
    with pytest.raises(UserError, match=r"best_window=6 iterations behind it"):
        policy_weights(tmp_path, best_window=6)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    other = nn.Linear(3, 4)
    with pytest.raises(UserError, match="belong to another model"):
        policy_weights(tmp_path).in_order(other)
    with pytest.raises(UserError, match="belong to another model"):
        load_checkpoint(
            tmp_path, {"seed": 0}, TrainedTensors(other, torch.optim.AdamW(other.parameters()), None, load_objective("tmpo"))
        )


def test_settings_that_change_no_number_may_differ_and_others_may_not(tmp_path: Path) -> None:
    save(tmp_path, 1)
    model, optimizer = trained(0)
    tensors = TrainedTensors(model, optimizer, None, load_objective("tmpo"))
    load_checkpoint(tmp_path, {"seed": 0, "micro_batch": 4, "save_images": False}, tensors)
    with pytest.raises(UserError, match=r"other settings \(seed, task\)"):
        load_checkpoint(tmp_path, {"seed": 1, "task": "geneval"}, tensors)
