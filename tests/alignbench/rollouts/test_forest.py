"""Joining forests; what executor, engine and samplers make of one is tested with them."""

from dataclasses import fields

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
