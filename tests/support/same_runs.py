"""Compares two runs, except for the order in which numbers are added."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

ROUNDING = 2e-5
"""Of sums of some hundred float32 numbers of size one in another order, through six updates."""
CALM = {"lr": 0.01, "eps": 1e-3}
"""Adam divides a gradient by its size; a larger eps keeps it from making a step of what is rounding alone."""


def weights(out: Path, name: str = "weights") -> dict[str, Tensor]:
    newest = max((out / "checkpoints").iterdir(), key=lambda p: int(p.name.rpartition("-")[2]))
    return load_file(newest / f"{name}.safetensors")


def table(out: Path) -> pd.DataFrame:
    """The metrics of a run without wall-clock times."""
    frame = pd.read_parquet(out / "metrics.parquet")
    return frame[[c for c in frame.columns if not c.startswith("seconds")]]


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found


def assert_same_but_for_rounding(one: Path, several: Path, tolerance: float = ROUNDING) -> None:
    ours, theirs = (pd.read_parquet(out / "metrics.parquet").drop(columns="splits") for out in (one, several))
    timeless = [c for c in ours.columns if not c.startswith("seconds")]
    np.testing.assert_allclose(theirs[timeless], ours[timeless], rtol=tolerance, atol=tolerance, err_msg=one.name)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(several)[name], tensor, rtol=0, atol=tolerance)
    ours_spent, theirs_spent = record(one)["budget"], record(several)["budget"]
    for key in ("model_rows_rollout", "model_rows_train", "replay_rows", "decoded", "reward_calls", "failed_scores"):
        assert theirs_spent[key] == ours_spent[key], key
    assert record(several)["checks"]["first_update_ratio_abs_dev_max"] < 1e-5
    evals = [pd.read_parquet(out / "evals.parquet") for out in (one, several)]
    columns = ["phase", "metric", "prompt_index", "image"]
    before, after = (e.sort_values(columns, ignore_index=True) for e in evals)
    assert (before[[*columns, "prompt"]] == after[[*columns, "prompt"]]).all().all()
    # An image's level is one of 256: one that is nearly between two may fall on the other side.
    np.testing.assert_allclose(after.value, before.value, atol=0.02)
