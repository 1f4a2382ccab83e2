"""Speed of one tree on the embedded model: ours, and as public tree code does it (`make bench`).

Per branch: one model call for each live branch and step, batch size one. Per leaf: the training pass evaluates every
stochastic step of every leaf, shared ancestors again and again.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from alignbench import RolloutForest, flow, load_backbone, load_objective, load_sampler, rollout
from alignbench.backbone import Backbone
from alignbench.engine import backward
from alignbench.plan import Plan

PROMPT = ['the word "TULIP" in red']


@pytest.fixture(scope="module")
def policy() -> Backbone:
    torch.set_num_threads(1)
    return load_backbone("tiny", device="cpu")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_sampler("fixed_tree", steps=6, levels=3, children=3, splits=(1, 3, 4)).plan(0.0, np.random.default_rng(0))


@pytest.fixture(scope="module")
def forest(policy: Backbone, plan: Plan) -> RolloutForest:
    found = rollout(policy, PROMPT, plan, seed=0)
    found.rewards = torch.linspace(0, 1, found.group_size)
    return found


def per_branch(policy: Backbone, plan: Plan) -> int:
    """Rolls the tree out with batch size one; returns the number of model calls."""
    sigmas, conditioning, group = policy.sigmas(len(plan.steps)), policy.encode(PROMPT), torch.zeros(1, dtype=torch.long)
    branches, calls = [torch.randn(1, *policy.latent_shape)], 0
    with torch.no_grad():
        for t, step in enumerate(plan.steps):
            sigma, sigma_next = float(sigmas[t]), float(sigmas[t + 1])
            grown = []
            for x in branches:
                velocity = policy.velocity(x, sigmas[t : t + 1], conditioning, group)
                calls += 1
                for _ in range(step.children):
                    grown.append(flow.step(x, velocity, sigma, sigma_next, step.noise_level, step.rule).x_next)
            branches = grown
    return calls


def per_leaf(policy: Backbone, forest: RolloutForest) -> int:
    """Replays every stochastic step of every leaf and back-propagates; returns the number of rows."""
    edges = forest.leaf_edges.flatten()
    rows = forest.edge_row[edges]
    x, sigma = forest.states[forest.rows[rows]], forest.edge_sigma[edges]
    velocity = policy.velocity(x, sigma, policy.encode(PROMPT), torch.zeros(len(rows), dtype=torch.long))
    mean, std = flow.moments(x, velocity, sigma, forest.edge_sigma_next[edges], forest.edge_noise_level[edges], "cps")
    log_prob = flow.log_prob(forest.states[forest.edge_child[edges]], mean, std)
    advantage = torch.linspace(-1, 1, forest.group_size).repeat_interleave(forest.leaf_edges.shape[1])
    (-(advantage * torch.exp(log_prob - log_prob.detach())).mean()).backward()
    return len(rows)


def timed(benchmark: Any, function: Callable[[], Any]) -> Any:
    return benchmark.pedantic(function, rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="rollout, 27 leaves, 6 steps")
def test_rollout_batched(benchmark: Any, policy: Backbone, plan: Plan) -> None:
    assert timed(benchmark, lambda: rollout(policy, PROMPT, plan, seed=0)).group_size == 27


@pytest.mark.benchmark(group="rollout, 27 leaves, 6 steps")
def test_rollout_per_branch(benchmark: Any, policy: Backbone, plan: Plan) -> None:
    assert timed(benchmark, lambda: per_branch(policy, plan)) == plan.model_rows() == 44


@pytest.mark.benchmark(group="training pass, 27 leaves, 3 stochastic steps")
def test_training_pass_per_distinct_parent(benchmark: Any, policy: Backbone, forest: RolloutForest) -> None:
    objective = load_objective("grpo")
    assert timed(benchmark, lambda: backward(policy, objective, forest)).rows == 13


@pytest.mark.benchmark(group="training pass, 27 leaves, 3 stochastic steps")
def test_training_pass_per_leaf(benchmark: Any, policy: Backbone, forest: RolloutForest) -> None:
    assert timed(benchmark, lambda: per_leaf(policy, forest)) == 81
