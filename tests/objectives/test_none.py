from pathlib import Path

from alignbench import run
from tests.support.plugins import toy_config, write_task


def test_the_base_model_is_judged_and_nothing_is_trained(tmp_path: Path) -> None:
    result = run(toy_config(write_task(tmp_path), objective="none"), tmp_path / "run")
    assert result.run.iterations == 0
    assert result.budget.optimizer_steps == 0
    assert result.budget.model_rows_rollout == 0
    assert all(m.difference.value == 0 for m in result.metrics.values())
