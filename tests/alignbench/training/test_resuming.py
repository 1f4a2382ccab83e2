"""A run that was interrupted or died, and goes on."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from alignbench import RunError, UserError, registry, run
from alignbench.files.writing import exclusive
from tests.support.faults import PATIENCE, command
from tests.support.pairs import in_turn
from tests.support.plugins import toy_config, write_task
from tests.support.same_runs import table

REWARD_DRIVEN = {"name": "dynamic_tree", "schedule": "reward", "steps": 8, "levels": 2, "children": 2}
"""Remembers the rewards it has seen."""


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [*in_turn(registry.names("objectives"), registry.names("samplers"), each=2), ("tmpo", REWARD_DRIVEN)],
)
def test_interrupted_and_resumed_equals_never_interrupted(tmp_path: Path, objective: str, sampler: Any) -> None:
    """Each objective and each sampler has its state in a checkpoint, in a part of its own."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {"objective": objective, "sampler": sampler, "iterations": 5, "ema": {"decay": 0.9, "every": 2}}
    run(toy_config(write_task(tmp_path), **changes), whole)
    interrupting = toy_config(write_task(tmp_path, "Interrupting"), **changes)
    if objective == "none":  # it never asks for a reward again
        run(interrupting, broken)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(interrupting, broken)
        assert len(pd.read_parquet(broken / "metrics.parquet")) == 2
        run(toy_config(write_task(tmp_path), **changes), broken, resume=True)
        pd.testing.assert_frame_equal(table(broken), table(whole), check_exact=True)
    assert weights(broken) == weights(whole)


def weights(folder: Path) -> dict[str, bytes]:
    """The tensors of the newest checkpoint, file by file."""
    newest = max((folder / "checkpoints").iterdir(), key=lambda p: int(p.name.rpartition("-")[2]))
    return {f"{newest.name}/{file.name}": file.read_bytes() for file in newest.glob("*.safetensors")}


