"""A finished run that goes on to more iterations, and runs that cannot."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from alignbench import UserError, run
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


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer": {"lr": 0.01, "schedule": "cosine"}}, "its learning rate falls over its 2 iterations"),
        ({"sampler": {"name": "sliding_window", "steps": 4, "window": 1}}, "the plans of sampler sliding_window follow the"),
        ({"budget": {"model_rows": 10_000}}, "ends by its budget"),
    ],
)
def test_a_run_whose_schedules_depend_on_its_length_cannot_be_extended(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    task = write_task(tmp_path)
    run(toy_config(task, objective="grpo", iterations=2, **changes), tmp_path / "run")
    with pytest.raises(UserError, match=says):
        run(toy_config(task, objective="grpo", iterations=4, **changes), tmp_path / "run", resume=True)
    assert read_result(tmp_path / "run").run.iterations == 2
