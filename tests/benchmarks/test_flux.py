"""A FLUX transformer is rolled out and trained like any other model."""

import pytest
import torch

from alignbench import load_objective, rollout
from alignbench.training.engine import backward
from tests.benchmarks.flux import TinyFlux
from tests.support.toys import tree


def test_the_first_ratio_is_1_and_the_gradient_is_the_same_at_any_micro_batch() -> None:
    policy, plan = TinyFlux(side=4), tree(6, (1, 3, 4))
    forest = rollout(policy, ["a", "b"], plan, seed=0)
    forest.rewards = torch.linspace(0, 1, 54)
    gradients = []
    for micro_batch in (None, 3):
        policy.transformer.zero_grad()
        found = backward(policy, load_objective("grpo"), forest, micro_batch=micro_batch)
        assert found.rows == plan.replay_rows(2)
        assert float((torch.exp(found.terms["log_prob"] - forest.old_log_prob) - 1).abs().max()) < 1e-5
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    whole, cut = gradients
    # Rows of other prompts and steps stand in other calls: float32 sums in another order.
    assert float((whole - cut).norm() / whole.norm()) == pytest.approx(0, abs=1e-4)
    assert float(whole.norm()) > 1e-4


def test_each_prompt_has_an_embedding_of_its_own() -> None:
    states = TinyFlux(side=4).encode(["a", "b", "a"]).states
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[1])
