"""The builder's indices and dtypes, on a tree of one root and two leaves that is written down by hand."""

import torch

from alignbench import rollout
from alignbench.rollouts.builder import Branches, ForestBuilder, planned_forest
from alignbench.rollouts.plan import Plan, Step
from tests.support.toys import MIXED, PROMPTS, ToyBackbone


def test_a_split_and_a_scored_step_give_shared_and_own_edges() -> None:
    # The root splits into two at step 0; each child takes a step of its own at step 1.
    builder = ForestBuilder()
    live = Branches.at_roots(torch.tensor([[1.0]]), groups=1)
    for t, (x, children) in enumerate([([[2.0], [3.0]], 2), ([[4.0], [5.0]], 1)]):
        states = torch.tensor(x)
        rows = builder.add_rows(live.kept(builder), live.group, torch.zeros_like(live.x, dtype=torch.float64))
        nodes = builder.add_states(states)
        parents = rows.repeat_interleave(children)
        numbers = torch.tensor([1.0 - t / 2, 0.5 - t / 2, 0.7]).expand(len(nodes), 3)
        edges = builder.add_edges(parents, nodes, torch.full_like(nodes, t), numbers, states[:, 0])
        live = live.along(edges, states, nodes, children)
    plan = Plan((Step("cps", 0.7, 2), Step("cps", 0.7)))
    forest = builder.build(live.kept(builder), live.path, prompts=["a"], plan=plan, sigmas=torch.tensor([1.0, 0.5, 0.0]))
    assert forest.states.flatten().tolist() == [1, 2, 3, 4, 5]
    assert forest.rows.tolist() == [0, 1, 2]
    assert forest.row_step.tolist() == [0, 1, 1]
    assert forest.edge_row.tolist() == [0, 0, 1, 2]
    assert forest.edge_child.tolist() == [1, 2, 3, 4]
    assert forest.leaves.tolist() == [3, 4]
    assert forest.leaf_edges.tolist() == [[0, 2], [1, 3]]
    assert forest.edge_sigma.tolist() == [1.0, 1.0, 0.5, 0.5]
    assert forest.edge_sigma_next.tolist() == [0.5, 0.5, 0.0, 0.0]
    assert forest.old_log_prob.tolist() == [2, 3, 4, 5]
    assert forest.row_velocity.dtype == torch.float32


def test_branches_of_two_groups_stay_in_order_through_a_deterministic_step() -> None:
    live = Branches.at_roots(torch.arange(4.0)[:, None], groups=2).moved(torch.arange(8.0)[:, None], children=2)
    assert live.group.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert live.path.shape == (8, 0)
    assert live.node is None


def test_a_forest_without_edges_has_empty_tensors_of_the_usual_dtypes() -> None:
    builder = ForestBuilder()
    leaves = builder.add_states(torch.ones(2, 3, 4))
    plan = Plan((Step(),), roots=2)
    forest = builder.build(leaves, leaves.new_empty(2, 0), prompts=["a"], plan=plan, sigmas=torch.tensor([1.0, 0.0]))
    indices = (forest.rows, forest.row_group, forest.row_step, forest.edge_row, forest.edge_child)
    numbers = (forest.edge_sigma, forest.edge_sigma_next, forest.edge_eta, forest.old_log_prob)
    assert {(len(t), t.dtype) for t in indices} == {(0, torch.int64)}
    assert {(len(t), t.dtype) for t in numbers} == {(0, torch.float32)}
    assert forest.row_velocity.shape == (0, 3, 4)
    assert forest.path_sum(forest.old_log_prob).tolist() == [[0.0, 0.0]]


def test_a_planned_forest_has_the_tree_of_a_rollout_by_the_plan() -> None:
    planned, drawn = planned_forest(MIXED, groups=2), rollout(ToyBackbone(), PROMPTS, MIXED, seed=0)
    for name in ("rows", "row_group", "row_step", "edge_row", "edge_child", "edge_eta", "leaves", "leaf_edges"):
        assert torch.equal(getattr(planned, name), getattr(drawn, name)), name
    assert len(planned.rows) == MIXED.replay_rows(2)
    rewards = planned.by_group(planned.rewards)
    assert all(len(group.unique()) == MIXED.leaves and not (group == group.mean()).any() for group in rewards)
