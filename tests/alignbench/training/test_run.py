import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from alignbench import RunError, UserError, load_objective, load_sampler, run
from alignbench.backbone import BackboneSettings
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.records.record import Result, read_result
from alignbench.tasks import load_task
from alignbench.training.collector import Collector
from alignbench.training.progress import Silent
from alignbench.training.trainer import Trainer
from alignbench.training.updater import Updater
from tests.support.pairs import in_turn
from tests.support.plugins import ToyPolicy, toy_config, write_task
from tests.support.same_runs import table

OBJECTIVES = [
    *("tmpo", "grpo", "ddpo", "dpo", "flowrl", "gardo", "nft", "ppo", "raft", "vargrad", "ftb", "subtb"),
    *("awm", "dgpo", "ram", "crd", "diffusion_nft"),
]
LEARNING: dict[str, Any] = {
    "flowrl": {},
    "gardo": {"clip": 0.01},
    "nft": {"draws": 4},
    "ppo": {"clip": 0.01},
    "tmpo": {"beta_warmup": 0},
    "grpo": {"clip": 0.01},
    "ddpo": {"clip": 0.01},
    "dpo": {"pairs": "all", "draws": 4},
    "raft": {"draws": 4},
    "vargrad": {},
    "ftb": {},
    "subtb": {},
    "awm": {"draws": 4},
    "dgpo": {"draws": 4},
    "ram": {"draws": 4},
    "crd": {"draws": 4},
    "diffusion_nft": {"draws": 4},
}
"""Settings under which each objective learns the toy within forty iterations."""
TREE: dict[str, Any] = {"steps": 4, "levels": 2, "children": 2, "splits": [1, 2]}
SAMPLERS: list[Any] = [
    {"name": "independent", "steps": 4, "group_size": 4},
    {"name": "fixed_tree", **TREE},
    {"name": "dynamic_tree", "steps": 6, "levels": 2, "children": 2, "early": [1, 2], "late": [2, 4]},
]
DRAWN = in_turn(["tmpo", "grpo", "ppo", "dpo", "nft", "ftb"], [sampler["name"] for sampler in SAMPLERS])
"""Pairs whose plots are drawn, which takes ten times as long as training them. A plot reads a table, and an objective can only
add columns to it: of whole paths, steps, a value network, pairs, a behaviour policy, and parameters of its own."""


