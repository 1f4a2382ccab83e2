from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from alignbench import Plan, RolloutForest, Step, UserError, rollout
from alignbench.errors import NonFiniteError
from alignbench.rollouts.executor import predict, sample
from alignbench.rollouts.noise import group_keys, normal
from tests.support.by_hand import gaussian_step, log_density
from tests.support.toys import LATENT, MIXED, PROMPTS, ToyBackbone, chains, tree

PLANS = {
    "tree": tree(5, (1, 2), children=2),
    "tree with gaps": tree(6, (1, 3, 4)),
    "chains": chains(4, 3),
    "sde chains": chains(4, 3, "sde"),
    "dance from the root": tree(4, (0, 2), children=2, rule="dance"),
    "mixed rules": MIXED,
    "mixed rules, two roots": Plan(MIXED.steps, roots=2),
    "ode": Plan((Step(),) * 3, roots=2),
    "noise in the last step": Plan((Step(), Step("sde", 0.5, 2))),
    "not all scored": Plan(
        (Step("cps", 0.5, 2), Step("sde", 0.7, 2, scored=False), Step("dance", 0.3), Step(), Step("sde", 0.4, 2))
    ),
    "none scored": Plan((Step("cps", 0.5, 2, scored=False), Step())),
    "strides": Plan((Step(stride=2), Step("cps", 0.5, 2), Step("sde", 0.6, 2, stride=2), Step(stride=3))),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())

# Another split into matrix products rounds differently; states are of size 1 and pass a few float32 steps.
ROUNDING = 2e-6


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=ROUNDING)


@every_plan
@pytest.mark.parametrize("groups", [1, 3])
def test_a_rollout_costs_one_call_a_step_and_the_rows_its_plan_says(plan: Plan, groups: int) -> None:
    toy = ToyBackbone()
    forest = rollout(toy, ["a", "b", "a"][:groups], plan, seed=0)
    assert toy.calls == len(plan.steps)
    assert toy.rows == plan.model_rows(groups)
    assert len(forest.rows) == plan.replay_rows(groups)
    assert len(forest.leaves) == plan.leaves * groups
    assert forest.group_size == plan.leaves


@every_plan
def test_every_leaf_is_reached_by_the_path_that_its_edges_tell(plan: Plan) -> None:
    toy = ToyBackbone()
    forest = rollout(toy, PROMPTS, plan, seed=3)
    sigmas, conditioning = toy.sigmas(plan.schedule_indices[-1])[list(plan.schedule_indices)].tolist(), toy.encode(PROMPTS)
    assert forest.leaf_edges.shape == (2 * plan.leaves, len(plan.stochastic_steps))
    for leaf, edges in enumerate(forest.leaf_edges.tolist()):
        group = leaf // plan.leaves
        x: Tensor | None = None
        left = list(edges)
        for t, step in enumerate(plan.steps):
            if step.stochastic and not step.scored:
                x = None  # its noise is not kept; the path goes on at the next parent
            elif step.stochastic:
                edge = left.pop(0)
                row = int(forest.edge_row[edge])
                parent = forest.states[forest.rows[row]]
                assert x is None or close(x, parent)
                assert (int(forest.row_step[row]), int(forest.row_group[row])) == (t, group)
                assert int(forest.edge_group[edge]) == group
                assert float(forest.edge_sigma[edge]) == float(forest.row_sigma[row]) == pytest.approx(sigmas[t])
                assert float(forest.edge_sigma_next[edge]) == pytest.approx(sigmas[t + 1])
                assert float(forest.edge_eta[edge]) == pytest.approx(step.eta)
                x = forest.states[forest.edge_child[edge]]
            elif x is not None:
                v = toy.net(x[None], torch.tensor([sigmas[t]]), conditioning[group : group + 1])[0]
                x = x + (sigmas[t + 1] - sigmas[t]) * v
        assert left == []
        if x is not None:
            assert close(x, forest.leaf_latents[leaf])


