"""Speed of a rollout and of a training pass: ours, and as public tree code does it (`make bench`)."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from alignbench import RolloutForest, load_objective, load_sampler, rollout
from alignbench.backbone import Backbone
from alignbench.rollouts.plan import Plan
from alignbench.training.engine import backward
from tests.benchmarks.contenders import model_of_training, rollout_per_branch, training_per_leaf

PROMPT = ['the word "TULIP" in red']
SAMPLERS: dict[str, dict[str, object]] = {
    "independent": {"group_size": 27},
    "fixed_tree": {"splits": (1, 3, 4)},
    "dynamic_tree": {},
}
"""27 leaves over six steps each."""
ROWS = {"independent": (162, 135), "fixed_tree": (44, 13), "dynamic_tree": (None, 13)}
"""Of the rollout and of the training pass, by count; dynamic_tree's depend on where it splits."""


@pytest.fixture(scope="module", params=SAMPLERS)
def plan(request: pytest.FixtureRequest) -> Plan:
    return load_sampler(request.param, **SAMPLERS[request.param]).plan(0.5, np.random.default_rng(0))


@pytest.fixture(scope="module")
def forest(policy: Backbone, plan: Plan) -> RolloutForest:
    found = rollout(policy, PROMPT, plan, seed=0)
    found.rewards = torch.linspace(0, 1, found.group_size)
    return found


ROUNDS = 7


def timed(
    benchmark: Any,
    request: pytest.FixtureRequest,
    what: str,
    function: Callable[[], int],
    *,
    before: Callable[[], None] = lambda: None,
    model_seconds: list[float] | None = None,
) -> int:
    """Times the function, which returns how many model rows it evaluates.

    Args:
        before: run before each round, untimed.
        model_seconds: to which each round adds how much of it was the model's.
    """
    named = request.node.callspec.params
    benchmark.group = f"{what}: {named['plan']}, {named['policy']}"
    rows: int = benchmark.pedantic(function, setup=before, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["rows"] = rows
    if model_seconds is not None:
        benchmark.extra_info["model_seconds"] = model_seconds[-ROUNDS:]
    return rows


class TestRollout:
    def test_ours(
        self,
        benchmark: Any,
        request: pytest.FixtureRequest,
        monkeypatch: pytest.MonkeyPatch,
        policy: Backbone,
        plan: Plan,
    ) -> None:
        inside: list[float] = []
        velocity = policy.velocity

        def watched(*arguments: Any) -> torch.Tensor:
            began = time.perf_counter()
            answer = velocity(*arguments)
            inside[-1] += time.perf_counter() - began
            return answer

        def run() -> int:
            return plan.model_rows(rollout(policy, PROMPT, plan, seed=0).groups)

        monkeypatch.setattr(policy, "velocity", watched)
        rows = timed(benchmark, request, "rollout", run, before=lambda: inside.append(0.0), model_seconds=inside)
        assert rows == (ROWS[request.node.callspec.params["plan"]][0] or plan.model_rows())

    def test_per_branch(self, benchmark: Any, request: pytest.FixtureRequest, policy: Backbone, plan: Plan) -> None:
        assert timed(benchmark, request, "rollout", lambda: rollout_per_branch(policy, PROMPT, plan)) == plan.model_rows()


class TestTrainingPass:
    def test_ours(self, benchmark: Any, request: pytest.FixtureRequest, policy: Backbone, forest: RolloutForest) -> None:
        objective, alone = load_objective("grpo"), []

        def model_alone() -> None:
            began = time.perf_counter()
            model_of_training(policy, forest)
            alone.append(time.perf_counter() - began)

        def run() -> int:
            return backward(policy, objective, forest).rows

        # Side by side, since the model's part cannot be told apart inside one backward pass.
        rows = timed(benchmark, request, "training pass", run, before=model_alone, model_seconds=alone)
        assert rows == ROWS[request.node.callspec.params["plan"]][1]

    def test_per_leaf(self, benchmark: Any, request: pytest.FixtureRequest, policy: Backbone, forest: RolloutForest) -> None:
        rows = timed(benchmark, request, "training pass", lambda: training_per_leaf(policy, forest))
        assert rows == 27 * len(forest.plan.stochastic_steps)
