"""Speed of a rollout and of a training pass: ours, and as public tree code does it (`make bench`)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from alignbench import RolloutForest, load_objective, load_sampler, rollout
from alignbench.backbone import Backbone
from alignbench.engine import backward
from alignbench.plan import Plan
from tests.benchmarks.contenders import model_of_rollout, model_of_training, rollout_per_branch, training_per_leaf

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


def timed(benchmark: Any, request: pytest.FixtureRequest, what: str, function: Callable[[], int]) -> int:
    """Times the function, which returns how many model rows it evaluates."""
    named = request.node.callspec.params
    benchmark.group = f"{what}: {named['plan']}, {named['policy']}"
    rows: int = benchmark.pedantic(function, rounds=5, warmup_rounds=1)
    benchmark.extra_info["rows"] = rows
    return rows


class TestRollout:
    def test_ours(self, benchmark: Any, request: pytest.FixtureRequest, policy: Backbone, plan: Plan) -> None:
        def run() -> int:
            return plan.model_rows(rollout(policy, PROMPT, plan, seed=0).groups)

        assert timed(benchmark, request, "rollout", run) == (ROWS[request.node.callspec.params["plan"]][0] or run())

    def test_model_alone(self, benchmark: Any, request: pytest.FixtureRequest, policy: Backbone, plan: Plan) -> None:
        assert timed(benchmark, request, "rollout", lambda: model_of_rollout(policy, PROMPT, plan)) == plan.model_rows()

    def test_per_branch(self, benchmark: Any, request: pytest.FixtureRequest, policy: Backbone, plan: Plan) -> None:
        assert timed(benchmark, request, "rollout", lambda: rollout_per_branch(policy, PROMPT, plan)) == plan.model_rows()


class TestTrainingPass:
    def test_ours(self, benchmark: Any, request: pytest.FixtureRequest, policy: Backbone, forest: RolloutForest) -> None:
        objective = load_objective("grpo")
        rows = timed(benchmark, request, "training pass", lambda: backward(policy, objective, forest).rows)
        assert rows == ROWS[request.node.callspec.params["plan"]][1]

    def test_model_alone(self, benchmark: Any, request: pytest.FixtureRequest, policy: Backbone, forest: RolloutForest) -> None:
        rows = timed(benchmark, request, "training pass", lambda: model_of_training(policy, forest))
        assert rows == forest.plan.replay_rows()

    def test_per_leaf(self, benchmark: Any, request: pytest.FixtureRequest, policy: Backbone, forest: RolloutForest) -> None:
        rows = timed(benchmark, request, "training pass", lambda: training_per_leaf(policy, forest))
        assert rows == 27 * len(forest.plan.stochastic_steps)
