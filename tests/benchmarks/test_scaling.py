"""How the cost of a rollout and of a training pass grows with K, steps, prompts and image size (`make bench`)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignbench import RolloutForest, load_backbone, load_objective, rollout
from alignbench.backbone import Backbone
from alignbench.rollouts.plan import Plan
from alignbench.training.engine import backward
from tests.benchmarks.flux import TinyFlux
from tests.support.toys import tree

LEAVES = {9: (1, 3), 27: (1, 3, 4), 81: (1, 2, 3, 4), 243: (0, 1, 2, 3, 4)}
"""K -> splits into three."""
MICRO_BATCH = 9


@pytest.fixture(scope="module")
def tiny(threads: int) -> Backbone:
    return load_backbone("tiny", device="cpu")


def timed(benchmark: Any, group: str, at: int, rows: int, function: Callable[[], object]) -> None:
    benchmark.group = group
    benchmark.extra_info.update(at=at, rows=rows)
    benchmark.pedantic(function, rounds=3, warmup_rounds=1)


def drawn(policy: Backbone, plan: Plan, prompts: int = 1) -> RolloutForest:
    found = rollout(policy, [f'the word "{i}"' for i in range(prompts)], plan, seed=0)
    found.rewards = torch.linspace(0, 1, len(found.leaves))
    return found


@pytest.mark.parametrize("k", LEAVES)
def test_rollout_against_k(benchmark: Any, tiny: Backbone, k: int) -> None:
    plan = tree(6, LEAVES[k])
    assert plan.leaves == k
    timed(benchmark, "rollout against K, tiny", k, plan.model_rows(), lambda: drawn(tiny, plan))


@pytest.mark.parametrize("k", LEAVES)
def test_training_pass_against_k(benchmark: Any, tiny: Backbone, k: int) -> None:
    """With gradient caching; tests/alignbench/training/test_memory.py has its memory."""
    forest, objective = drawn(tiny, tree(6, LEAVES[k])), load_objective("grpo")
    rows = backward(tiny, objective, forest, micro_batch=MICRO_BATCH).forward_rows
    group = "training pass against K, microbatches of 9, tiny"
    timed(benchmark, group, k, rows, lambda: backward(tiny, objective, forest, micro_batch=MICRO_BATCH))


@pytest.mark.parametrize("steps", [6, 12, 24, 50])
def test_rollout_against_steps(benchmark: Any, tiny: Backbone, steps: int) -> None:
    plan = tree(steps, (steps // 6, steps // 2, steps * 2 // 3))
    timed(benchmark, "rollout against steps, tiny", steps, plan.model_rows(), lambda: drawn(tiny, plan))


@pytest.mark.parametrize("prompts", [1, 4, 16, 64])
def test_rollout_against_prompts(benchmark: Any, tiny: Backbone, prompts: int) -> None:
    plan = tree(6, LEAVES[9])
    timed(benchmark, "rollout against prompts, tiny", prompts, plan.model_rows(prompts), lambda: drawn(tiny, plan, prompts))


@pytest.mark.parametrize("side", [8, 16, 24])
def test_rollout_against_picture_size(benchmark: Any, threads: int, side: int) -> None:
    """The rows stay; attention grows with the square of the tokens, everything else with the tokens."""
    plan, policy = tree(6, LEAVES[9]), TinyFlux(side)
    timed(benchmark, "rollout against latent side, flux", side, plan.model_rows(), lambda: drawn(policy, plan))
