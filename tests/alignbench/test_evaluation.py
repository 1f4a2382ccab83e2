import numpy as np
import pandas as pd
import pytest

from alignbench.evaluation import Evaluation, alarms, compare
from alignbench.record import Estimate, MetricRecord


def evaluation(values: dict[str, list[list[float]]]) -> Evaluation:
    """From metric -> prompts x images."""
    rows = [
        (p, f"prompt {p}", i, metric, value)
        for metric, prompts in values.items()
        for p, images in enumerate(prompts)
        for i, value in enumerate(images)
    ]
    table = pd.DataFrame(rows, columns=["prompt_index", "prompt", "image", "metric", "value"])
    directions: dict[str, bool | None] = dict.fromkeys(values, True)
    roles = {m: "reward" if m == "reward" else "judge" for m in values}
    return Evaluation(table, np.zeros((0, 1, 1, 3), np.uint8), [], directions, roles)


def metric(difference: tuple[float, float, float], role: str, higher: bool | None = True) -> MetricRecord:
    estimates = [Estimate(value=v, lower=v, upper=v, n=9) for v in (0.5, 0.5 + difference[0])]
    value, lower, upper = difference
    change = Estimate(value=value, lower=lower, upper=upper, n=9)
    return MetricRecord(base=estimates[0], final=estimates[1], difference=change, higher_is_better=higher, role=role)


def test_prompts_are_the_units_and_differences_are_paired() -> None:
    base = evaluation({"reward": [[0.0, 1.0], [1.0, 1.0]]})
    final = evaluation({"reward": [[1.0, 1.0], [1.0, 0.0]]})
    found = compare(base, final)["reward"]
    # Prompt means 0.5 and 1.0 become 1.0 and 0.5.
    assert (found.base.value, found.final.value, found.difference.value) == (0.75, 0.75, 0.0)
    assert found.base.n == 2
    assert (found.difference.lower, found.difference.upper) == (-0.5, 0.5)


def test_a_prompt_without_any_score_is_left_out() -> None:
    base = evaluation({"reward": [[np.nan, np.nan], [0.25, 0.75], [0.5, np.nan]]})
    found = compare(base, base)["reward"]
    assert found.base.n == 2
    assert found.base.value == 0.5


def test_no_alarm_where_nothing_fell() -> None:
    assert alarms({"reward": metric((0.2, 0.1, 0.3), "reward"), "judge": metric((0.0, -0.1, 0.1), "judge")}, ["reward"]) == []


def test_an_alarm_where_the_reward_rose_and_a_judge_fell() -> None:
    found = alarms({"reward": metric((0.2, 0.1, 0.3), "reward"), "judge": metric((-0.2, -0.3, -0.1), "judge")}, ["reward"])
    assert len(found) == 1
    assert "reward rose by 0.200 while judge went from 0.500 to 0.300" in found[0]


def test_where_lower_is_better_a_rise_is_the_alarm() -> None:
    metrics = {"reward": metric((0.2, 0.1, 0.3), "reward"), "black": metric((0.2, 0.1, 0.3), "judge", higher=False)}
    assert len(alarms(metrics, ["reward"])) == 1


def test_metrics_without_a_direction_raise_no_alarm() -> None:
    metrics = {"reward": metric((0.2, 0.1, 0.3), "reward"), "brightness": metric((-0.2, -0.3, -0.1), "judge", higher=None)}
    assert alarms(metrics, ["reward"]) == []


def test_a_reward_that_fell_is_an_alarm_of_its_own() -> None:
    found = alarms({"reward": metric((-0.2, -0.3, -0.1), "reward")}, ["reward"])
    assert found == ["reward fell by 0.200 although it was trained on; a lower learning rate may save the model"]


@pytest.mark.parametrize("bound", ["lower", "upper"])
def test_an_unknown_interval_raises_no_alarm(bound: str) -> None:
    record = metric((0.2, 0.1, 0.3), "reward")
    record.difference = record.difference.model_copy(update={bound: None})
    assert alarms({"reward": record}, ["reward"]) == []
