"""Folders as finished runs leave them, written in milliseconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from alignbench.evaluation.evaluate import Evaluation, metric_changes
from alignbench.records.record import Budget, Protocol, Result, RunInfo

PROMPTS = ("a red circle", "a <b>blue</b> square")


def write_run(
    folder: Path,
    *,
    objective: str = "tmpo",
    seed: int = 1,
    reward: tuple[float, float] = (0.5, 0.7),
    lgmd: tuple[float, float] = (0.1, 0.3),
    prompts: tuple[str, str] = PROMPTS,
    steps: int = 8,
    rows: int = 150,
    torch: str = "2.14",
    settings: dict[str, Any] | None = None,
) -> Path:
    """A run whose trained model has these values for its two prompts; the base model has 0.4 and 0.5 of both metrics."""
    phases = {
        "base": _evaluation(prompts, (0.4, 0.5), (0.4, 0.5)),
        "final": _evaluation(prompts, reward, lgmd),
    }
    run = {"id": folder.name, "objective": objective, "sampler": "independent", "backbone": "tiny", "task": "ocr"}
    result = Result(
        run=RunInfo(**run, seed=seed, preset="quick", started="2026-01-01T00:00:00+00:00", iterations=2, status="complete"),
        budget=Budget(model_rows_rollout=100, model_rows_train=rows - 100, reward_calls=9, seconds=2.5),
        metrics=metric_changes(phases["base"], phases["final"]),
        alarms=[],
        checks={},
        protocol=Protocol(
            prompts=2, images_per_prompt=1, steps=steps, guidance=1.0, weights="ema", noise_seed=5, evals={"ocr": {}}
        ),
        environment={"python": "3.11", "torch": torch, "command": f"alignbench run --seed {seed}"},
        config={"objective": {"name": objective, **(settings or {})}, "seed": seed, "iterations": 2, "budget": {}},
    )
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(result.model_dump_json(), encoding="utf-8")
    table = pd.concat([found.table.assign(phase=phase) for phase, found in phases.items()], ignore_index=True)
    table.to_parquet(folder / "evals.parquet", index=False)
    curves = pd.DataFrame({"iteration": [0, 1], "reward": [0.1, 0.2], "rollout_lgmd": [0.3, 0.2]})
    curves.assign(model_rows=[75, 150], seconds=[1.0, 1.5]).to_parquet(folder / "metrics.parquet", index=False)
    return folder


def write_comparison(folder: Path, cells: list[dict[str, Any]], command: str = "alignbench compare", **grid: Any) -> None:
    """The record of a comparison of runs in `folder/runs`, as version 0.1 left it, but for keys that are given.

    Args:
        cells: what differs from a complete cell `tmpo x independent` of seed 1.
        grid: keys of the grid.
    """
    usual = {"objective": "tmpo", "sampler": "independent", "task": "ocr", "seed": 1, "status": "complete", "error": None}
    axes = {"objectives": ["tmpo"], "samplers": ["independent"], "tasks": ["ocr"], "seeds": [1]}
    limits = {"model_rows": 150, "reward_calls": None, "seconds": None}
    record = {
        "schema_version": 1,
        "command": command,
        "grid": {**axes, "backbone": "tiny", "preset": "quick", "budget": limits, "threads": 1, "settings": {}, **grid},
        "cells": [{**usual, **cell} for cell in cells],
    }
    (folder / "comparison.json").write_text(json.dumps(record), encoding="utf-8")


def _evaluation(prompts: tuple[str, str], reward: tuple[float, float], lgmd: tuple[float, float]) -> Evaluation:
    rows = [
        (p, prompts[p], 0 if metric == "ocr" else -1, metric, values[p])
        for metric, values in (("ocr", reward), ("lgmd", lgmd))
        for p in range(2)
    ]
    table = pd.DataFrame(rows, columns=["prompt_index", "prompt", "image", "metric", "value"])
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    return Evaluation(table, images, list(prompts), {"ocr": True, "lgmd": True}, {"ocr": "reward", "lgmd": "judge"})
