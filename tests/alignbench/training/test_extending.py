"""A finished run that goes on to more iterations, and runs that cannot."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from alignbench import UserError, run
from alignbench.config.run_config import RunConfig, load_config
from alignbench.evaluation.curve import read_curve
from alignbench.records.distributions import TARGET, read_distributions
from alignbench.records.record import read_result
from tests.support.plugins import toy_config, write_task
from tests.support.same_runs import table


def test_an_extended_run_is_the_run_that_was_longer_from_the_start(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    whole, extended = tmp_path / "whole", tmp_path / "extended"
    run(toy_config(task, objective="grpo", iterations=5), whole)
    run(toy_config(task, objective="grpo", iterations=2), extended)
    result = run(toy_config(task, objective="grpo", iterations=5), extended, resume=True)
    pd.testing.assert_frame_equal(table(extended), table(whole), check_exact=True)
    assert result.run.iterations == 5
    assert result.metrics == read_result(whole).metrics
    (kept,) = extended.glob("result_at_*")
    assert kept.name == "result_at_2_iterations.json"


def test_an_extended_run_has_the_evaluations_of_the_longer_one(tmp_path: Path) -> None:
    task, every_two = write_task(tmp_path), {"prompts": 2, "images_per_prompt": 2, "steps": 4, "every": 2}
    whole, extended = tmp_path / "whole", tmp_path / "extended"
    run(toy_config(task, objective="grpo", iterations=5, evaluation=every_two), whole)
    run(toy_config(task, objective="grpo", iterations=3, evaluation=every_two), extended)
    assert evaluated(extended) == [0, 2, 3]
    run(toy_config(task, objective="grpo", iterations=5, evaluation=every_two), extended, resume=True)
    assert evaluated(extended) == evaluated(whole) == [0, 2, 4, 5]


def test_a_run_with_snapshots_cannot_be_extended(tmp_path: Path) -> None:
    def config(iterations: int, snapshots: int) -> RunConfig:
        small = {"evaluation": {"prompts": 1, "images_per_prompt": 4}, "optimizer": {"schedule": "constant"}}
        options = {"backbone": "gaussian_mixture", "objective": "grpo", "sampler": "independent", "iterations": iterations}
        return load_config(preset="smoke", options={**options, **small, "snapshots": snapshots})

    run(config(2, 1), tmp_path / "with")
    with pytest.raises(UserError, match="its snapshots follow the progress"):
        run(config(4, 1), tmp_path / "with", resume=True)
    # Without them the distribution of the former end goes, and the one of the new end comes.
    run(config(2, 0), tmp_path / "without")
    run(config(4, 0), tmp_path / "without", resume=True)
    table = read_distributions(tmp_path / "without")
    assert table is not None
    assert sorted(set(table["iteration"])) == [TARGET, 0, 4]


def evaluated(folder: Path) -> list[int]:
    found = read_curve(folder)
    assert found is not None
    return sorted(set(found["iteration"]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer": {"lr": 0.01, "schedule": "cosine"}}, "its learning rate falls over its 2 iterations"),
        ({"sampler": {"name": "sliding_window", "steps": 4, "window": 1}}, "the plans of sampler sliding_window follow the"),
        ({"budget": {"model_rows": 10_000}}, "ends by its budget"),
        ({"objective": {"name": "ftb", "alpha_end": 1.2}}, "objective ftb follows the progress through its 2 iterations"),
    ],
)
def test_a_run_whose_schedules_depend_on_its_length_cannot_be_extended(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    task = write_task(tmp_path)
    changes = {"objective": "grpo", **changes}
    run(toy_config(task, iterations=2, **changes), tmp_path / "run")
    with pytest.raises(UserError, match=says):
        run(toy_config(task, iterations=4, **changes), tmp_path / "run", resume=True)
    assert read_result(tmp_path / "run").run.iterations == 2