class Listening(Silent):
    """Keeps the warnings of a run."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, text: str) -> None:
        self.told.append(text)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s["name"])
def test_every_pair_runs_and_leaves_a_whole_folder(tmp_path: Path, objective: str, sampler: Any) -> None:
    drawn = (objective, sampler["name"]) in DRAWN
    result = run(toy_config(write_task(tmp_path), objective=objective, sampler=sampler, save_images=drawn), tmp_path / "run")
    written = {str(f.relative_to(tmp_path / "run")) for f in (tmp_path / "run").rglob("*") if f.is_file()}
    assert {
        "config.yaml", "result.json", "metrics.parquet", "evals.parquet",
        "checkpoints/iteration-3/weights.safetensors", "checkpoints/iteration-3/state.json",
    } <= written  # fmt: skip
    images = {
        "samples/base.png", "samples/final.png", "samples/before_after.png",
        "plots/curves.png", "plots/diagnostics.png", "plots/changes.png", "plots/tree.png",
    }  # fmt: skip
    assert images & written == (images if drawn else set())
    assert not [f for f in written if "partial" in f]
    assert read_result(tmp_path / "run") == result
    assert result.run.status == "complete"
    assert result.checks["first_update_ratio_abs_dev_max"] == pytest.approx(0, abs=1e-5)


def test_the_record_counts_what_was_spent(tmp_path: Path) -> None:
    result = run(toy_config(write_task(tmp_path)), tmp_path / "run")
    # A tree of 2 x 2 leaves over 4 steps with splits at 1 and 2: 1 + 1 + 2 + 4 rows, 1 + 2 distinct parents.
    assert result.budget.model_rows_rollout == 3 * 2 * 8
    assert result.budget.model_rows_train == result.budget.replay_rows == 3 * 2 * 3
    assert result.budget.decoded == result.budget.reward_calls == 3 * 2 * 4
    assert result.budget.optimizer_steps == 3
    assert list(table(tmp_path / "run")["model_rows"]) == [22, 44, 66]


@pytest.mark.parametrize(("objective", "passes"), [("tmpo", 1 + 2), ("grpo", 1 + 1), ("raft", 2 + 2)])
def test_rows_that_are_evaluated_twice_are_paid_for_twice(tmp_path: Path, objective: str, passes: int) -> None:
    """Of two updates in microbatches, the first is known from the rollout; raft asks about rows of its own."""
    config = toy_config(write_task(tmp_path), objective={"name": objective}, micro_batch=2, updates_per_rollout=2)
    budget = run(config, tmp_path / "run").budget
    assert 2 * budget.model_rows_train == passes * budget.replay_rows


def test_the_same_seed_gives_the_same_table_and_another_seed_another(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(toy_config(task, seed=seed), tmp_path / name)
    pd.testing.assert_frame_equal(table(tmp_path / "a"), table(tmp_path / "b"), check_exact=True)
    assert not table(tmp_path / "a")["reward"].equals(table(tmp_path / "c")["reward"])


@pytest.mark.parametrize(("objective", "sampler"), in_turn(OBJECTIVES, SAMPLERS), ids=str)
def test_the_reward_rises_beyond_its_interval(tmp_path: Path, objective: str, sampler: Any) -> None:
    """Each objective learns, with one of the samplers; its gradient is exact with every sampler (`test_engine`)."""
    settings: Any = {"name": objective, **LEARNING[objective]}
    config = toy_config(
        write_task(tmp_path), objective=settings, sampler=sampler, iterations=40, prompts_per_iteration=5,
        optimizer={"lr": 0.02, "weight_decay": 0.0},
    )  # fmt: skip
    change = run(config, tmp_path / "run").metrics["brightness"].difference
    assert change.lower is not None
    assert change.lower > 0


def test_without_iterations_nothing_changes(tmp_path: Path) -> None:
    result = run(toy_config(write_task(tmp_path), iterations=0), tmp_path / "run")
    assert all(m.difference.value == 0 for m in result.metrics.values())


def test_a_budget_ends_the_run(tmp_path: Path) -> None:
    result = run(toy_config(write_task(tmp_path), iterations=50, budget={"model_rows": 44}), tmp_path / "run")
    assert result.run.status == "budget spent"
    assert result.run.iterations == 2


def test_averaged_weights_are_judged_and_the_live_ones_saved(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    result = run(toy_config(write_task(tmp_path), ema={"decay": 0.5, "every": 1}), tmp_path / "run")
    assert result.protocol.weights == "ema"
    folder = tmp_path / "run" / "checkpoints" / "iteration-3"
    live, average = load_file(folder / "weights.safetensors"), load_file(folder / "ema.safetensors")
    assert live["inner.weight"].shape == average["0"].shape
    assert not np.allclose(live["inner.weight"], average["0"])


def test_a_taken_folder_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        run(toy_config(write_task(tmp_path)), tmp_path / "run")
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_more_evaluation_prompts_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 6 evaluation prompts"):
        run(toy_config(write_task(tmp_path), evaluation={"prompts": 7}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_scorer_that_dies_stops_the_run_and_what_was_measured_stays(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"brightness.*iteration 2.*server is gone"):
        run(toy_config(write_task(tmp_path, "Dying")), tmp_path / "run")
    assert len(pd.read_parquet(tmp_path / "run" / "metrics.parquet")) == 2
    assert not (tmp_path / "run" / "result.json").exists()


def test_parts_that_are_scored_beside_a_rollout_change_nothing(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    tables = []
    for overlap in (1, 3):
        result = run(toy_config(task, overlap=overlap, prompts_per_iteration=4), tmp_path / str(overlap))
        found = table(tmp_path / str(overlap))
        tables.append(found[[c for c in found.columns if not c.startswith("ratio")]])  # rounding itself
        assert (result.budget.reward_calls, result.budget.failed_scores) == (3 * 4 * 4, 0)
    # float32 sums of other batch sizes, in gradients that are then divided by their own size.
    pd.testing.assert_frame_equal(tables[0], tables[1], rtol=1e-3)


def test_a_part_is_scored_while_the_next_is_rolled_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config(write_task(tmp_path), overlap=2)
    task, policy = load_task(config.task), ToyPolicy(BackboneSettings())
    judges = MetricSuite(task)
    trainer = Trainer(config, task.train_prompts, policy, load_objective("grpo"), load_sampler("fixed_tree", **TREE), judges)
    scoring, rolling, velocity = threading.Event(), threading.Event(), policy.velocity

    def watched_velocity(*arguments: Any) -> torch.Tensor:
        if policy.calls >= 4 and not rolling.is_set():  # the second part
            assert scoring.wait(60)
            rolling.set()
        return velocity(*arguments)

    def watched_score(images: np.ndarray, prompts: list[str]) -> np.ndarray:
        scoring.set()
        assert rolling.wait(60)
        return np.linspace(0, 1, len(prompts))

    monkeypatch.setattr(policy, "velocity", watched_velocity)
    monkeypatch.setattr(judges.rewards["brightness"], "score", watched_score)
    assert trainer.iterate()["reward"] == pytest.approx(0.5)


def test_a_scorer_that_hangs_beside_a_rollout_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(MetricSuite, "score", lambda *arguments, **named: never.wait(60))
    with pytest.raises(RunError, match=r"took more than 0.2 s in iteration 0; .* raise scorer_timeout"):
        run(toy_config(write_task(tmp_path), overlap=2, scorer_timeout=0.2), tmp_path / "run")
    never.set()


def test_a_scorer_that_dies_beside_a_rollout_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"brightness.*iteration 1.*server is gone"):
        run(toy_config(write_task(tmp_path, "Dying"), overlap=2), tmp_path / "run")
    assert len(pd.read_parquet(tmp_path / "run" / "metrics.parquet")) == 1


@pytest.mark.parametrize(("scorer", "constant"), [("Constant", r"0\.5"), ("NearlyConstant", r"0\.95")])
def test_a_scorer_that_answers_one_constant_up_to_rounding_stops_the_run(tmp_path: Path, scorer: str, constant: str) -> None:
    with pytest.raises(RunError, match=f"{constant} for all 18 images"):
        run(toy_config(write_task(tmp_path, scorer)), tmp_path / "run")


def test_a_reward_in_units_too_large_to_be_standardised_is_told(tmp_path: Path) -> None:
    for scorer, expected in (("Faint", 1), ("Brightness", 0)):
        (tmp_path / scorer).mkdir()
        console = Listening()
        run(toy_config(write_task(tmp_path / scorer, scorer), iterations=1), tmp_path / scorer / "run", console=console)
        assert len([text for text in console.told if "give it in larger units" in text]) == expected


def test_a_scorer_with_too_few_answers_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"scores of shape \[17\] for 18 images"):
        run(toy_config(write_task(tmp_path, "Short")), tmp_path / "run")


def test_pictures_that_cannot_be_scored_are_dropped_and_counted(tmp_path: Path) -> None:
    result: Result = run(toy_config(write_task(tmp_path, "Sometimes")), tmp_path / "run")
    assert result.budget.failed_scores == 3 * 3  # each third of eight images, from the first on
    assert list(table(tmp_path / "run")["failed_scores"]) == [3, 3, 3]


def test_a_training_prompt_that_the_reward_refuses_ends_the_run_at_once(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    content = yaml.safe_load(task.read_text()) | {"reward": [{"eval": "geneval"}]}
    (tmp_path / "train.txt").write_text("a red circle\na dog\n")
    (tmp_path / "eval.txt").write_text(
        "\n".join(f"a {color} star" for color in ("red", "blue", "green", "pink", "white", "black"))
    )
    task.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="no metadata for the prompt 'a dog'"):
        run(toy_config(task), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_task_judged_on_its_training_prompts_is_refused(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    (tmp_path / "eval.txt").write_text("eval 0\ntrain 3\n")
    with pytest.raises(UserError, match="train 3"):
        run(toy_config(task), tmp_path / "run")


def test_a_reward_of_weight_zero_is_scored_and_not_trained_on(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    alone = toy_config(task, objective={"name": "gardo", "clip": 0.01}, iterations=1)
    run(alone, tmp_path / "alone")
    data = yaml.safe_load(task.read_text())
    data["reward"].append({"eval": "tests.support.plugins:Sometimes", "label": "doubt", "weight": 0})
    task.write_text(yaml.safe_dump(data))
    result: Result = run(alone, tmp_path / "doubted")
    assert result.budget.reward_calls == 2 * 2 * 4
    assert result.budget.failed_scores == 3  # a missing doubt costs no reward
    row, with_doubt = (table(tmp_path / name).iloc[0] for name in ("alone", "doubted"))
    assert with_doubt["reward"] == row["reward"] == with_doubt["reward_brightness"]
    assert with_doubt["failed_scores"] == 0
    assert np.isfinite(with_doubt["reward_doubt"])


def test_a_task_without_a_weighted_reward_is_refused(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    task.write_text(task.read_text().replace("label: brightness", "label: brightness\n  weight: 0"))
    with pytest.raises(UserError, match="nothing to train on"):
        run(toy_config(task), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_reference_is_refreshed_where_the_policy_has_gone_far(tmp_path: Path) -> None:
    changes: Any = {"objective": {"name": "grpo", "kl_beta": 1.0, "clip": 0.1}, "iterations": 6, "optimizer": {"lr": 0.02}}
    run(toy_config(write_task(tmp_path), **changes), tmp_path / "fixed")
    far = table(tmp_path / "fixed")["kl_reference"]
    limit = float(far[2] + far[3]) / 2
    assert far[2] < limit < far[3]
    both = toy_config(write_task(tmp_path), reference_refresh_kl=limit, reference_refresh=5, **changes)
    run(both, tmp_path / "refreshed")
    kl = table(tmp_path / "refreshed")["kl_reference"]
    # Above the limit for the first time at the start of iteration 3, after which the policy is its own reference.
    assert list(kl[:4]) == list(far[:4])
    # The five iterations to the next refresh count from there.
    assert kl[4] == 0 < kl[5]


def test_an_old_policy_that_lags_draws_the_rollouts_and_follows_by_its_decay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Decays of 0, 0.4 and 0.5 after updates 1, 2 and 3.
    settings: Any = {"name": "nft", "decay_rate": 0.4, "decay_start": 1, "decay_max": 0.5}
    drew, seen = [], []
    drawn, updates = Collector._rollout, Updater.update

    def watched_drawn(self: Collector, *arguments: Any, **named: Any) -> Any:
        velocity = self.policy.velocity

        def noted(*inputs: Any) -> Any:
            drew.append([p.detach().clone() for p in self.policy.parameters()])
            return velocity(*inputs)

        monkeypatch.setattr(self.policy, "velocity", noted)
        forest = drawn(self, *arguments, **named)
        monkeypatch.setattr(self.policy, "velocity", velocity)
        return forest

    def watched_updates(self: Updater, *arguments: Any) -> Any:
        found = updates(self, *arguments)
        seen.append([p.detach().clone() for p in self.policy.parameters()])
        return found

    monkeypatch.setattr(Collector, "_rollout", watched_drawn)
    monkeypatch.setattr(Updater, "update", watched_updates)
    run(toy_config(write_task(tmp_path), objective=settings, iterations=4), tmp_path / "run")
    base = [p.detach() for p in ToyPolicy(BackboneSettings()).parameters()]
    calls = len(drew) // 4
    first, second, third, fourth = drew[::calls]
    for i, start in enumerate(base):
        one, two, three = seen[0][i], seen[1][i], seen[2][i]
        assert torch.equal(first[i], start)
        assert torch.allclose(second[i], one)
        assert torch.allclose(third[i], 0.4 * one + 0.6 * two)
        assert torch.allclose(fourth[i], 0.5 * (0.4 * one + 0.6 * two) + 0.5 * three)
    assert any(not torch.allclose(a, b) for a, b in zip(third, seen[1], strict=True))
    assert list(table(tmp_path / "run")["behaviour_ema_decay"]) == pytest.approx([0, 0.4, 0.5, 0.5])


def test_what_the_objectives_tell_of_themselves_is_in_the_metrics_table(tmp_path: Path) -> None:
    every = {"reward", "reward_std_in_group", "zero_std_ratio", "loss", "grad_norm", "policy_update_norm", "off_policy_share"}
    ratios = {"ratio_abs_dev_first", "ratio_abs_dev_max"}
    own = {
        "tmpo": {
            *("beta", "kl_target_policy", "ess_policy", "ess_target", "policy_term_abs", "target_term_abs"),
            *("advantage_mean", "advantage_abs", "advantage_skew"),
        },
        "grpo": {"advantage_abs", "clip_share"},
        "gardo": {"advantage_abs", "clip_share", "kl_reference", "kl_leaves"},
        "ddpo": {"advantage_abs", "own_statistics_share"},
        "dpo": {"pairs", "implicit_accuracy", "winner_error", "loser_error"},
        "ppo": {"value_mean", "explained_variance"},
        "raft": {"error"},
        "nft": {"positive_error", "negative_error", "distance_reference", "behaviour_ema_decay"},
        "vargrad": {"balance_rms"},
        "ftb": {"alpha", "balance_rms"},
        "subtb": {"balance_rms", "log_flow_mean", "log_flow_std"},
        "flowrl": {"balance_rms", "log_z"},
        "awm": {"likelihood", "distance_reference", "distance_average", "behaviour_ema_decay"},
        "dgpo": {"error", "implicit_accuracy", "loss_weight"},
        "ram": {"target_error"},
        "crd": {"implicit_reward_std", "balance_rms", "distance_reference", "behaviour_ema_decay"},
        "diffusion_nft": {"positive_error", "negative_error", "distance_reference", "behaviour_ema_decay"},
    }
    assert set(own) == set(OBJECTIVES)
    task = write_task(tmp_path)
    for objective, columns in own.items():
        run(toy_config(task, objective=objective, iterations=1), tmp_path / objective)
        found = table(tmp_path / objective)
        assert every | ratios | columns <= set(found.columns), objective
        assert found[sorted(every | columns)].notna().all(axis=None), objective


def test_a_chosen_clip_that_can_never_act_is_told(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    cases: list[tuple[str, dict[str, float], int, int]] = [
        ("grpo", {"clip": 0.01}, 1, 1),
        ("grpo", {"clip": 0.01}, 2, 0),
        ("grpo", {}, 1, 0),  # a default is nobody's choice
        ("raft", {}, 1, 0),
    ]
    for number, (name, settings, updates, expected) in enumerate(cases):
        console = Listening()
        objective: Any = {"name": name, "settings": settings}
        config = toy_config(task, objective=objective, updates_per_rollout=updates, iterations=1)
        run(config, tmp_path / str(number), console=console)
        assert len([text for text in console.told if "clip has no effect" in text]) == expected


def test_a_plan_without_noise_is_refused_by_objectives_on_steps_alone(tmp_path: Path) -> None:
    sampler: Any = {"name": "independent", "steps": 4, "group_size": 4, "stochastic_share": 0}
    task = write_task(tmp_path)
    with pytest.raises(
        UserError, match="objective grpo trains on stochastic steps and the plan of sampler independent has none"
    ):
        run(toy_config(task, objective="grpo", sampler=sampler), tmp_path / "grpo")
    assert not (tmp_path / "grpo").exists()
    result = run(toy_config(task, objective={"name": "nft", "decay_rate": 0}, sampler=sampler), tmp_path / "nft")
    # Two groups of four images, each asked about under the policy and the base model, three times.
    assert result.budget.model_rows_train == 3 * 2 * 8


def test_parts_that_no_step_of_the_sampler_fills_are_refused_before_the_run(tmp_path: Path) -> None:
    objective: Any = {"name": "grpo", "settings": {"parts": 2, "part_by": "step"}}
    with pytest.raises(UserError, match="parts=2 with part_by=step must divide the number of steps"):
        run(toy_config(write_task(tmp_path), objective=objective, sampler="independent"), tmp_path / "grpo")
    assert not (tmp_path / "grpo").exists()


def test_an_objective_on_paths_learns_from_rollouts_without_noise_by_an_elbo(tmp_path: Path) -> None:
    sampler: Any = {"name": "independent", "steps": 4, "group_size": 4, "stochastic_share": 0}
    config = toy_config(
        write_task(tmp_path), objective={"name": "grpo"}, sampler=sampler, likelihood="elbo", iterations=40,
        prompts_per_iteration=5, optimizer={"lr": 0.02, "weight_decay": 0.0},
    )  # fmt: skip
    console = Listening()
    result = run(config, tmp_path / "run", console=console)
    change = result.metrics["brightness"].difference
    assert change.lower is not None
    assert change.lower > 0
    assert result.checks["first_update_ratio_abs_dev_max"] == 0
    assert not [text for text in console.told if "has no effect" in text or "had no gradient" in text]
    # Four steps for each image in a rollout, and four pairs of a sigma and noise in training.
    assert result.budget.model_rows_rollout == result.budget.model_rows_train == 40 * 5 * 4 * 4


def test_an_elbo_without_effect_is_told(tmp_path: Path) -> None:
    console = Listening()
    run(toy_config(write_task(tmp_path), objective="raft", likelihood="elbo", iterations=1), tmp_path / "run", console=console)
    told = "likelihood=elbo has no effect on objective raft, which asks for no log-probabilities of paths"
    assert told in console.told


def test_an_average_that_does_not_draw_leaves_the_rollouts_to_the_policy(tmp_path: Path) -> None:
    """`awm` with a decay of nearly 1: its first two rollouts are those of a run without an average."""
    common: Any = {"name": "awm", "kl_beta": 0.0, "decay_rate": 0.99, "decay_max": 0.99}
    rewards = {}
    for name, changes in (("kept", {"ema_beta": 1e-12}), ("none", {"ema_beta": 0.0}), ("draws", {"ratio": "average"})):
        config = toy_config(write_task(tmp_path), objective={**common, **changes}, iterations=3, optimizer={"lr": 0.1})
        run(config, tmp_path / name)
        rewards[name] = table(tmp_path / name)["reward"].tolist()
    assert rewards["kept"] == pytest.approx(rewards["none"], rel=1e-5)
    assert rewards["draws"][0] == rewards["none"][0]
    assert abs(rewards["draws"][1] - rewards["none"][1]) > 1e-3 * abs(rewards["none"][1])
