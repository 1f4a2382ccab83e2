import numpy as np
import pandas as pd
import pytest

from alignbench import evaluation as judging
from alignbench.evaluation import Evaluation, alarms, compare, path_kl, with_measured
from alignbench.executor import rollout
from alignbench.plan import Plan, Step
from alignbench.record import Estimate, MetricRecord
from alignbench.terms import EdgeRows, edge_terms
from tests.toys import PROMPTS, ToyBackbone


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


@pytest.mark.parametrize("higher", [True, False])
def test_no_alarm_where_a_judge_may_have_fallen_by_chance(higher: bool) -> None:
    change = (-0.1, -0.3, 0.1) if higher else (0.1, -0.1, 0.3)
    assert alarms({"reward": metric((0.2, 0.1, 0.3), "reward"), "judge": metric(change, "judge", higher)}, ["reward"]) == []


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


def test_the_base_model_is_at_no_distance_from_itself() -> None:
    assert path_kl(ToyBackbone(), PROMPTS, 5).tolist() == [0.0, 0.0]


def test_path_kl_is_the_mean_log_ratio_of_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = 4000
    monkeypatch.setattr(judging, "PATHS", paths * len(PROMPTS))
    policy = ToyBackbone()
    policy.nudge(0.1)
    found = path_kl(policy, PROMPTS, 5)
    # By definition KL = E log(p / p_ref); here over other paths, from their densities under both models.
    plan = Plan((*[Step("sde", judging.PATH_NOISE)] * (judging.PATH_STEPS - 1), Step()), roots=paths)
    forest = rollout(policy, PROMPTS, plan, seed=6, reduction="sum")
    rows = EdgeRows.of(forest)
    with policy.reference():
        reference = policy.velocity(rows.x, rows.sigma, policy.encode(PROMPTS), rows.group)
    log_ratio = forest.path_sum(forest.old_log_prob - edge_terms(rows, forest.row_velocity, reference)["log_prob_reference"])
    error = log_ratio.std(1) / paths**0.5
    assert (log_ratio.mean(1) / error > 10).all()
    np.testing.assert_array_less(abs(found - log_ratio.mean(1).numpy()), 4 * error.numpy())


def test_path_kl_grows_with_the_distance_and_does_not_depend_on_the_micro_batch() -> None:
    policy = ToyBackbone()
    policy.nudge(0.01)
    near = path_kl(policy, PROMPTS, 5)
    np.testing.assert_allclose(path_kl(policy, PROMPTS, 5, micro_batch=7), near, rtol=1e-3)  # differences of float32
    policy.nudge(0.1)
    assert (path_kl(policy, PROMPTS, 5) > near).all()


def test_a_metric_of_the_model_itself_is_one_more_row_a_prompt() -> None:
    base = with_measured(Evaluation(*_two_prompts()), "path_kl", np.zeros(2))
    final = with_measured(Evaluation(*_two_prompts()), "path_kl", np.array([1.0, 3.0]))
    found = compare(base, final)["path_kl"]
    assert (found.base.value, found.final.value, found.difference.value, found.higher_is_better) == (0.0, 2.0, 2.0, None)


def _two_prompts() -> tuple[pd.DataFrame, np.ndarray, list[str], dict[str, bool | None], dict[str, str]]:
    plain = evaluation({"reward": [[0.0], [1.0]]})
    return plain.table, plain.images, ["a", "b"], plain.directions, plain.roles
