"""Stop rules on hand-made curves, and runs that they end: recorded, resumed, restored and within a budget."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from alignbench import UserError, run
from alignbench.config.run_config import RunConfig, load_config
from alignbench.evaluation.curve import by_prompt, read_curve
from alignbench.records.record import Result, read_result
from alignbench.training.checkpoint import policy_weights
from alignbench.training.length import StopRules
from alignbench.training.run_evaluation import RunEvaluator
from alignbench.training.trainer import Trainer
from tests.support.plugins import toy_config, write_task

DIRECTIONS: dict[str, bool | None] = {"judge": True, "error": False, "diversity": True, "path_kl": None}
EVERY_TWO: Any = {"prompts": 6, "images_per_prompt": 3, "steps": 4, "every": 2, "validation_images": 3}


def rules(directions: dict[str, bool | None] = DIRECTIONS, **keys: Any) -> StopRules:
    best_by = keys.pop("best_by", None)
    options = {"stop": keys, "best_by": best_by, "evaluation": {"every": 10}}
    return StopRules(load_config(options=options), directions)


def points(**metrics: list[float]) -> pd.DataFrame:
    count = len(next(iter(metrics.values())))
    return pd.DataFrame({"iteration": [10 * i for i in range(count)], "path_kl": [0.0] * count, **metrics})


def test_patience_counts_evaluations_since_the_best_one() -> None:
    two = rules(patience=2, metric="judge")
    assert two.broken(points(judge=[0.1, 0.5, 0.4])) is None
    found = two.broken(points(judge=[0.1, 0.5, 0.4, 0.5]))  # equal is no new best
    assert found is not None
    assert (found.rule, found.iteration, found.metric, found.value, found.limit, found.names) == (
        *("patience", 30, "judge", 0.5, 0.5, 10),
    )
    assert two.broken(points(judge=[0.1, 0.5, 0.4, 0.6])) is None


def test_patience_follows_lower_is_better_and_skips_missing_values() -> None:
    one = rules(patience=1, metric="error")
    assert one.broken(points(error=[0.9, 0.5, 0.4])) is None
    rising = one.broken(points(error=[0.4, 0.5]))
    assert rising is not None
    assert rising.names == 0
    assert one.broken(points(error=[np.nan, np.nan])) is None
    missing = one.broken(points(error=[0.4, np.nan]))
    assert missing is not None
    assert missing.value is None


def test_a_floor_is_a_share_of_the_base_models_diversity() -> None:
    floor = rules(diversity_metric="diversity", diversity_floor=0.8)
    assert floor.broken(points(diversity=[0.5, 0.4])) is None
    found = floor.broken(points(diversity=[0.5, 0.45, 0.39]))
    assert found is not None
    assert (found.rule, found.iteration, found.value, found.names) == ("diversity_floor", 20, 0.39, 10)
    assert found.limit == pytest.approx(0.4)
    with pytest.raises(UserError, match="is a share of the base model's diversity, which is 0"):
        floor.broken(points(diversity=[0.0, 0.1]))


def test_a_limit_on_path_kl() -> None:
    limit = rules(path_kl=5.0)
    assert limit.broken(points(path_kl=[0.0, 5.0])) is None
    found = limit.broken(points(path_kl=[0.0, 5.0, 5.1]))
    assert found is not None
    assert (found.rule, found.limit, found.names, found.restored) == ("path_kl", 5.0, 10, False)
    assert found.sentence == "stopped by stop.path_kl at iteration 20, where path_kl is 5.1 (its limit is 5)"


def test_the_sentence_of_a_restored_run_names_the_weights() -> None:
    found = rules(patience=1, metric="judge", restore=True).broken(points(judge=[0.5, 0.25]))
    assert found is not None
    assert found.sentence == (
        "stopped by stop.patience at iteration 10, where judge is 0.25 (its best was 0.5 at iteration 0); "
        "the weights are those of iteration 0"
    )


def test_what_a_rule_may_return_to_is_kept() -> None:
    curve = points(judge=[0.1, 0.5, 0.4], diversity=[1.0, 1.0, 1.0])
    both: Any = {"patience": 5, "metric": "judge", "path_kl": 9.0}
    assert rules(**both).may_return_to(curve) == set()
    assert rules(**both, restore=True).may_return_to(curve) == {10, 20}
    assert rules(path_kl=9.0, restore=True).may_return_to(curve) == {20}
    assert rules(best_by="judge").best(curve) == 10
    assert rules(best_by="error").best(points(error=[0.3, 0.1, 0.2])) == 10
    assert rules().best(curve) is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"patience": 2, "metric": "juge"}, "stop.metric: no evaluation has the metric 'juge'.* 'judge'"),
        ({"patience": 2, "metric": "path_kl"}, "stop.metric=path_kl: neither a higher nor a lower path_kl is better"),
        ({"best_by": "path_kl"}, "best_by=path_kl: neither"),
        ({"diversity_metric": "error", "diversity_floor": 0.5}, "a floor needs a metric of which higher is better"),
    ],
)
def test_a_metric_that_cannot_serve_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rules(**keys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": {"path_kl": 3.0}}, "stop reads the evaluations along the training: set evaluation.every"),
        ({"best_by": "lgmd"}, "best_by reads the evaluations along the training: set evaluation.every"),
        ({"stop": {"path_kl": 3.0}, "best_by": "lgmd"}, "stop and best_by read the evaluations"),
        ({"stop": {"patience": 3}}, "stop.patience needs stop.metric as well"),
        ({"stop": {"metric": "lgmd"}}, "stop.metric needs stop.patience as well"),
        ({"stop": {"diversity_floor": 0.5}}, "stop.diversity_floor needs stop.diversity_metric as well"),
        ({"stop": {"restore": True}}, "stop.restore needs a rule"),
        ({"stop": {"diversity_metric": "lgmd", "diversity_floor": 1.5}}, "less than 1"),
    ],
)
def test_incomplete_rules_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(preset="smoke", options=options)


def test_rules_of_a_task_without_validation_prompts_are_refused(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    task.write_text(task.read_text().replace("validation_prompts: validation.txt\n", ""))
    with pytest.raises(UserError, match="stop needs evaluations along the training, and task 'toy' has no validation prompts"):
        run(toy_config(task, evaluation=EVERY_TWO, stop={"path_kl": 1.0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def stopping(task: Path, **stop: Any) -> RunConfig:
    """The path KL passes 0.2 at iteration 6."""
    rule = {"path_kl": 0.2, **stop}
    return toy_config(task, iterations=10, evaluation=EVERY_TWO, stop=rule, ema={"decay": 0.5, "every": 1}, checkpoint_every=1)


def table(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "metrics.parquet").drop(columns="seconds")


def averages(folder: Path, iteration: int) -> dict[str, Any]:
    return load_file(folder / "checkpoints" / f"iteration-{iteration}" / "ema.safetensors")


def test_a_rule_ends_the_run_and_the_record_says_so(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    result = run(stopping(task), tmp_path / "run")
    curve = read_curve(tmp_path / "run")
    assert curve is not None
    iterations, values = by_prompt(curve, "path_kl")
    assert result.stop is not None
    assert iterations[-1] == result.stop.iteration == result.run.iterations < 10
    assert result.stop.value == pytest.approx(values[-1].mean())
    assert (values[:-1].mean(1) <= 0.2).all()
    assert values[-1].mean() > 0.2
    assert result.run.status == "stopped"
    assert read_result(tmp_path / "run") == result
    # The training until then is that of a run without rules.
    plain = toy_config(task, iterations=10, ema={"decay": 0.5, "every": 1})
    run(plain, tmp_path / "plain")
    pd.testing.assert_frame_equal(table(tmp_path / "run"), table(tmp_path / "plain")[: result.run.iterations], check_exact=True)


def test_a_restored_run_has_the_named_weights_and_what_it_spent(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    kept = run(stopping(task), tmp_path / "kept")
    restored = run(stopping(task, restore=True), tmp_path / "restored")
    assert restored.stop is not None
    assert kept.stop is not None
    assert restored.stop == kept.stop.model_copy(update={"restored": True})
    last, named = restored.stop.iteration, restored.stop.names
    assert named == last - 2
    # The same training, stopped earlier, has these weights.
    short = toy_config(task, iterations=named, evaluation=EVERY_TWO, ema={"decay": 0.5, "every": 1})
    shorter = run(short, tmp_path / "short")
    assert all((averages(tmp_path / "restored", last)[k] == v).all() for k, v in averages(tmp_path / "short", named).items())
    assert restored.metrics["brightness"] == shorter.metrics["brightness"]
    assert restored.budget.model_rows_train == kept.budget.model_rows_train > shorter.budget.model_rows_train
    assert len(table(tmp_path / "restored")) == last
    assert policy_weights(tmp_path / "restored" / "checkpoints").iteration == named


def test_a_run_can_return_to_the_base_model(tmp_path: Path) -> None:
    result = run(stopping(write_task(tmp_path), path_kl=1e-6, restore=True), tmp_path / "run")
    assert result.stop is not None
    assert (result.stop.iteration, result.stop.names) == (2, 0)
    assert result.metrics["path_kl"].final.value == 0
    assert result.metrics["brightness"].difference.value == 0


def interrupted_at(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int) -> Any:
    """Replaces a method so that its call of this number is Ctrl-C."""
    original, calls = getattr(owner, name), [0]

    def method(self: Any, *arguments: Any, **keys: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return original(self, *arguments, **keys)

    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize(
    ("owner", "method", "call"),
    [(Trainer, "iterate", 4), (RunEvaluator, "validation", 2), (RunEvaluator, "validation", 3), (Trainer, "return_to", 1),
     (RunEvaluator, "final", 1)],
)  # fmt: skip
def test_an_interrupted_run_comes_to_the_same_stop_and_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, call: int
) -> None:
    config = stopping(write_task(tmp_path), restore=True)
    whole = run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupted_at(patch, owner, method, call)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "broken")
    again = run(config, tmp_path / "broken", resume=True)
    assert whole.stop is not None
    assert again.stop == whole.stop
    assert again.metrics == whole.metrics
    pd.testing.assert_frame_equal(table(tmp_path / "broken"), table(tmp_path / "whole"), check_exact=True)
    last = whole.stop.iteration
    broken, same = (averages(tmp_path / name, last) for name in ("broken", "whole"))
    assert all((broken[key] == value).all() for key, value in same.items())


def test_the_best_checkpoint_by_a_validation_metric_is_kept(tmp_path: Path) -> None:
    config = toy_config(
        write_task(tmp_path), iterations=9, evaluation=EVERY_TWO, best_by="lgmd", checkpoints_kept=1, optimizer={"lr": 0.2}
    )
    run(config, tmp_path / "run")
    curve = read_curve(tmp_path / "run")
    assert curve is not None
    iterations, values = by_prompt(curve, "lgmd")
    best = iterations[int(values.mean(1).argmax())]
    saved = {int(f.name.rpartition("-")[2]) for f in (tmp_path / "run" / "checkpoints").iterdir()}
    assert saved == {best, 9}
    assert policy_weights(tmp_path / "run" / "checkpoints", 10, "lgmd").iteration == best


def test_a_rule_acts_in_a_cell_of_a_comparison_with_a_budget(tmp_path: Path) -> None:
    result: Result = run(
        toy_config(
            write_task(tmp_path), iterations=None, budget={"model_rows": 10_000}, evaluation=EVERY_TWO, stop={"path_kl": 0.2}
        ),
        tmp_path / "run",
    )
    assert result.run.status == "stopped"
    assert result.budget.model_rows_rollout + result.budget.model_rows_train < 10_000


def test_an_objective_that_does_not_train_ignores_the_rules(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path), objective="none", evaluation=EVERY_TWO, stop={"path_kl": 0.2}, best_by="lgmd")
    result = run(config, tmp_path / "run")
    assert (result.stop, result.run.status) == (None, "complete")


def test_a_run_resumed_between_two_evaluations_keeps_what_a_rule_may_return_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_three = {**EVERY_TWO, "every": 3}  # the limit is passed at 6; 3 is what the rule returns to
    config = stopping(write_task(tmp_path), restore=True).model_copy(
        update={"evaluation": type(RunConfig().evaluation)(**every_three), "checkpoints_kept": 1}
    )
    with monkeypatch.context() as patch:
        interrupted_at(patch, Trainer, "iterate", 5)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "run")
    result = run(config, tmp_path / "run", resume=True)  # saves iteration 5 and removes what nothing needs
    assert result.stop is not None
    assert (result.stop.iteration, result.stop.names) == (6, 3)
    assert policy_weights(tmp_path / "run" / "checkpoints").iteration == 3
