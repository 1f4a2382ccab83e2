from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from alignbench import UserError
from alignbench.evaluation import evaluate as judging
from alignbench.evaluation.alarm import alarms
from alignbench.evaluation.evaluate import Evaluation, MetricSuite, metric_changes, path_kl, with_measured
from alignbench.records.record import Estimate, MetricRecord
from alignbench.rollouts.executor import rollout
from alignbench.rollouts.plan import Plan, Step
from alignbench.rollouts.terms import EdgeRows, edge_terms
from alignbench.statistics import rise_test
from alignbench.tasks import EvalChoice, load_task
from tests.support.plugins import write_task
from tests.support.toys import PROMPTS, ToyBackbone


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


def metric(change: float, p_rise: float | None, role: str, higher: bool | None = True) -> MetricRecord:
    base, final, difference = (Estimate(value=v, lower=v, upper=v, n=9) for v in (0.5, 0.5 + change, change))
    return MetricRecord(base=base, final=final, difference=difference, higher_is_better=higher, role=role, p_rise=p_rise)


def test_prompts_are_the_units_and_differences_are_paired() -> None:
    base = evaluation({"reward": [[0.0, 1.0], [1.0, 1.0]]})
    final = evaluation({"reward": [[1.0, 1.0], [1.0, 0.0]]})
    found = metric_changes(base, final)["reward"]
    # Prompt means 0.5 and 1.0 become 1.0 and 0.5.
    assert (found.base.value, found.final.value, found.difference.value) == (0.75, 0.75, 0.0)
    assert found.base.n == 2
    assert (found.difference.lower, found.difference.upper) == pytest.approx(
        (-6.353102, 6.353102)
    )  # t(0.975, 1) = 12.706205, standard error 0.5
    assert found.p_rise == pytest.approx(0.5)


def test_a_prompt_without_any_score_is_left_out() -> None:
    base = evaluation({"reward": [[np.nan, np.nan], [0.25, 0.75], [0.5, np.nan]]})
    found = metric_changes(base, base)["reward"]
    assert found.base.n == 2
    assert found.base.value == 0.5


def test_no_alarm_where_nothing_fell() -> None:
    assert alarms({"reward": metric(0.2, 0.001, "reward"), "judge": metric(-0.1, 0.9, "judge")}, ["reward"]) == []


@pytest.mark.parametrize("higher", [True, False])
def test_no_alarm_where_a_judge_may_have_fallen_by_chance(higher: bool) -> None:
    judge = metric(-0.1, 0.7, "judge") if higher else metric(0.1, 0.3, "judge", higher=False)
    assert alarms({"reward": metric(0.2, 0.001, "reward"), "judge": judge}, ["reward"]) == []


def test_an_alarm_where_the_reward_rose_and_a_judge_fell() -> None:
    found = alarms({"reward": metric(0.2, 0.001, "reward"), "judge": metric(-0.2, 0.98, "judge")}, ["reward"])
    assert found == ["reward rose by 0.200 while judge went from 0.500 to 0.300"]


def test_where_lower_is_better_a_rise_is_the_alarm() -> None:
    metrics = {"reward": metric(0.2, 0.001, "reward"), "black": metric(0.2, 0.02, "judge", higher=False)}
    assert len(alarms(metrics, ["reward"])) == 1


def test_metrics_without_a_direction_raise_no_alarm_and_do_not_count() -> None:
    metrics = {"reward": metric(0.2, 0.001, "reward"), "judge": metric(-0.2, 0.98, "judge")}
    metrics |= {f"brightness_{i}": metric(-0.2, 1.0, "judge", higher=None) for i in range(9)}
    assert len(alarms(metrics, ["reward"])) == 1


def test_a_judge_counts_for_less_the_more_there_are() -> None:
    # 0.02 alone is below 0.025; the smallest of two is doubled.
    metrics = {"reward": metric(0.2, 0.001, "reward"), "judge": metric(-0.2, 0.98, "judge")}
    assert len(alarms(metrics, ["reward"])) == 1
    assert alarms({**metrics, "other": metric(0.0, 0.5, "judge")}, ["reward"]) == []


