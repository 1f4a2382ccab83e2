"""A small true comparison, and the ways in which somebody may alter its records."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from alignbench.comparison.planning import Request, plan_grid
from alignbench.comparison.runner import compare
from alignbench.records.digests import write_digests
from alignbench.records.record import Result, read_result, write_result
from alignbench.verification.recomputed import recomputed

TMPO, GRPO = "tmpo-fixed_tree-equal_modes", "grpo-fixed_tree-equal_modes"
"""Names of cells without their seeds."""


def true_comparison(folder: Path) -> Path:
    """Runs tmpo and grpo with two seeds on the toy, three iterations each, in a few seconds."""
    settings = {
        "samplers": {"fixed_tree": {"sampler": {"steps": 4, "levels": 2, "children": 2, "splits": [1, 2]}}},
        "backbone": {"name": "gaussian_mixture", "quadrature": 10},
        "prompts_per_iteration": 2,
        "evaluation": {"prompts": 4, "images_per_prompt": 2, "steps": 4, "every": 1, "validation_prompts": 4},
        "optimizer": {"lr": 0.005},
        "save_images": False,
    }
    axes = {"objectives": ["tmpo", "grpo"], "samplers": ["fixed_tree"], "tasks": ["equal_modes"], "seeds": [0, 1]}
    asked = {"backbone": "gaussian_mixture", "preset": "smoke", "budget": {"model_rows": 66}, "threads": 1}
    record = compare(plan_grid(Request(settings=settings, **axes, **asked)), folder)
    assert [cell.error for cell in record.cells] == [None] * 4
    return folder


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the content of a JSON file."""
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def edit_yaml(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the content of a YAML file."""
    data = yaml.safe_load(file.read_text())
    change(data)
    file.write_text(yaml.safe_dump(data))


def edit_table(file: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Changes the rows of a Parquet table."""
    change(pd.read_parquet(file)).to_parquet(file, index=False)


def edit_result(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a run's record, and its digests with it."""
    edit_json(run / "result.json", change)
    write_digests(run)


def forge_scores(run: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Result:
    """Changes the scores of a run's images, and then everything that could give it away."""
    edit_table(run / "evals.parquet", change)
    result = read_result(run)
    result = result.model_copy(update={"metrics": recomputed(pd.read_parquet(run / "evals.parquet"), result)})
    write_result(result, run)
    write_digests(run)
    return result


def raised(amount: float) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Adds an amount to each reward of the trained model."""

    def change(table: pd.DataFrame) -> pd.DataFrame:
        of_final = (table["metric"] == "scenario_reward") & (table["phase"] == "final")
        return table.assign(value=table["value"] + amount * of_final)

    return change
