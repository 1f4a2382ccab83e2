"""The loop's body; whole runs are in test_run."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from alignbench import RolloutForest, load_objective, load_sampler, rollout
from alignbench.backbone import BackboneSettings
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.rollouts.terms import Terms
from alignbench.tasks import load_task
from alignbench.training import engine, updater
from alignbench.training.checkpoint import policy_weights
from alignbench.training.trainer import Trainer
from tests.support.plugins import ToyPolicy, toy_config, write_task


def two_rewards(folder: Path) -> Path:
    """Brightness, and half of a scorer that gives up on every third image."""
    file = write_task(folder)
    task = yaml.safe_load(file.read_text())
    task["reward"].append({"eval": "tests.support.plugins:Sometimes", "label": "sometimes", "weight": 0.5})
    file.write_text(yaml.safe_dump(task))
    return file


def trainer(task: Path, **changes: Any) -> Trainer:
    """Two groups of four, of five prompts."""
    config = toy_config(task, **changes)
    read = load_task(config.task)
    objective = load_objective(config.objective.name, **config.objective.settings)
    sampler = load_sampler(config.sampler.name, **config.sampler.settings)
    return Trainer(config, read.train_prompts, ToyPolicy(BackboneSettings()), objective, sampler, MetricSuite(read))


def watched(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[RolloutForest]:
    """Where the forests of its iterations are put."""
    seen: list[RolloutForest] = []
    monkeypatch.setattr(trainer.objective, "observe", seen.append)
    return seen


def test_the_average_of_the_weights_is_judged_and_the_live_ones_are_trained(tmp_path: Path) -> None:
    made = trainer(write_task(tmp_path), ema={"decay": 0.5, "every": 1})
    first = [p.detach().clone() for p in made.policy.parameters()]
    made.iterate()
    live = [p.detach().clone() for p in made.policy.parameters()]
    with made.averaged_weights():
        for parameter, start, now in zip(made.policy.parameters(), first, live, strict=True):
            # The first step's decay is min(2 / 11, 0.5).
            torch.testing.assert_close(parameter.detach(), start * 2 / 11 + now * 9 / 11)
            assert not torch.equal(parameter, now)
    assert all(torch.equal(p, now) for p, now in zip(made.policy.parameters(), live, strict=True))


def test_several_rewards_are_standardised_weighted_and_each_paid_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(two_rewards(tmp_path))
    seen = watched(made, monkeypatch)
    row = made.iterate()
    (forest,) = seen
    assert made.budget.reward_calls == row["reward_calls"] == 2 * len(forest.leaves) == 16
    assert made.budget.decoded == 8
    scores = {name: score.view(2, 4).double().numpy() for name, score in forest.scores.items()}
    assert np.isnan(scores["sometimes"]).ravel().nonzero()[0].tolist() == [0, 3, 6]
    z = {
        name: (s - np.nanmean(s, 1, keepdims=True)) / np.maximum(np.nanstd(s, 1, keepdims=True), 1e-4)
        for name, s in scores.items()
    }
    # An image that one of them gave up on has no reward; float32.
    expected = z["brightness"] + 0.5 * z["sometimes"]
    np.testing.assert_allclose(forest.rewards.view(2, 4).numpy(), expected, atol=1e-4)
    assert (row["failed_scores"], made.budget.failed_scores) == (3, 3)


def test_prompts_come_in_shuffles_each_of_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(write_task(tmp_path), iterations=10)
    seen = watched(made, monkeypatch)
    for _ in range(10):
        made.iterate()
    asked = [prompt for forest in seen for prompt in forest.prompts]
    shuffles = [tuple(asked[i : i + 5]) for i in range(0, 20, 5)]
    assert all(sorted(shuffle) == sorted(made.collector.prompts) for shuffle in shuffles)
    assert len(set(shuffles)) > 1


def test_the_cosine_schedule_falls_to_a_tenth_over_the_run(tmp_path: Path) -> None:
    made = trainer(write_task(tmp_path), iterations=4, optimizer={"lr": 0.01, "schedule": "cosine"})
    found = [made.iterate()["lr"] for _ in range(4)]
    # .1 + .45 (1 + cos(pi u)) at u = 0, 1/4, 1/2, 3/4.
    assert found == pytest.approx([0.01, 0.00868198, 0.0055, 0.00231802], rel=1e-5)


def test_the_reference_draws_the_rollouts_where_the_objective_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forests(drawn_by: str, **changes: Any) -> list[RolloutForest]:
        made = trainer(write_task(tmp_path), objective={"name": "dpo", "drawn_by": drawn_by}, **changes)
        found = watched(made, monkeypatch)
        for _ in range(3):
            made.policy.nudge(0.1)  # type: ignore[attr-defined]
            made.iterate()
        return found

    base = ToyPolicy(BackboneSettings())
    for forest in forests("reference"):
        again = rollout(base, forest.prompts, forest.plan, forest.seed, forest.iteration)
        assert torch.equal(forest.states, again.states)
    for forest in forests("policy"):
        assert not torch.equal(forest.states, rollout(base, forest.prompts, forest.plan, forest.seed, forest.iteration).states)
    # One that is refreshed draws from then on.
    same = [
        torch.equal(f.states, rollout(base, f.prompts, f.plan, f.seed, f.iteration).states)
        for f in forests("reference", reference_refresh=2)
    ]
    assert same == [True, True, False]


def test_later_updates_know_the_policy_of_the_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(write_task(tmp_path), objective={"name": "nft", "decay_rate": 0}, updates_per_rollout=3)
    at_rollout = [p.detach().clone() for p in made.policy.parameters()]
    seen: list[Any] = []
    backward = engine.backward

    def watching(*arguments: Any, **named: Any) -> engine.Backward:
        seen.append((named["update"], named["behaviour"]))
        return backward(*arguments, **named)

    monkeypatch.setattr(engine, "backward", watching)
    made.iterate()
    assert [update for update, _ in seen] == [0, 1, 2]
    assert seen[0][1] is None  # the current policy is that of the rollout
    for _, old in seen[1:]:
        assert all(torch.equal(kept, start) for kept, start in zip(old, at_rollout, strict=True))
    assert not torch.equal(next(iter(made.policy.parameters())), at_rollout[0])


def rows_of_an_iteration(made: Trainer, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many rows the policy is evaluated at, beside those of the rollout."""
    rows: list[int] = []
    velocity = made.policy.velocity

    def counted(x: torch.Tensor, *others: Any) -> torch.Tensor:
        rows.append(len(x))
        return velocity(x, *others)

    monkeypatch.setattr(made.policy, "velocity", counted)
    made.iterate()
    return sum(rows) - made.budget.model_rows_rollout


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({}, 0),
        ({"micro_batch": 3}, 1),  # the scored rows do not fit into one microbatch
        ({"overlap": 2}, 1),
        ({"updates_per_rollout": 2}, 1),  # the second update
        ({"objective": {"name": "grpo", "zero_advantage": "drop"}}, 1),  # which rows is known after the rollout
        ({"objective": {"name": "dpo"}}, None),  # its rows are not the rollout's
    ],
)
def test_the_first_update_goes_back_from_the_rollout_where_its_graph_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], again: int | None
) -> None:
    made = trainer(write_task(tmp_path), **({"objective": {"name": "ddpo"}} | changes))
    found = rows_of_an_iteration(made, monkeypatch)
    replayed = made.budget.replay_rows // made.config.updates_per_rollout
    assert replayed > 0
    if again is not None:
        assert found == again * replayed
    else:
        assert found > 0