@pytest.mark.parametrize("objective", ["tmpo", "dpo", "ppo"])
def test_resumed_with_other_micro_batches_it_is_the_same_within_rounding(tmp_path: Path, objective: str) -> None:
    changes: Any = {"objective": objective, "iterations": 5}
    run(toy_config(write_task(tmp_path), **changes), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(toy_config(write_task(tmp_path, "Interrupting"), **changes), tmp_path / "broken")
    run(toy_config(write_task(tmp_path), micro_batch=3, checkpoint_every=2, **changes), tmp_path / "broken", resume=True)
    # Gradient caching evaluates rows twice, and sums them in another order.
    counted = ["model_rows", "model_rows_train"]
    broken, whole = (table(tmp_path / name).drop(columns=counted) for name in ("broken", "whole"))
    pd.testing.assert_frame_equal(broken, whole, rtol=1e-3, atol=1e-5)


def test_what_a_plugin_draws_from_global_generators_is_the_same_after_a_resume(tmp_path: Path) -> None:
    changes: Any = {"objective": "tests.support.plugins:Drawing", "iterations": 5}
    run(toy_config(write_task(tmp_path), **changes), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(toy_config(write_task(tmp_path, "Interrupting"), **changes), tmp_path / "broken")
    run(toy_config(write_task(tmp_path), **changes), tmp_path / "broken", resume=True)
    assert table(tmp_path / "whole")["loss"].nunique() == 5
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")


def test_the_newest_checkpoints_are_kept_and_the_best(tmp_path: Path) -> None:
    changes: Any = {"iterations": 9, "checkpoint_every": 1, "checkpoints_kept": 3, "best_window": 2}
    # Hardly any training: which iterations had the best prompts is up to the seed.
    run(toy_config(write_task(tmp_path), optimizer={"lr": 1e-6}, seed=4, **changes), tmp_path / "run")
    reward = table(tmp_path / "run")["reward"]
    best = max(range(2, 10), key=lambda n: reward[n - 2 : n].mean())
    kept = {int(f.name.rpartition("-")[2]) for f in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {7, 8, 9, best}
    assert best < 7  # or the test would not show it


def test_a_run_that_died_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    run(toy_config(write_task(tmp_path), checkpoint_every=1), tmp_path / "whole")
    with pytest.raises(RunError):
        run(toy_config(write_task(tmp_path, "Dying"), checkpoint_every=1), tmp_path / "died")
    assert sorted(f.name for f in (tmp_path / "died" / "checkpoints").iterdir()) == ["iteration-1", "iteration-2"]
    run(toy_config(write_task(tmp_path), checkpoint_every=1), tmp_path / "died", resume=True)
    pd.testing.assert_frame_equal(table(tmp_path / "died"), table(tmp_path / "whole"), check_exact=True)


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    run(toy_config(task), tmp_path / "run")
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        run(toy_config(task, seed=9), tmp_path / "run", resume=True)


def test_resuming_with_other_prompts_is_refused_and_another_reward_is_told(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    config = toy_config(task, iterations=1)
    result = run(config, tmp_path / "run")
    assert list(result.task) == ["training prompts", "evaluation prompts", "validation prompts", "reward", "judges"]
    (tmp_path / "run" / "result.json").unlink()
    for file, old, new, part in (
        (tmp_path / "train.txt", "train 0", "other 0", "training prompts"),
        (tmp_path / "eval.txt", "eval 5", "other 5", "evaluation prompts"),
    ):
        text = file.read_text()
        file.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=f"the {part} changed since the checkpoint .* was made; restore the task's files"):
            run(config, tmp_path / "run", resume=True)
        file.write_text(text)
    # What changes nothing may change.
    task.write_text(task.read_text().replace("description: toy", "description: 'other words'"))
    (tmp_path / "train.txt").write_text((tmp_path / "train.txt").read_text() + "\n\n")
    again = run(config, tmp_path / "run", resume=True)
    assert again.task == result.task
    assert again.alarms == result.alarms
    (tmp_path / "run" / "result.json").unlink()
    task.write_text(task.read_text().replace("Brightness", "Sometimes"))
    told = "the reward changed after iteration 1: the training until then had another one"
    assert told in run(config, tmp_path / "run", resume=True).alarms


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(toy_config(write_task(tmp_path, "Interrupting")), tmp_path / "run")

    def times() -> dict[Path, int]:
        return {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("*")}

    before = times()
    with exclusive(tmp_path / "run"), command(["run", "--resume", str(tmp_path / "run")], tmp_path / "said") as process:
        process.join(PATIENCE)
        assert process.exitcode == 2
    assert "another process is using" in (tmp_path / "said").read_text()
    assert times() == before


def test_a_refreshed_reference_is_the_policy_of_that_iteration_and_survives_a_resume(tmp_path: Path) -> None:
    changes: Any = {"objective": {"name": "grpo", "kl_beta": 1.0, "clip": 0.1}, "iterations": 5, "optimizer": {"lr": 0.02}}
    run(toy_config(write_task(tmp_path), reference_refresh=2, **changes), tmp_path / "whole")
    kl = table(tmp_path / "whole")["kl_reference"]
    # At the start and after each refresh the policy is its own reference.
    assert [k == 0 for k in kl] == [True, False, True, False, True]
    run(toy_config(write_task(tmp_path), **changes), tmp_path / "base")
    assert (table(tmp_path / "base")["kl_reference"][1:] > 0).all()
    with pytest.raises(KeyboardInterrupt):
        run(toy_config(write_task(tmp_path, "Interrupting"), reference_refresh=2, **changes), tmp_path / "broken")
    run(toy_config(write_task(tmp_path), reference_refresh=2, **changes), tmp_path / "broken", resume=True)
    assert list(table(tmp_path / "broken")["kl_reference"]) == list(kl)
