"""Speed of a whole training iteration, rollout and first update: ours, without the rollout's graph, and a plain loop."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from alignbench import load_backbone, load_objective, load_sampler, rollout
from alignbench.backbone import Backbone
from alignbench.rollouts.plan import Plan
from alignbench.training.engine import backward
from tests.benchmarks.contenders import iteration_step_by_step

PROMPTS = [f'the word "{word}"' for word in ("TULIP", "ROSE", "OAK", "ELM")]
SAMPLERS: dict[str, dict[str, object]] = {
    "independent": {"steps": 8, "group_size": 9},
    "dynamic_tree": {"steps": 8, "levels": 2, "early": [1, 2], "late": [1, 4]},
}
"""The settings of the preset quick: nine images of each prompt, 36 in all."""


@pytest.fixture(scope="module")
def tiny(threads: int) -> Backbone:
    return load_backbone("tiny", device="cpu")


@pytest.fixture(scope="module", params=SAMPLERS)
def plan(request: pytest.FixtureRequest) -> Plan:
    return load_sampler(request.param, **SAMPLERS[request.param]).plan(0.5, np.random.default_rng(0))


def ours(policy: Backbone, plan: Plan, *, keep_graph: bool) -> None:
    forest = rollout(policy, PROMPTS, plan, seed=0, keep_graph=keep_graph)
    forest.rewards = torch.linspace(0, 1, len(forest.leaves), dtype=torch.float64)
    backward(policy, load_objective("ddpo"), forest, on_policy=True)


def timed(benchmark: Any, request: pytest.FixtureRequest, policy: Backbone, plan: Plan, work: Callable[[], object]) -> None:
    benchmark.group = f"iteration: {request.node.callspec.params['plan']}, tiny"
    benchmark.extra_info["rows"] = plan.model_rows(len(PROMPTS)) + plan.replay_rows(len(PROMPTS))
    clear = policy.trainable().zero_grad
    benchmark.pedantic(work, setup=lambda: clear(set_to_none=True), rounds=3, warmup_rounds=1)


def test_ours(benchmark: Any, request: pytest.FixtureRequest, tiny: Backbone, plan: Plan) -> None:
    timed(benchmark, request, tiny, plan, lambda: ours(tiny, plan, keep_graph=True))


def test_evaluated_again(benchmark: Any, request: pytest.FixtureRequest, tiny: Backbone, plan: Plan) -> None:
    timed(benchmark, request, tiny, plan, lambda: ours(tiny, plan, keep_graph=False))


def test_step_by_step(benchmark: Any, request: pytest.FixtureRequest, tiny: Backbone, plan: Plan) -> None:
    timed(benchmark, request, tiny, plan, lambda: iteration_step_by_step(tiny, PROMPTS, plan))
