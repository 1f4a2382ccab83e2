"""Runs whose trained or base model is evaluated by a method of inference, and comparisons that sweep it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from alignbench import run
from alignbench.comparison.planning import Request, plan_grid
from alignbench.comparison.reading import read_results
from alignbench.comparison.runner import compare
from alignbench.comparison.sweep_requests import parse_sweeps
from alignbench.config.run_config import load_config
from alignbench.records.record import Result
from tests.support.plugins import toy_config, write_task


def base_of(folder: Path, **changes: object) -> Result:
    """The base model as a run with the objective `none`."""
    return run(toy_config(write_task(folder), objective="none", **changes), folder / "run")


def test_best_of_n_without_training_is_the_best_of_the_base_models_images(tmp_path: Path) -> None:
    found = base_of(tmp_path, inference={"method": "best_of_n", "n": 4})
    brightness = found.metrics["brightness"]
    assert (brightness.difference.value or 0) > 0
    table = pd.read_parquet(tmp_path / "run" / "evals.parquet")
    table = table[table.metric == "brightness"].set_index(["prompt_index", "image", "phase"])["value"].unstack("phase")
    assert (table["final"] >= table["base"]).all()  # the base model's image is one of the four
    inference = found.inference
    assert inference is not None
    assert (inference.method, inference.model_rows_per_image, inference.base_model_rows_per_image) == ("best_of_n", 16, 4)
    assert inference.reward_calls_per_image == 4
    assert inference.kl_bound == pytest.approx(np.log(4) - 0.75)
    assert (found.budget.model_rows_rollout, found.budget.model_rows_train, found.run.iterations) == (0, 0, 0)
    assert "path_kl" not in {name for name, m in found.metrics.items() if m.final.value is not None}


def test_best_of_one_is_the_base_model_to_the_bit(tmp_path: Path) -> None:
    found = base_of(tmp_path, inference={"method": "best_of_n", "n": 1})
    assert [m.difference.value for name, m in found.metrics.items() if name != "path_kl"] == [0.0] * (len(found.metrics) - 1)


@pytest.mark.parametrize("of", ["velocity", "weights"])
def test_interpolation_ends_at_the_base_model_and_at_the_trained_one(tmp_path: Path, of: str) -> None:
    task = write_task(tmp_path)
    plain = run(toy_config(task), tmp_path / "plain")
    at: dict[float, Result] = {}
    for weight in (0.0, 1.0):
        inference = {"method": "interpolation", "of": of, "weight": weight}
        at[weight] = run(toy_config(task, inference=inference), tmp_path / f"w{weight}")
    assert at[1.0].metrics == plain.metrics
    assert {name: m.difference.value for name, m in at[0.0].metrics.items() if name != "path_kl"} == dict.fromkeys(
        set(plain.metrics) - {"path_kl"}, 0.0
    )
    assert at[0.0].metrics["path_kl"].final.value == 0
    assert plain.metrics["brightness"].difference.value != 0


def test_extrapolation_goes_further_than_the_trained_model_and_takes_two_rows_a_step(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    kl = []
    for weight in (1.0, 2.0):
        config = toy_config(task, inference={"method": "interpolation", "weight": weight})
        found = run(config, tmp_path / f"w{weight}")
        kl.append(found.metrics["path_kl"].final.value or 0)
        assert found.inference is not None
        assert found.inference.model_rows_per_image == (8 if weight == 2 else 4)
    # Nearly four times the divergence for twice the difference of velocities.
    assert 3 < kl[1] / kl[0] < 5


def test_a_solver_of_the_protocol_draws_base_and_trained_model(tmp_path: Path) -> None:
    found = base_of(tmp_path, evaluation={"prompts": 6, "images_per_prompt": 3, "steps": 4, "solver": "heun"})
    assert found.protocol.solver == "heun"
    assert found.inference is not None
    assert found.inference.model_rows_per_image == found.inference.base_model_rows_per_image == 7
    assert {m.difference.value for m in found.metrics.values()} == {0.0}


def test_a_swept_method_makes_cells_with_their_cost_at_inference(tmp_path: Path) -> None:
    request = Request(
        objectives=["none"],
        samplers=["independent"],
        tasks=["rare_mode"],
        seeds=[0],
        backbone="gaussian_mixture",
        preset="smoke",
        threads=1,
        settings={
            "backbone": {"name": "gaussian_mixture", "quadrature": 10},
            "evaluation": {"prompts": 2, "images_per_prompt": 4, "steps": 4},
            "save_images": False,
            "inference": {"method": "best_of_n"},
        },
    )
    grid = plan_grid(request.with_options(sweep=parse_sweeps(["inference.n=2,8"])))
    assert [method.objective for method in grid.methods()] == ["none(n=2)", "none(n=8)"]
    compare(grid, tmp_path / "out")
    frame = read_results(tmp_path / "out").cells_frame
    rewards = frame[frame.metric == "exact_reward"].set_index("cell")
    assert rewards["rows_per_image"].to_dict() == {"base model": 4, "none(n=2) x independent": 8, "none(n=8) x independent": 32}
    assert list(rewards["model_rows"]) == [0, 0, 0]
    assert list(rewards["mean"].sort_values().index) == list(rewards["rows_per_image"].sort_values().index)


def test_steered_images_have_no_divergence_that_a_model_could_measure(tmp_path: Path) -> None:
    settings = {
        "objective": "none",
        "backbone": {"name": "gaussian_mixture", "quadrature": 10},
        "task": "rare_mode",
        "evaluation": {"prompts": 2, "images_per_prompt": 4, "steps": 4},
        "save_images": False,
        "threads": 1,
    }
    steered = load_config(preset="smoke", options={**settings, "inference": {"method": "fk", "n": 4}})
    found = run(steered, tmp_path / "runs" / "steered")
    assert (found.metrics["kl_base"].final.value, found.metrics["path_kl"].final.value) == (None, None)
    assert found.metrics["scenario_reward"].final.value is not None
    results = read_results(tmp_path)
    (setup,), (cell,) = results.setups, {r.cell for r in results.runs}
    assert np.isnan(results.scores(setup, cell, "kl_base")).all()
    assert not np.isnan(results.scores(setup, cell, "kl_base", "base")).any()
