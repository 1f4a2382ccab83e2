"""Joining and rewarding forests; what executor, engine and samplers make of one is tested with them."""

from dataclasses import fields

import pytest
import torch

from alignbench import RolloutForest, rollout
from alignbench.load import load_objective
from alignbench.rollouts.noise import group_keys
from alignbench.training.engine import backward
from tests.support.toys import MIXED, ToyBackbone

PROMPTS = ["a", "b", "a", "c"]


def test_parts_of_a_rollout_join_to_the_whole() -> None:
    toy, keys = ToyBackbone(), group_keys(PROMPTS)
    whole = rollout(toy, PROMPTS, MIXED, seed=3)
    parts = [rollout(toy, PROMPTS[a:b], MIXED, seed=3, keys=keys[a:b]) for a, b in ((0, 1), (1, 4))]
    joined = RolloutForest.joined(parts)
    assert joined.prompts == PROMPTS
    assert joined.leaf_prompts == whole.leaf_prompts
    # float32 sums of other batch sizes
    assert torch.allclose(joined.leaf_latents, whole.leaf_latents, atol=1e-5)
    assert torch.allclose(joined.path_sum(joined.old_log_prob), whole.path_sum(whole.old_log_prob), atol=1e-5)
    assert (joined.edge_row.diff() >= 0).all()
    assert joined.row_group.bincount().tolist() == whole.row_group.bincount().tolist()
    for name in ("edge_sigma", "edge_sigma_next", "edge_eta", "edge_group", "edge_step"):
        assert torch.equal(getattr(joined, name)[joined.leaf_edges], getattr(whole, name)[whole.leaf_edges])
    for forest in (whole, joined):
        # Each edge leaves the state that its row says: the parent's own step leads to the child's mean.
        assert torch.equal(forest.edge_group[forest.leaf_edges][:, 0], torch.arange(4).repeat_interleave(6))
    gradients = []
    for forest in (whole, joined):
        forest.rewards = torch.linspace(0, 1, 24) ** 2
        toy.net.zero_grad()
        backward(toy, load_objective("grpo"), forest)
        gradients.append(toy.gradient())
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
    assert gradients[0].abs().max() > 1e-4


def test_a_single_part_is_the_whole() -> None:
    forest = rollout(ToyBackbone(), ["a"], MIXED, seed=0)
    joined = RolloutForest.joined([forest])
    assert all(getattr(joined, f.name) is getattr(forest, f.name) for f in fields(forest))


def test_rewards_are_set_by_group_or_by_leaf_and_a_single_one_counts_as_it_is() -> None:
    forest = rollout(ToyBackbone(), ["a", "b"], MIXED, seed=0)
    total = torch.arange(12.0, dtype=torch.float64).view(2, 6)
    forest.set_rewards(total, {"first": total, "second": -total}, {"first": 1.0, "second": 0.5}, normalise=True)
    assert forest.rewards.tolist() == list(range(12))
    assert forest.scores["second"].tolist() == [-float(i) for i in range(12)]
    assert (forest.weights, forest.standardised) == ({"first": 1.0, "second": 0.5}, True)
    # A sum of standardised rewards is the target's reward as it is.
    assert forest.target_reward[1].tolist() == [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
    forest.set_rewards(total.flatten(), {"first": total.flatten()}, {"first": 1.0}, normalise=True)
    assert not forest.standardised
    # The variance of six consecutive numbers is 35 / 12; a small constant is added to the deviation.
    assert float(forest.target_reward[1, 0]) == pytest.approx(-2.5 / (35 / 12) ** 0.5, rel=1e-3)
    assert torch.equal(forest.scores["first"], forest.rewards)
