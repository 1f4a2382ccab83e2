from pathlib import Path

import pandas as pd
import pytest

from alignbench.records.record import Estimate, MetricRecord, read_result
from alignbench.records.tables import read_evals
from alignbench.verification.recomputed import differing_estimates, missing_rows, recomputed
from tests.alignbench.record_folders import write_run


def test_means_are_those_of_the_prompts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", reward=(0.5, 0.7))
    table, result = read_evals(folder), read_result(folder)
    assert table is not None
    ocr = recomputed(table, result)["ocr"]
    # Base 0.4 and 0.5, trained 0.5 and 0.7.
    assert (ocr.base.value, ocr.final.value, ocr.difference.value) == pytest.approx((0.45, 0.6, 0.15))
    assert list(missing_rows(table, result, folder)) == list(differing_estimates(table, result, folder)) == []


def test_without_final_rows_the_trained_model_is_the_base_model(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    table = read_evals(folder)
    assert table is not None
    ocr = recomputed(table[table["phase"] == "base"], read_result(folder))["ocr"]
    assert (ocr.final.value, ocr.difference.value) == pytest.approx((0.45, 0.0))


def test_an_overall_metric_is_the_mean_of_its_parts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    result = read_result(folder)
    rows = [
        ("base", "scene_one", 0, 0.25),
        ("base", "scene_two", 1, 0.75),
        ("final", "scene_one", 0, 1.0),
        ("final", "scene_two", 1, 0.5),
    ]
    frame = pd.DataFrame(rows, columns=["phase", "metric", "prompt_index", "value"]).assign(prompt="p", image=0)
    nothing = Estimate(value=None, lower=None, upper=None, n=0)
    record = MetricRecord(base=nothing, final=nothing, difference=nothing, higher_is_better=True, role="part")
    metrics = {"scene_one": record, "scene_two": record, "scene_overall": record.model_copy(update={"role": "judge"})}
    found = recomputed(frame, result.model_copy(update={"metrics": metrics}))["scene_overall"]
    assert (found.base.value, found.final.value) == pytest.approx((0.5, 0.75))


def test_rounding_of_another_library_is_no_difference_and_more_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    table, result = read_evals(folder), read_result(folder)
    assert table is not None
    rounded = table.assign(value=table["value"] * (1 + 1e-13))
    assert list(differing_estimates(rounded, result, folder)) == []
    altered = table.assign(value=table["value"] * (1 + 1e-7))
    assert len(list(differing_estimates(altered, result, folder))) > 0
