"""One odd record among good ones costs its own line in the report and nothing else."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from alignbench.comparison.reading import read_results
from alignbench.comparison.results import Results
from alignbench.reports import report
from alignbench.reports.plots import comparison_plots
from tests.alignbench.record_folders import write_run

Damage = Callable[[Path], Any]


def record(**changes: Any) -> Damage:
    """Changes of `result.json`, by keys that `__` parts."""

    def damage(run: Path) -> None:
        data = json.loads((run / "result.json").read_text())
        for path, value in changes.items():
            *parents, last = path.split("__")
            part = data
            for name in parents:
                part = part[name]
            part[last] = value
        (run / "result.json").write_text(json.dumps(data))

    return damage


def table(name: str, **columns: Any) -> Damage:
    file = f"{name}.parquet"
    return lambda run: pd.read_parquet(run / file).assign(**columns).to_parquet(run / file)


def instead(name: str, make: Callable[[Path], Any]) -> Damage:
    def damage(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        make(run / name)

    return damage


def comparison(text: str) -> Damage:
    return lambda run: (run.parent.parent / "comparison.json").write_text(text)


NOTHING = dict.fromkeys(("value", "lower", "upper")) | {"n": 2}
NO_METRIC = {"base": NOTHING, "final": NOTHING, "difference": NOTHING, "higher_is_better": None, "role": "reward"}
LEFT_OUT: dict[str, tuple[Damage, str]] = {
    "older version": (record(schema_version=0), "schema version 0; this alignbench reads 1"),
    "missing key": (record(run={}), "run.id: field required"),
    "config.objective null": (record(config__objective=None), "config.objective: input should be a valid dictionary"),
    "config.budget a text": (record(config__budget="x"), "config.budget: input should be a valid dictionary"),
    "label a number": (record(config__objective={"name": "x", "label": 5}), "label: input should be a valid string"),
    "no images": (record(protocol__images_per_prompt=0), "images_per_prompt: input should be greater than or equal to 1"),
    "large seed": (record(run__seed=10**30), "does not fit into 64 bits"),
    "lone surrogate": (record(run__objective="\ud800"), "not valid Unicode"),
    "deep": (record(environment=json.loads('{"a":' * 90 + "1" + "}" * 90)), "more than 60 levels"),
    "record a pipe": (instead("result.json", os.mkfifo), "not a regular file"),
    "evals a text": (table("evals", value="x"), "'value' should hold numbers"),
    "evals one prompt_index": (table("evals", prompt_index=0), "the same phase, metric, prompt_index and image"),
    "evals prompt a number": (table("evals", prompt=5), "'prompt' should hold texts"),
    "evals a pipe": (instead("evals.parquet", os.mkfifo), "not a regular file"),
    "metrics a text": (table("metrics", iteration="x"), "'iteration' should hold whole numbers"),
    "metrics without a column": (
        lambda run: pd.read_parquet(run / "metrics.parquet").drop(columns="reward").to_parquet(run / "metrics.parquet"),
        "no column 'reward'",
    ),
    "metrics a folder": (instead("metrics.parquet", Path.mkdir), "not a regular file"),
    "comparison of no version": (comparison('{"cells": []}'), "comparison.json has schema version None"),
    "cells null": (
        comparison('{"schema_version": 1, "cells": null, "command": "", "grid": {}}'),
        "is not a record of a comparison",
    ),
    "deep comparison": (comparison("[" * 100_000), "not valid JSON"),
}
SHOWN: dict[str, Damage] = {
    "no value of any metric": record(metrics={"ocr": NO_METRIC, "lgmd": NO_METRIC}),
    "no reward": record(metrics__ocr__role="judge"),
    "near the largest number": record(metrics__ocr__final={"value": 1e308, "lower": -1.7e308, "upper": 1.7e308, "n": 2}),
    "evals near the largest number": table("evals", value=1e308),
    "evals without a value": table("evals", value=np.nan),
    "evals of other phases": table("evals", phase="x", image=range(8)),
    "no evals": lambda run: pd.read_parquet(run / "evals.parquet").iloc[:0].to_parquet(run / "evals.parquet"),
    "no iterations": lambda run: pd.read_parquet(run / "metrics.parquet").iloc[:0].to_parquet(run / "metrics.parquet"),
    "columns of the report's own names": table("metrics", setup=1, cell="x", seed=0.5, training_seconds="x"),
    "empty names": record(run__objective="", run__sampler="", run__task="", run__backbone=""),
    "no environment": record(environment={}),
    "environment of lists": record(environment={"libraries": 5, "command": ["x"], "python": [1, {"a": None}]}),
    "negative budget": record(budget__model_rows_train=-(2**62), budget__seconds=-1e300),
    "base model's name": record(config__objective={"name": "x", "label": "base model"}),
}


def damaged(folder: Path, damage: Damage) -> Results:
    write_run(folder / "runs" / "good", seed=1)
    damage(write_run(folder / "runs" / "odd", seed=2))
    return read_results(folder)


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_plots, "comparison_figures", lambda results, setup: {})


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_cannot_be_read_is_a_line_that_says_why(tmp_path: Path, name: str) -> None:
    damage, why = LEFT_OUT[name]
    results = damaged(tmp_path, damage)
    assert "good" in {run.folder.name for run in results.runs}
    (line,) = results.unreadable
    assert why in line
    assert str(tmp_path) in line


@pytest.mark.usefixtures("without_figures")
def test_the_line_stands_in_the_report(tmp_path: Path) -> None:
    damaged(tmp_path, record(schema_version=0))
    report.write_report(tmp_path)
    for page in ("report.md", "report.html"):
        assert "has schema version 0" in (tmp_path / page).read_text().split("Not in the numbers")[1]


@pytest.mark.usefixtures("without_figures")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SHOWN)
def test_what_can_be_read_is_shown_however_odd(tmp_path: Path, name: str) -> None:
    results = damaged(tmp_path, SHOWN[name])
    report.write_report(tmp_path)
    assert len(results.runs) == 2
    assert results.unreadable == []


@pytest.mark.usefixtures("laid_out")
def test_a_plot_that_cannot_be_drawn_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "r")

    def fails(*_: Any) -> None:
        raise ArithmeticError("no limits")

    monkeypatch.setattr(comparison_plots, "trade_off", fails)
    results = read_results(tmp_path)
    figures = comparison_plots.comparison_figures(results, results.setups[0])
    assert "hypervolume" in figures
    assert "trade_off" not in figures
    assert results.unreadable == ["left out: plot trade_off of ocr on tiny: it cannot be drawn (ArithmeticError: no limits)"]
