"""What a comparison takes and refuses of tuned settings."""

from pathlib import Path
from typing import Any

import pytest

from alignbench import UserError
from alignbench.comparison.grid import Grid
from alignbench.comparison.planning import Request, plan_grid
from alignbench.comparison.tuned import FIRST_TUNING_SEED, Tuned, task_hash
from alignbench.tasks import load_task
from tests.support.plugins import write_task

POLICY = "tests.support.plugins:ToyPolicy"


def planned(folder: Path, tuned: dict[str, Any] | None = None, **changes: Any) -> Grid:
    """A comparison on the toy task with settings that were tuned there, but for what is changed."""
    task = str(write_task(folder))
    provenance = {
        "task": task,
        "backbone": POLICY,
        "trials": 4,
        "seeds": [FIRST_TUNING_SEED],
        "select": "reward",
        "task_hash": task_hash(load_task(task)),
        "trials_hash": "0" * 64,
        **(tuned or {}),
    }
    keys = {"objectives": ["grpo"], "samplers": ["independent"], "tasks": [task], "backbone": POLICY, "preset": "smoke"}
    return plan_grid(Request(**{**keys, "budget": {"model_rows": 60}, "tuned": Tuned(**provenance), **changes}))


def test_the_grid_keeps_where_its_settings_come_from(tmp_path: Path) -> None:
    grid = planned(tmp_path)
    assert grid.tuned is not None
    assert (grid.tuned.trials, grid.tuned.select) == (4, "reward")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": ["ocr"]}, "tuned for the task .*toy.yaml and not for ocr"),
        ({"backbone": "gaussian_mixture"}, "tuned for the backbone .*ToyPolicy and not for gaussian_mixture"),
        ({"parts": {"here": {}, "there": {"tasks": ["ocr"]}}}, "and not for ocr"),
        ({"seeds": [0, FIRST_TUNING_SEED]}, "seeds from 1,000,000 on belong to `tune`"),
        ({"seeds": [FIRST_TUNING_SEED + 7]}, "take one below instead of 1000007"),
    ],
)
def test_another_task_or_backbone_or_a_tuning_seed_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        planned(tmp_path, **changes)


def test_a_task_whose_reward_changed_since_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training prompts, validation prompts or reward of task .* changed since"):
        planned(tmp_path, tuned={"task_hash": "0" * 64})


def test_tuned_settings_do_not_depend_on_test_prompts(tmp_path: Path) -> None:
    file = str(write_task(tmp_path))
    before = task_hash(load_task(file))
    (tmp_path / "eval.txt").write_text("another test prompt")
    assert task_hash(load_task(file)) == before
    (tmp_path / "validation.txt").write_text("another validation prompt")
    assert task_hash(load_task(file)) != before