@every_plan
def test_old_log_probs_are_the_gaussian_densities_of_the_drawn_children(plan: Plan) -> None:
    toy = ToyBackbone()
    averaged = rollout(toy, PROMPTS, plan, seed=3)
    summed = rollout(toy, PROMPTS, plan, seed=3, reduction="sum")
    assert torch.equal(averaged.states, summed.states)
    conditioning = toy.encode(PROMPTS)
    expected = []
    for edge, row in enumerate(averaged.edge_row.tolist()):
        group, step = int(averaged.row_group[row]), plan.steps[int(averaged.row_step[row])]
        x, y = averaged.states[averaged.rows[row]], averaged.states[averaged.edge_child[edge]]
        sigma, sigma_next = float(averaged.edge_sigma[edge]), float(averaged.edge_sigma_next[edge])
        v = toy.net(x[None], torch.tensor([sigma]), conditioning[group : group + 1])[0]
        assert close(averaged.row_velocity[row], v)
        mean, std = gaussian_step(step.rule, x.double(), v.double(), sigma, sigma_next, step.eta)
        expected.append(log_density(y.double(), mean, std, "sum").item())
    # 18 float32 terms of size 1 to 10 each.
    assert summed.old_log_prob.tolist() == pytest.approx(expected, abs=2e-4)
    assert averaged.old_log_prob.tolist() == pytest.approx([e / 18 for e in expected], abs=2e-5)


def test_a_shared_edge_enters_all_its_descendants() -> None:
    forest = rollout(ToyBackbone(), PROMPTS, tree(6, (1, 3, 4)), seed=0)
    counts = torch.bincount(forest.leaf_edges.flatten())
    assert counts.tolist() == [9] * 6 + [3] * 18 + [1] * 54
    # Leaves of one group in order: the first edge changes every 9 leaves, the second every 3.
    assert forest.leaf_edges[:10, 0].tolist() == [0] * 9 + [1]
    assert forest.leaf_edges[:7, 1].tolist() == [6, 6, 6, 7, 7, 7, 8]
    assert forest.leaf_prompts == [PROMPTS[0]] * 27 + [PROMPTS[1]] * 27


def test_path_sums_and_means_run_over_the_edges_of_each_leaf() -> None:
    forest = rollout(ToyBackbone(), ["a"], tree(5, (1, 2), children=2), seed=0)
    values = torch.tensor([1.0, 2.0, 10.0, 20.0, 30.0, 40.0])
    assert forest.path_sum(values).tolist() == [[11.0, 21.0, 32.0, 42.0]]
    assert forest.path_mean(values).tolist() == [[5.5, 10.5, 16.0, 21.0]]
    assert forest.by_group(torch.arange(4)).tolist() == [[0, 1, 2, 3]]


def test_only_states_that_a_loss_needs_are_kept() -> None:
    # Root parent, its three children, then per split parents, children; leaves. Steps 3 and 4 follow one another.
    forest = rollout(ToyBackbone(), ["a"], tree(6, (1, 3, 4)), seed=0)
    assert len(forest.states) == (1 + 3) + (3 + 9) + 27 + 27
    assert rollout(ToyBackbone(), ["a"], PLANS["ode"], seed=0).states.shape == (2, *LATENT)


