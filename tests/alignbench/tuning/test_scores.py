"""Scores of trials from records made by hand; base models have a reward and an lgmd of 0.45."""

from pathlib import Path

import pandas as pd
import pytest

from alignbench import UserError
from alignbench.records.record import MetricRecord, read_result, write_result
from alignbench.tasks import load_task
from alignbench.tuning.scores import Scores, score_runs
from tests.alignbench.record_folders import write_run


def two_runs(folder: Path) -> list[Path]:
    """Rewards of 0.6 and 0.5, lgmd of 0.2 and 0.4."""
    first = write_run(folder / "a", reward=(0.5, 0.7), lgmd=(0.1, 0.3))
    return [first, write_run(folder / "b", reward=(0.5, 0.5), lgmd=(0.3, 0.5))]


def scores(folders: list[Path], select: str) -> Scores:
    return score_runs(folders, select, {"ocr": 1.0}, standardise=True)


def test_the_reward_is_the_mean_of_the_trained_model(tmp_path: Path) -> None:
    found = scores(two_runs(tmp_path), "reward")
    assert list(found.by_run.values()) == pytest.approx([0.6, 0.5])
    assert found.meaning == "mean validation reward (ocr)"


def test_the_hypervolume_is_the_gain_times_the_diversity_above_the_least(tmp_path: Path) -> None:
    found = scores(two_runs(tmp_path), "hypervolume")
    assert list(found.by_run.values()) == pytest.approx([0.15 * 0.0, 0.05 * 0.2])


def test_further_metrics_of_the_rewards_eval_are_no_rewards(tmp_path: Path) -> None:
    """`ocr` measures the share of exact texts as well, which has the role of a reward and is not trained on."""
    folders = two_runs(tmp_path)
    for folder in folders:
        result = read_result(folder)
        result.metrics["ocr_exact"] = result.metrics["ocr"]
        write_result(result, folder)
    assert list(scores(folders, "reward").by_run.values()) == pytest.approx([0.6, 0.5])
    assert list(scores(folders, "hypervolume").by_run.values()) == pytest.approx([0.15 * 0.0, 0.05 * 0.2])


def test_a_metric_scores_by_its_own_direction(tmp_path: Path) -> None:
    folders = two_runs(tmp_path)
    assert list(scores(folders, "lgmd").by_run.values()) == pytest.approx([0.2, 0.4])
    for folder in folders:
        result = read_result(folder)
        result.metrics["lgmd"].higher_is_better = False
        write_result(result, folder)
    assert list(scores(folders, "lgmd").by_run.values()) == pytest.approx([-0.2, -0.4])


def test_several_rewards_are_gains_in_units_of_the_base_models_deviation(tmp_path: Path) -> None:
    weights = load_task("mixed").weights
    folder = write_run(tmp_path / "a", reward=(0.5, 0.7))
    result = read_result(folder)
    ocr = result.metrics["ocr"]
    pickscore = ocr.model_copy(
        update={
            "base": ocr.base.model_copy(update={"value": 20.0}),
            "final": ocr.final.model_copy(update={"value": 21.0}),
        }
    )
    result.metrics["pickscore"] = MetricRecord.model_validate(pickscore.model_dump())
    write_result(result, folder)
    base = [("ocr", 0, [0.3, 0.5]), ("ocr", 1, [0.4, 0.6]), ("pickscore", 0, [18.0, 22.0]), ("pickscore", 1, [18.0, 22.0])]
    rows = [
        {"prompt_index": p, "prompt": str(p), "image": i, "metric": metric, "value": value, "phase": "base"}
        for metric, p, values in base
        for i, value in enumerate(values)
    ]
    pd.DataFrame(rows).to_parquet(folder / "evals.parquet", index=False)
    standardised = score_runs([folder], "reward", weights, standardise=True)
    assert standardised.by_run[folder] == pytest.approx(0.15 / 0.1 + 1.0 / 2.0)  # deviations 0.1 and 2
    assert score_runs([folder], "reward", weights, standardise=False).by_run[folder] == pytest.approx(0.6 + 21.0)


@pytest.mark.parametrize(
    ("select", "says"),
    [("lgdm", "no trial has a metric 'lgdm'; did you mean 'lgmd'?"), ("log_z", "neither a higher nor a lower value")],
)
def test_a_metric_that_cannot_choose_is_refused(select: str, says: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    result = read_result(folder)
    result.metrics["log_z"] = result.metrics["lgmd"].model_copy(update={"higher_is_better": None})
    write_result(result, folder)
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        scores([folder], select)


def test_the_hypervolume_needs_a_metric_of_diversity(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    result = read_result(folder)
    del result.metrics["lgmd"]
    write_result(result, folder)
    with pytest.raises(UserError, match="needs a metric of diversity, and the task has none"):
        scores([folder], "hypervolume")
