"""Speed of a whole training iteration, rollout and first update: ours, without the rollout's graph, and public loops."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from alignbench import load_backbone, load_objective, load_sampler, rollout
from alignbench.backbone import Backbone
from alignbench.rollouts.plan import Plan
from alignbench.training.engine import backward
from tests.benchmarks.contenders import iteration_step_by_step, rollout_per_branch, training_per_leaf
from tests.benchmarks.flux import TinyFlux

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


def ours(policy: Backbone, plan: Plan, *, keep_graph: bool, prompts: Sequence[str] = PROMPTS) -> None:
    forest = rollout(policy, prompts, plan, seed=0, keep_graph=keep_graph)
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


class TestTreeCode:
    """One prompt with 27 leaves on a FLUX transformer; the other loop is that of public tree code, as TMPO's."""

    @pytest.fixture(scope="class")
    def flux(self, threads: int) -> Backbone:
        return TinyFlux()

    @pytest.fixture(scope="class")
    def tree(self) -> Plan:
        return load_sampler("dynamic_tree").plan(0.5, np.random.default_rng(0))

    def timed(self, benchmark: Any, policy: Backbone, tree: Plan, work: Callable[[], object]) -> None:
        benchmark.group = "iteration: dynamic_tree, flux"
        benchmark.extra_info["rows"] = tree.model_rows() + tree.replay_rows()
        clear = policy.trainable().zero_grad
        benchmark.pedantic(work, setup=lambda: clear(set_to_none=True), rounds=7, warmup_rounds=1)

    def test_ours(self, benchmark: Any, flux: Backbone, tree: Plan) -> None:
        self.timed(benchmark, flux, tree, lambda: ours(flux, tree, keep_graph=True, prompts=PROMPTS[:1]))

    def test_per_branch_and_leaf(self, benchmark: Any, flux: Backbone, tree: Plan) -> None:
        forest = rollout(flux, PROMPTS[:1], tree, seed=0)

        def work() -> None:
            rollout_per_branch(flux, PROMPTS[:1], tree)
            training_per_leaf(flux, forest)

        self.timed(benchmark, flux, tree, work)
