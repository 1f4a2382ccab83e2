"""A run's curve: what it holds, and that the training does not know of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from alignbench import UserError
from alignbench.evaluation.curve import FILE, added, by_prompt, curve_rows, means, read_curve, up_to
from alignbench.evaluation.evaluate import Evaluation
from alignbench.training.run import run
from alignbench.training.trainer import Trainer
from tests.support.plugins import toy_config, write_task

EVERY_TWO: Any = {"prompts": 6, "images_per_prompt": 3, "steps": 4, "every": 2, "validation_images": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curve")
    run(toy_config(write_task(folder), iterations=5, evaluation=EVERY_TWO), folder / "run")
    return folder


def test_it_has_an_evaluation_at_the_start_every_n_iterations_and_the_end(finished: Path) -> None:
    table = read_curve(finished / "run")
    assert table is not None
    points = means(table)
    assert list(points["iteration"]) == [0, 2, 4, 5]
    assert {"brightness", "lgmd", "path_kl"} <= set(points)
    assert (np.diff(points["model_rows"]) > 0).all()
    assert points["model_rows"].iloc[0] == 0
    assert points["path_kl"].iloc[0] == 0
    assert points["path_kl"].iloc[-1] > 0
    assert set(table["prompt"]) == {f"validation {i}" for i in range(4)}


def test_the_training_is_the_same_to_the_last_bit_with_and_without_a_curve(finished: Path, tmp_path: Path) -> None:
    run(toy_config(write_task(tmp_path), iterations=5), tmp_path / "plain")
    with_curve, without = (
        pd.read_parquet(folder / "metrics.parquet").drop(columns="seconds") for folder in (finished / "run", tmp_path / "plain")
    )
    pd.testing.assert_frame_equal(with_curve, without, check_exact=True)


def test_an_interrupted_run_goes_on_to_the_same_curve(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate, task = Trainer.iterate, write_task(tmp_path)

    def interrupted(self: Trainer, *arguments: Any) -> Any:
        if self.iteration == 3:
            raise KeyboardInterrupt
        return iterate(self, *arguments)

    config = toy_config(task, iterations=5, evaluation=EVERY_TWO)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "iterate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "run")
    half = read_curve(tmp_path / "run")
    assert half is not None
    assert sorted(set(half["iteration"])) == [0, 2]
    run(config, tmp_path / "run", resume=True)
    whole, same = (read_curve(folder / "run") for folder in (tmp_path, finished))
    assert whole is not None
    assert same is not None
    pd.testing.assert_frame_equal(whole.drop(columns="seconds"), same.drop(columns="seconds"), check_exact=True)


def test_a_task_without_validation_prompts_has_no_curve(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    text = task.read_text().replace("validation_prompts: validation.txt\n", "")
    task.write_text(text)
    run(toy_config(task, iterations=2, evaluation=EVERY_TWO), tmp_path / "run")
    assert read_curve(tmp_path / "run") is None


def test_more_validation_prompts_than_there_are_is_refused(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path), evaluation={**EVERY_TWO, "validation_prompts": 5})
    with pytest.raises(UserError, match=r"evaluation.validation_prompts=5 but task 'toy' has 4 validation prompts; lower it"):
        run(config, tmp_path / "run")


def test_rows_are_means_over_a_prompts_images_and_overall_metrics_are_there() -> None:
    rows = [(0, "a", 0, "x", 1.0), (0, "a", 1, "x", 3.0), (0, "a", -1, "y", 4.0), (1, "b", 0, "x", 5.0)]
    table = pd.DataFrame(rows, columns=["prompt_index", "prompt", "image", "metric", "value"])
    evaluation = Evaluation(table, np.zeros(0), ["a", "b"], {}, {}, {"z": ("x", "y")})
    found = curve_rows(evaluation, 20, 1000, 3.5).set_index(["metric", "prompt_index"])["value"]
    assert found["x", 0] == 2.0
    assert found["x", 1] == 5.0
    assert found["z", 0] == 3.0  # of x and y
    assert found["z", 1] == 5.0


def test_evaluations_are_replaced_cut_and_read_by_prompt() -> None:
    table = pd.DataFrame(
        [(i, 10 * i, 1.0, p, f"p{p}", "x", float(i + p)) for i in (0, 2, 4) for p in (0, 1)],
        columns=["iteration", "model_rows", "seconds", "prompt_index", "prompt", "metric", "value"],
    )
    assert sorted(set(up_to(table, 3)["iteration"])) == [0, 2]  # type: ignore[index]
    again = added(table, table[table["iteration"] == 2].assign(value=9.0))
    iterations, values = by_prompt(again, "x")
    assert iterations == [0, 2, 4]
    assert values.tolist() == [[0.0, 1.0], [9.0, 9.0], [4.0, 5.0]]
    with pytest.raises(UserError, match="the curve has no metric 'w'"):
        by_prompt(again, "w")


def test_a_curve_with_an_evaluation_twice_is_refused(finished: Path, tmp_path: Path) -> None:
    table = pd.read_parquet(finished / "run" / FILE)
    pd.concat([table, table.iloc[:1]]).to_parquet(tmp_path / FILE, index=False)
    with pytest.raises(UserError, match="holds a metric of one evaluation and prompt twice"):
        read_curve(tmp_path)