@every_plan
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_a_rollout_does_not_depend_on_the_micro_batch(plan: Plan, micro_batch: int) -> None:
    toy = ToyBackbone()
    whole = rollout(toy, PROMPTS, plan, seed=1)
    toy.reset_counters()
    cut = rollout(toy, PROMPTS, plan, seed=1, micro_batch=micro_batch)
    assert toy.calls == sum(-(-2 * plan.branches_before(t) // micro_batch) for t in range(len(plan.steps)))
    assert torch.equal(cut.leaf_edges, whole.leaf_edges)
    assert close(cut.states, whole.states)
    assert torch.allclose(cut.old_log_prob, whole.old_log_prob, atol=1e-5)  # noise terms squared


def of_group(forest: RolloutForest, group: int) -> Tensor:
    return forest.leaf_latents.view(forest.groups, forest.group_size, *LATENT)[group]


@every_plan
def test_a_prompts_leaves_do_not_depend_on_the_other_prompts_or_their_order(plan: Plan) -> None:
    toy = ToyBackbone()
    alone = of_group(rollout(toy, ["a"], plan, seed=1), 0)
    first = of_group(rollout(toy, ["a", "b", "c"], plan, seed=1), 0)
    last = of_group(rollout(toy, ["c", "b", "a"], plan, seed=1), 2)
    assert close(alone, first)
    assert close(alone, last)


def test_equal_prompts_in_one_rollout_get_different_noise() -> None:
    forest = rollout(ToyBackbone(), ["a", "a"], chains(3, 2), seed=1)
    one, other = of_group(forest, 0), of_group(forest, 1)
    assert (one - other).abs().mean() > 0.1


def test_groups_spread_over_processes_draw_what_one_process_draws() -> None:
    toy, plan, prompts = ToyBackbone(), tree(4, (1,)), ["a", "b", "a"]
    whole = rollout(toy, prompts, plan, seed=1)
    second = rollout(toy, prompts[1:], plan, seed=1, keys=group_keys(prompts)[1:])
    assert close(of_group(second, 0), of_group(whole, 1))
    assert close(of_group(second, 1), of_group(whole, 2))


def test_noise_is_the_same_for_the_same_seed_and_iteration_and_new_for_others() -> None:
    toy, plan = ToyBackbone(), tree(4, (1,))
    states = rollout(toy, ["a"], plan, seed=1, iteration=2).states
    assert torch.equal(rollout(toy, ["a"], plan, seed=1, iteration=2).states, states)
    assert (rollout(toy, ["a"], plan, seed=1, iteration=3).states - states).abs().mean() > 0.1
    assert (rollout(toy, ["a"], plan, seed=2, iteration=2).states - states).abs().mean() > 0.1


def test_every_edge_draws_its_own_standard_normal_noise() -> None:
    forest = rollout(ToyBackbone(), PROMPTS, tree(6, (1, 3, 4)), seed=0)
    noises = []
    for edge, row in enumerate(forest.edge_row.tolist()):
        x, v = forest.states[forest.rows[row]], forest.row_velocity[row]
        numbers = float(forest.edge_sigma[edge]), float(forest.edge_sigma_next[edge]), 0.7
        mean, std = gaussian_step("cps", x, v, *numbers)
        noises.append(((forest.states[forest.edge_child[edge]] - mean) / std).flatten())
    noise = torch.stack(noises)
    # Four standard errors of 78 * 18 draws.
    assert float(noise.mean()) == pytest.approx(0, abs=4 / len(noise.flatten()) ** 0.5)
    assert float(noise.var()) == pytest.approx(1, abs=4 * (2 / len(noise.flatten())) ** 0.5)
    assert float(torch.pdist(noise).min()) > 1


def test_the_first_parents_are_the_noise_of_seed_iteration_prompt_and_root() -> None:
    toy, prompts = ToyBackbone(), ["a", "b", "a"]
    forest = rollout(toy, prompts, Plan(tree(4, (1,)).steps, roots=2), seed=5, iteration=7)
    keys = [(5, 7, *group, "root", b) for group in (("a", 0), ("b", 0), ("a", 1)) for b in range(2)]
    x, group = normal(keys, LATENT), torch.tensor([0, 0, 1, 1, 2, 2])
    v = toy.net(x, torch.ones(6), toy.encode(prompts)[group])
    sigma_next = float(toy.sigmas(4)[1])
    assert close(forest.states[forest.rows], x + (sigma_next - 1) * v)


def test_an_ode_plan_integrates_each_roots_noise_and_has_no_edges() -> None:
    toy = ToyBackbone()
    forest = rollout(toy, PROMPTS, PLANS["ode"], seed=0)
    assert forest.old_log_prob.shape == forest.edge_row.shape == forest.rows.shape == (0,)
    assert forest.leaf_edges.shape == (4, 0)
    assert forest.row_velocity.shape == (0, *LATENT)
    assert torch.pdist(forest.leaf_latents.flatten(1)).min() > 0.5


def test_a_rollout_says_when_and_how_it_was_made_and_holds_no_graph() -> None:
    plan = tree(4, (1,))
    forest = rollout(ToyBackbone(), PROMPTS, plan, seed=0, iteration=5, progress=0.25, reduction="sum")
    assert (forest.prompts, forest.plan, forest.iteration, forest.progress) == (PROMPTS, plan, 5, 0.25)
    assert forest.reduction == "sum"
    assert not forest.states.requires_grad
    assert not forest.row_velocity.requires_grad


def test_a_rollout_without_prompts_is_refused() -> None:
    with pytest.raises(UserError, match="at least one prompt"):
        rollout(ToyBackbone(), [], tree(4, (1,)), seed=0)


@pytest.mark.parametrize("plan", [PLANS["ode"], PLANS["chains"]], ids=["ode", "chains"])
def test_a_model_that_answers_nan_stops_the_rollout_and_names_step_sigma_and_dtype(plan: Plan) -> None:
    toy = ToyBackbone()
    with torch.no_grad():
        toy.net.outer.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"velocity at step 0 \(sigma 1.0000 to .*\) is not finite.*torch.float32"):
        rollout(toy, ["a"], plan, seed=0)


def test_a_step_without_a_density_stops_the_rollout() -> None:
    # cps scales its noise by the next sigma, which is 0 at the end.
    with pytest.raises(NonFiniteError, match=r"next state or its density at step 1 \(sigma .* to 0.0000\) is not finite"):
        rollout(ToyBackbone(), ["a"], Plan((Step(), Step("cps", 0.5))), seed=0)


def test_nan_in_evaluation_samples_names_the_first_step_that_has_it() -> None:
    toy = ToyBackbone()
    with torch.no_grad():
        toy.net.outer.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match="velocity at step 0"):
        sample(toy, ["a"], 2, 3, seed=0)


