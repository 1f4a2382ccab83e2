"""`eval` over a grid of protocols: each cell is what `eval` gives alone, and rankings are compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from alignbench import UserError, run
from alignbench.config.run_config import Plugin, RunConfig
from alignbench.records.record import EvalRecord
from alignbench.scoring.protocol_grid import Model, compared, configured, points_of, score_grid
from alignbench.scoring.protocol_record import FILE, ProtocolGrid
from alignbench.scoring.score import score_model
from tests.support.command_line import in_this_process
from tests.support.plugins import toy_config, write_task

STEPS: dict[str, list[Any]] = {"evaluation.steps": [4, 2], "evaluation.solver": ["euler", "heun"]}


def trained(folder: Path, name: str, **changes: object) -> tuple[RunConfig, Path]:
    config = toy_config(write_task(folder), **changes)
    run(config, folder / name)
    return config, folder / name


def two(folder: Path) -> list[Model]:
    one, other = trained(folder, "one"), trained(folder, "other", objective="grpo", seed=1)
    return [Model(*one), Model(*other)]


def test_each_cell_is_what_eval_gives_alone(tmp_path: Path) -> None:
    models = two(tmp_path)
    grid = score_grid(models, STEPS, tmp_path / "grid")
    assert grid.points == [
        "steps=4, solver=euler",
        "steps=4, solver=heun",
        "steps=2, solver=euler",
        "steps=2, solver=heun",
    ]
    assert [(c.point, c.model) for c in grid.cells] == [(p, m) for p in range(4) for m in range(2)]
    for cell in grid.cells:
        point = points_of(STEPS)[cell.point]
        alone = score_model(configured(models[cell.model].config, point), None, run=models[cell.model].run)
        inside = EvalRecord.read(tmp_path / "grid" / "cells" / cell.id / "eval.json")
        assert inside.metrics == alone.metrics
        assert inside.protocol == alone.protocol
        assert cell.means == {name: metric.value for name, metric in alone.metrics.items()}
    today = score_model(models[0].config, None, run=models[0].run)  # the first protocol is the run's own
    assert grid.cells[0].means == {name: metric.value for name, metric in today.metrics.items()}
    assert [c.model_rows_per_image for c in grid.cells[::2]] == [4, 7, 2, 3]
    assert ProtocolGrid.read(tmp_path / "grid" / FILE) == grid
    assert grid.environment["device"] == inside.environment["device"] != "auto"
    table = pd.read_parquet(tmp_path / "grid" / "protocols.parquet")
    mean = table[(table.model == 0) & (table.point == 0) & (table.metric == "brightness")]["value"].mean()
    assert mean == pytest.approx(grid.cells[0].means["brightness"])


def table_of(values: np.ndarray) -> pd.DataFrame:
    """From values [points, models, prompts] of one metric."""
    rows = [(m, p, "score", q, v) for (p, m, q), v in np.ndenumerate(values)]
    return pd.DataFrame(rows, columns=["model", "point", "metric", "prompt_index", "value"])


def test_a_planted_flip_is_found_and_seeds_of_a_method_are_averaged() -> None:
    rng = np.random.default_rng(0)
    # Two seeds of a, then b and c; at the second protocol b and c change places.
    means = np.array([[0.9, 1.1, 2.0, 3.0], [0.9, 1.1, 3.0, 2.0], [1.4, 0.8, 2.0, 3.0]])
    values = means[:, :, None] + 3 * rng.normal(size=24) + 0.1 * rng.normal(size=(3, 4, 24))
    agreement, flips = compared(table_of(values), ["a", "a", "b", "c"], ["first", "flipped", "same"])
    assert [(a.point, round(a.tau.value or 0, 3)) for a in agreement] == [("flipped", 0.333), ("same", 1.0)]
    assert agreement[1].tau.lower == 1
    assert [(f.point, f.first, f.second, f.beyond_chance) for f in flips] == [("flipped", "b", "c", True)]
    assert flips[0].sentence.startswith("score of c minus that of b is 0.9")
    assert "at flipped" in flips[0].sentence


def test_one_method_has_no_ranking() -> None:
    assert compared(table_of(np.ones((2, 2, 3))), ["a", "a"], ["first", "second"]) == ([], [])


def test_interpolation_of_one_checkpoint_gives_a_front_from_base_to_beyond(tmp_path: Path) -> None:
    config, folder = trained(tmp_path, "run")
    config = configured(config, {"inference.method": "interpolation"})
    grid = score_grid([Model(config, folder)], {"inference.weight": [0.0, 1.0, 2.0]}, tmp_path / "grid")
    record = json.loads((folder / "result.json").read_text())["metrics"]["brightness"]
    found = [cell.means["brightness"] or 0.0 for cell in grid.cells]
    assert found[:2] == [record["base"]["value"], record["final"]["value"]]
    assert (found[2] - found[1]) * (found[1] - found[0]) > 0
    assert [cell.model_rows_per_image for cell in grid.cells] == [4, 4, 8]


def test_best_of_n_chooses_by_the_tasks_reward_whatever_metrics_are_asked_for(tmp_path: Path) -> None:
    config = configured(toy_config(write_task(tmp_path)), {"inference.method": "best_of_n", "inference.n": 4})
    alone = score_model(config, None)
    other = score_model(config, None, evals=["diversity"])
    assert other.metrics["pixel_diversity"] == alone.metrics["pixel_diversity"]
    assert other.protocol.inference == {"method": "best_of_n", "n": 4}
    assert (other.protocol.model_rows_per_image, other.protocol.reward_calls_per_image) == (16, 4)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path))
    out = tmp_path / "grid"
    with pytest.raises(UserError, match=r"eval --sweep cannot vary 'evaluation.step'; did you mean 'evaluation.steps'"):
        score_grid([Model(config)], {"evaluation.step": [1]}, out)
    with pytest.raises(UserError, match=r"eval --sweep cannot vary 'optimizer\.lr'"):
        score_grid([Model(config)], {"optimizer.lr": [1.0]}, out)
    with pytest.raises(UserError, match=r"sweep evaluation\.steps needs different values"):
        score_grid([Model(config)], {"evaluation.steps": [2, 2]}, out)
    with pytest.raises(UserError, match=r"sweep solver=rk4: evaluation\.solver: input should be 'euler'"):
        score_grid([Model(config)], {"evaluation.solver": ["rk4"]}, out)
    with pytest.raises(UserError, match="a checkpoint is there twice"):
        score_grid([Model(config), Model(config)], STEPS, out)
    other = config.model_copy(update={"task": "ocr"})
    with pytest.raises(UserError, match="need the same task"):
        score_grid([Model(config), Model(other, tmp_path)], STEPS, out)
    toy = config.model_copy(update={"task": "equal_modes", "backbone": Plugin(name="gaussian_mixture")})
    wrong = toy.model_copy(update={"backbone": Plugin(name="tiny")})
    with pytest.raises(UserError, match="'equal_modes' is only for the backbone gaussian_mixture, and the backbone is tiny"):
        score_grid([Model(toy), Model(wrong, tmp_path)], STEPS, out)
    with pytest.raises(UserError, match="needs a trained model; evaluate a run with --checkpoint"):
        score_model(configured(config, {"inference.method": "interpolation"}), None)
    assert not out.exists()


def test_the_command(tmp_path: Path) -> None:
    trained(tmp_path, "one")
    trained(tmp_path, "other", objective="grpo", seed=1)
    checkpoints = ["--checkpoint", "one", "--checkpoint", "other"]
    found = in_this_process(
        "eval", *checkpoints, "--sweep", "evaluation.steps=4,2", "--evals", "brightness", "--out", "grid", cwd=tmp_path
    )
    assert found.returncode == 0, found.stderr
    assert "rank correlation (Kendall's tau-b) with steps=4" in found.stdout
    assert (tmp_path / "grid" / "cells" / "model-2-point-2" / "eval.json").is_file()
    wrong = in_this_process("eval", "--images", "x", "--prompts", "y", "--sweep", "guidance=1", cwd=tmp_path)
    assert (wrong.returncode, "cannot be drawn anew" in wrong.stderr) == (2, True)