def test_so_does_a_reward() -> None:
    metrics = {name: metric(0.2, 0.02, "reward") for name in ("ocr", "pickscore")}
    metrics["judge"] = metric(-0.2, 1.0, "judge")
    assert len(alarms(metrics, ["ocr"])) == 1
    assert alarms(metrics, ["ocr", "pickscore"]) == []


def test_a_reward_that_fell_is_an_alarm_of_its_own() -> None:
    found = alarms({"reward": metric(-0.2, 0.99, "reward")}, ["reward"])
    assert found == ["reward fell by 0.200 although it was trained on; a lower learning rate may save the model"]


def test_what_cannot_be_tested_raises_no_alarm_and_does_not_count() -> None:
    metrics = {"reward": metric(0.2, 0.001, "reward"), "unknown": metric(-0.2, None, "judge")}
    assert alarms(metrics, ["reward"]) == []
    assert len(alarms({**metrics, "judge": metric(-0.2, 0.98, "judge")}, ["reward"])) == 1
    assert alarms({"reward": metric(-0.2, None, "reward")}, ["reward"]) == []


@pytest.mark.parametrize("distribution", ["normal", "skewed", "rare"])
def test_false_alarms_are_as_rare_as_said_however_many_judges_there_are(distribution: str) -> None:
    """Runs that changed nothing: scores before and after have one distribution. The judges depend on one another, as real
    ones do."""
    rng = np.random.default_rng(0)
    runs, judges, prompts = 600, 15, 48

    def draw(*size: int) -> np.ndarray:
        if distribution == "rare":
            return np.asarray(rng.binomial(4, 0.03, size=size) / 4)
        return rng.normal(size=size) if distribution == "normal" else rng.exponential(size=size)

    before, after = (draw(runs, judges, prompts) + draw(runs, 1, prompts) for _ in range(2))
    changes = after - before
    p_rise = [[rise_test([values]) for values in run] for run in changes]
    reward = metric(0.2, 0.0, "reward")
    found = [
        alarms({"reward": reward, **{f"judge {i}": metric(-0.1, p, "judge") for i, p in enumerate(run)}}, ["reward"])
        for run in p_rise
    ]
    share = np.mean([bool(several) for several in found])
    # Three standard deviations of a share of this many runs above the level.
    assert share <= 0.025 + 3 * np.sqrt(0.025 * 0.975 / runs)
    # What is corrected for: uncorrected, every fifth run and more would have raised one.
    assert np.mean(np.max(p_rise, axis=1) > 1 - 0.025) > 0.15


def test_prompts_that_an_eval_would_refuse_are_told_before_anything_is_drawn() -> None:
    rewards = MetricSuite(load_task("geneval"))
    rewards.check_prompts(["a red circle"], ["two stars"])
    for prompts in (["a dog"], []), (["a red circle"], ["a dog"]):
        with pytest.raises(UserError, match="no metadata for the prompt 'a dog'"):
            rewards.check_prompts(*prompts)
    judges = MetricSuite(load_task("quadratic").judged_by([EvalChoice(eval="geneval")]))
    judges.check_prompts(["a red circle"], ["a dog"])  # which it will not see


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
    found = metric_changes(base, final)["path_kl"]
    assert (found.base.value, found.final.value, found.difference.value, found.higher_is_better) == (0.0, 2.0, 2.0, None)


def _two_prompts() -> tuple[pd.DataFrame, np.ndarray, list[str], dict[str, bool | None], dict[str, str]]:
    plain = evaluation({"reward": [[0.0], [1.0]]})
    return plain.table, plain.images, ["a", "b"], plain.directions, plain.roles


def test_two_evals_with_a_metric_of_one_name_keep_their_values_apart(tmp_path: Path) -> None:
    """The reward's label is the name of a metric of `quality`, which measures all channels; version 0.1 averaged the two."""
    judges = MetricSuite(load_task(str(write_task(tmp_path, judges=["quality"]))))
    images = np.zeros((1, 4, 4, 3), np.uint8)
    images[..., 0] = 255
    found = judging.evaluate_images(images, None, ["a red image"], [0], judges)
    values = found.table.set_index("metric")["value"]
    assert values.index.is_unique
    assert values["brightness"] == 1
    # Rec. 601 luma of pure red.
    assert values["brightness_quality"] == pytest.approx(0.299, abs=0.01)
    assert (found.roles["brightness"], found.roles["brightness_quality"]) == ("reward", "judge")
