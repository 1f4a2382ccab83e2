"""The data term, by numbers computed by hand, and beside any objective."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignbench import UserError, load_backbone, load_objective, run
from alignbench.config.keepers import KeepersConfig
from alignbench.config.run_config import load_config
from alignbench.forecast.expected_rows import model_rows, rows_per_iteration
from alignbench.keepers.data_term import Data, DataTerm, drawn_pool
from alignbench.rollouts.builder import planned_forest
from alignbench.rollouts.plan import Plan, Step
from alignbench.training.engine import backward
from tests.alignbench.training.test_trainer import trainer
from tests.support.plugins import write_task
from tests.support.replays import TRAINING
from tests.support.toys import PROMPTS, ToyBackbone


@pytest.mark.parametrize("objective", TRAINING)
def test_any_objective_carries_every_keeper_at_any_micro_batch(objective: str, tmp_path: Path) -> None:
    keepers = {"cluster_bonus": 0.3, "distance_bonus": 0.2, "data": 0.5, "data_from": "base", "data_images": 5}
    weights = []
    for micro_batch in (None, 3):
        made = trainer(
            write_task(tmp_path),
            objective=objective,
            keepers=keepers,
            micro_batch=micro_batch,
            optimizer={"lr": 1e-3, "eps": 1e-3},
        )
        row = made.iterate()
        assert np.isfinite(row["loss_data"])
        assert row["loss_data"] > 0
        weights.append(torch.cat([p.detach().flatten() for p in made.policy.parameters()]))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)  # one step of 1e-3, of gradients that differ by rounding


# --- the data term


def data_forest() -> Any:
    forest = planned_forest(Plan((Step(), Step(), Step())), 4)
    forest.prompts = [*PROMPTS, *PROMPTS]
    forest.states = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    return forest


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
def test_the_gradient_of_the_data_term_is_that_of_the_weighted_denoising_error(micro_batch: int | None) -> None:
    toy, term, forest = ToyBackbone(), DataTerm(0.25), data_forest()
    rows = term.rows(forest, 2)
    assert sorted(rows.sigma.tolist())[0] > 0
    assert {round(float(s), 4) for s in rows.sigma} <= {1.0, 0.6667, 0.3333}  # the sigmas before the three steps
    v = toy.net(rows.x, rows.sigma, toy.encode(forest.prompts)[rows.group])
    loss = 0.25 * (v - (rows.noise - forest.states)).square().flatten(1).mean(1).mean()
    expected = torch.autograd.grad(loss, list(toy.net.parameters()))
    found = backward(toy, term, forest, update=2, micro_batch=micro_batch)
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(toy.gradient(), torch.cat([g.flatten() for g in expected]), atol=1e-6, rtol=1e-5)


def test_the_data_term_adds_its_gradient_to_the_objectives(tmp_path: Path) -> None:
    gradients = {}
    for weight in (0.0, 0.5):
        keepers = {"data": weight, "data_from": "base", "data_images": 5} if weight else {}
        made = trainer(write_task(tmp_path), objective="grpo", keepers=keepers, optimizer={"max_grad_norm": 1e9})
        made.iterate()
        gradients[weight] = torch.cat([p.grad.flatten() for p in made.policy.parameters() if p.grad is not None])
    data = trainer(write_task(tmp_path), objective="grpo", keepers={"data": 0.5, "data_from": "base", "data_images": 5})
    assert data.updater.data is not None
    forest = data.collector.collect(0, 0.0, data.budget, data.behaviour_weights)
    rows = DataTerm(0.5).rows(data.updater.data.forest(forest, None), 0)
    v = data.policy.net(rows.x, rows.sigma, data.policy.encode(rows.forest.prompts)[rows.group])  # type: ignore[attr-defined]
    loss = 0.5 * (v - (rows.noise - rows.x0)).square().flatten(1).mean(1).mean()
    alone = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(data.policy.parameters()))])
    torch.testing.assert_close(gradients[0.5], gradients[0.0] + alone, atol=1e-6, rtol=1e-5)


def test_data_of_the_base_model_are_its_images_and_their_rows_are_forecast(tmp_path: Path) -> None:
    keepers = {"data": 0.5, "data_from": "base", "data_images": 5}
    for micro_batch in (None, 2):
        made = trainer(write_task(tmp_path), objective="grpo", keepers=keepers, micro_batch=micro_batch, updates_per_rollout=2)
        made.policy.nudge(0.5)  # type: ignore[attr-defined]  # the base model is what it was
        objective = load_objective("grpo")
        forecast = rows_per_iteration(made.config, objective)
        made.iterate()
        # Five images of four steps; trees of 1, 1, 2 and 4 branches for two prompts.
        assert made.budget.model_rows_rollout == 5 * 4 + 2 * (1 + 1 + 2 + 4)
        spent = made.budget.model_rows_rollout + made.budget.model_rows_train
        assert model_rows(made.config, forecast, objective.needs) == spent


def test_data_of_an_iteration_depend_on_the_seed_and_the_iteration_alone(tmp_path: Path) -> None:
    made = trainer(write_task(tmp_path), keepers={"data": 0.5, "data_from": "base", "data_images": 3})
    assert made.updater.data is not None
    forest = made.collector.collect(0, 0.0, made.budget, made.behaviour_weights)
    one = made.updater.data.forest(forest, None).states
    made.policy.nudge(0.5)  # type: ignore[attr-defined]
    assert torch.equal(made.updater.data.forest(forest, None).states, one)
    forest.iteration = 1
    assert not torch.equal(made.updater.data.forest(forest, None).states, one)


def test_drawn_images_need_a_model_that_takes_them(tmp_path: Path) -> None:
    config = load_config(preset="smoke", options={"backbone": "gaussian_mixture", "keepers": {"data": 0.1}})
    with pytest.raises(UserError, match=r"keepers.data_from=drawn: .* keepers.data_from=base serves any model"):
        run(config, tmp_path / "out")


def test_drawn_images_come_with_their_prompts() -> None:
    tiny = load_backbone("tiny")
    data = Data(KeepersConfig(data=0.1, data_images=3), tiny, seed=7)
    rollout = planned_forest(Plan((Step(), Step())), 1)
    made = data.forest(rollout, None)
    assert (made.groups, made.group_size, len(data.prompts)) == (3, 1, 512)
    for prompt, latent in zip(made.prompts, made.leaf_latents, strict=True):
        drawn = tiny.encode_images([example.image for example in drawn_pool(7) if example.prompt == prompt])
        assert float((drawn - latent).flatten(1).abs().amax(1).min()) < 1e-4  # encoded in another batch