def test_the_graph_is_dropped_where_the_decoder_runs_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(write_task(tmp_path), objective={"name": "ddpo"})
    decode, failed = made.policy.decode, list[bool]()

    def short_of_memory(latents: torch.Tensor) -> np.ndarray:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("out of memory")
        return decode(latents)

    monkeypatch.setattr(made.policy, "decode", short_of_memory)
    assert rows_of_an_iteration(made, monkeypatch) == made.budget.replay_rows > 0
    assert made.micro_batch.halvings == 1


def test_a_checkpoint_that_names_another_best_one_is_written_again(tmp_path: Path) -> None:
    made = trainer(write_task(tmp_path), best_by="lgmd", evaluation={"prompts": 2, "every": 1}, checkpoints_kept=2)
    made.iterate()
    made.save(tmp_path / "checkpoints")
    made.iterate()
    made.best = 1
    made.save(tmp_path / "checkpoints")
    made.best = 2  # what the evaluation of this iteration finds after the interrupt that saved it
    made.save(tmp_path / "checkpoints")
    assert policy_weights(tmp_path / "checkpoints", best_by="lgmd").iteration == 2


def test_what_completes_an_iteration_is_not_cut_off_by_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(write_task(tmp_path))
    completed: list[dict[str, Any]] = []
    observe = made.objective.observe

    def pressed(forest: RolloutForest) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        observe(forest)

    monkeypatch.setattr(made.objective, "observe", pressed)
    with pytest.raises(KeyboardInterrupt):
        made.iterate(completed.append)
    assert (made.iteration, completed) == (1, made.metrics)


def test_the_largest_deviation_of_the_ratio_is_that_of_all_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, deviations = trainer(write_task(tmp_path), objective="grpo", updates_per_rollout=3), iter([0.0, 0.5, 0.25])

    def log_ratio(terms: Terms, forest: RolloutForest) -> torch.Tensor:
        return torch.log1p(torch.tensor([next(deviations)]))

    monkeypatch.setattr(updater, "log_ratio", log_ratio)
    assert made.iterate()["ratio_abs_dev_max"] == pytest.approx(0.5)