def test_evaluation_samples_are_euler_steps_whose_noise_no_other_prompt_changes() -> None:
    toy = ToyBackbone()
    whole = sample(toy, ["b", "a"], 3, steps=4, seed=9)
    assert whole.shape == (6, *LATENT)
    assert close(sample(toy, ["a"], 3, steps=4, seed=9), whole[3:])
    assert close(sample(toy, ["b", "a"], 2, steps=4, seed=9)[2:], whole[3:5])
    assert close(sample(toy, ["b", "a"], 3, steps=4, seed=9, micro_batch=2), whole)
    # A model that always answers the same velocity moves every state by minus that.
    with torch.no_grad():
        for parameter in toy.net.parameters():
            parameter.zero_()
        still = sample(toy, ["a"], 2, steps=4, seed=9)
        toy.net.outer.bias.fill_(0.5)
        moved = sample(toy, ["a"], 2, steps=4, seed=9)
    assert close(moved, still - 0.5)


def test_predict_cuts_rows_into_calls_of_at_most_the_micro_batch() -> None:
    toy = ToyBackbone()
    x, group, sigma = torch.randn(5, *LATENT), torch.tensor([0, 1, 0, 1, 1]), torch.linspace(0.9, 0.1, 5)
    conditioning = toy.encode(PROMPTS)
    whole = predict(toy, x, sigma, conditioning, group)
    assert toy.calls == 1
    cut = predict(toy, x, sigma, conditioning, group, micro_batch=2)
    assert (toy.calls, toy.rows) == (4, 10)
    assert close(cut, whole)


def test_a_rollout_that_keeps_its_graph_has_the_same_numbers_at_all_scored_rows() -> None:
    toy, plan = ToyBackbone(), tree(6, (1, 3))
    plain, kept = (rollout(toy, PROMPTS, plan, seed=0, micro_batch=4, keep_graph=keep) for keep in (False, True))
    assert plain.live_velocity is None
    assert kept.live_velocity is not None
    assert kept.live_velocity.requires_grad
    assert not any(tensor.requires_grad for tensor in (kept.states, kept.row_velocity, kept.old_log_prob))
    assert torch.equal(kept.live_velocity, kept.row_velocity)
    assert torch.equal(kept.states, plain.states)
    assert torch.equal(kept.old_log_prob, plain.old_log_prob)


class Watched(ToyBackbone):
    """Notes for each call of `velocity` and `decode` whether it may compute in a lower precision."""

    def __init__(self) -> None:
        super().__init__()
        self.may: list[bool] = []
        self.inside = False

    @contextmanager
    def unscored(self) -> Iterator[None]:
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Tensor, group: Tensor) -> Tensor:
        self.may.append(self.inside)
        return super().velocity(x, sigma, conditioning, group)


@pytest.mark.parametrize("keep_graph", [False, True])
def test_only_calls_that_enter_no_density_may_lower_the_precision(keep_graph: bool) -> None:
    toy = Watched()
    rollout(toy, PROMPTS, PLANS["not all scored"], 0, keep_graph=keep_graph)
    assert toy.may == [False, True, False, True, False]
    toy.may.clear()
    sample(toy, PROMPTS, 2, 3, seed=0)
    assert toy.may == [True] * 3
    assert not toy.inside
