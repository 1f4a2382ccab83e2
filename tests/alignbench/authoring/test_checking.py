"""The checks hold for what ships, and each finds the plug-in that breaks it."""

import inspect
import json
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from alignbench import Objective, Plan, RolloutForest, Sampler, Settings, Step, load_objective, registry
from alignbench.authoring.checking import (
    LEARNING_RATE,
    OF_THE_OBJECTIVE,
    OF_THE_ROLLOUT,
    CheckResult,
    Subject,
    run_checks,
    subject_of,
)
from alignbench.config.run_config import load_config
from alignbench.rollouts.terms import Terms
from alignbench.tasks import load_task
from tests.support.command_line import in_this_process
from tests.support.replays import TRAINING, small_sampler
from tests.support.toys import PROMPTS, ToyBackbone


def subject(objective: Objective | str = "grpo", sampler: Sampler | None = None, policy: ToyBackbone | None = None) -> Subject:
    def made() -> Objective:
        return load_objective(objective) if isinstance(objective, str) else objective

    plans = sampler or small_sampler("independent")
    return Subject(made, plans, policy or ToyBackbone(), tuple(PROMPTS))


def checked(what: Subject, iterations: int = 0) -> dict[str, CheckResult]:
    return {result.name: result for result in run_checks(what, iterations=iterations, lr=0.02)}


@pytest.mark.parametrize(("objective", "sampler"), product(TRAINING, registry.names("samplers")))
def test_all_that_ships_passes(objective: str, sampler: str) -> None:
    found = checked(subject(objective, small_sampler(sampler)))
    assert list(found) == [*OF_THE_ROLLOUT, *OF_THE_OBJECTIVE]
    assert not [result for result in found.values() if result.holds is False]


def test_learning_is_seen_and_the_policy_is_left_as_it_was() -> None:
    policy = ToyBackbone()
    before = [p.detach().clone() for p in policy.parameters()]
    learning = checked(subject("grpo", policy=policy), iterations=30)["learning"]
    assert learning.holds, learning.detail
    assert all(torch.equal(p, b) for p, b in zip(policy.parameters(), before, strict=True))


def test_the_base_model_alone_is_checked_for_its_rollout() -> None:
    assert list(checked(subject("none"), iterations=5)) == list(OF_THE_ROLLOUT)


class Restless(Sampler):
    """Looks at a generator of its own."""

    draws = np.random.default_rng(0)

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        return Plan((Step("sde", 0.7, int(self.draws.integers(2, 9))), Step()))


def test_a_sampler_with_a_generator_of_its_own_is_found() -> None:
    plan = checked(subject(sampler=Restless(Settings())))["plan"]
    assert plan.failed
    assert "differ" in plan.detail


class BatchNormed(ToyBackbone):
    """A row's answer depends on the others of its call."""

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Tensor, group: Tensor) -> Tensor:
        v = super().velocity(x, sigma, conditioning, group)
        return v - v.mean(0, keepdim=True)


def test_a_model_whose_rows_depend_on_each_other_is_found() -> None:
    found = checked(subject(policy=BatchNormed()))
    assert found["rollout at any micro-batch"].failed
    assert found["first ratio is 1"].failed


class Doubling(ToyBackbone):
    """Draws dropout, as a model in training mode does."""

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Tensor, group: Tensor) -> Tensor:
        return torch.nn.functional.dropout(super().velocity(x, sigma, conditioning, group), 0.5, training=True)


def test_dropout_is_found() -> None:
    assert checked(subject(policy=Doubling()))["first ratio is 1"].failed


class FirstLeaf(Objective):
    """Rewards the first leaf of each group only."""

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        return -(forest.path_sum(terms["log_prob"])[:, 0] * forest.by_group(forest.rewards)[:, 0]).sum()


def test_an_objective_that_depends_on_the_order_of_leaves_is_found() -> None:
    found = checked(subject(FirstLeaf(Settings())))
    assert found["order of leaves"].failed
    assert found["finite"].failed
    assert "without one reward" in found["finite"].detail
    # Absolute rewards are its right: this is told, and counts as no failure.
    assert found["shifted rewards"].holds is False
    assert not found["shifted rewards"].failed


class Blundering(Objective):
    """Has a fault of the kind that a first draft has."""

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        return (forest.path_sum(terms["log_prob"]) * forest.rewards).sum()  # [G, K] by [G * K]


def test_a_plug_in_that_raises_is_told_with_the_place_in_its_file() -> None:
    found = checked(subject(Blundering(Settings())))
    assert not found["plan"].failed
    assert found["first ratio is 1"].failed
    assert "RuntimeError in " in found["first ratio is 1"].detail
    assert f"{__file__}, line {inspect.getsourcelines(Blundering)[1] + 4}" in found["first ratio is 1"].detail


class Deaf(Objective):
    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        return 0.0 * terms["log_prob"].sum()


def test_an_objective_that_learns_nothing_is_found() -> None:
    found = checked(subject(Deaf(Settings())), iterations=3)
    assert found["gradient at any micro-batch"].failed
    assert found["learning"].failed


@pytest.mark.parametrize(
    ("objective", "code"), [("tmpo", 0), ("tests.alignbench.authoring.test_checking:Deaf", 1), ("tmpoo", 2)]
)
def test_the_command_tells_by_its_exit_code(objective: str, code: int) -> None:
    settings = ["--backbone", "tests.support.plugins:ToyPolicy", "--iterations", "0", "--json"]
    done = in_this_process("check", "--objective", objective, "--sampler", "independent", *settings)
    assert done.returncode == code, done.stderr
    if code == 2:
        assert "did you mean 'tmpo'" in done.stderr
        return
    found = json.loads(done.stdout)
    assert [f["name"] for f in found] == [*OF_THE_ROLLOUT, *OF_THE_OBJECTIVE]
    assert any(f["holds"] is False and f["required"] for f in found) == (code == 1)


@pytest.mark.parametrize("objective", ["tmpo", "dpo"])
def test_points_in_the_plane_are_checked_with_prompts_and_rewards_of_their_own(objective: str) -> None:
    options = {"objective": objective, "backbone": "gaussian_mixture", "threads": 1}
    config = load_config(options=options, sets=["sampler.rule=sde"])
    what = subject_of(config)
    assert what.prompts == tuple(load_task("equal_modes").train_prompts[:2])
    found = {result.name: result for result in run_checks(what, lr=LEARNING_RATE * config.optimizer.lr)}
    assert not [result for result in found.values() if result.holds is False]
    assert found["learning"].detail.startswith("mean latent")
