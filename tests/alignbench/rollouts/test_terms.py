import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from alignbench import RolloutForest, rollout
from alignbench.errors import RunError
from alignbench.flow import Reduction
from alignbench.rollouts.executor import predict
from alignbench.rollouts.terms import (
    DenoisingRows,
    EdgeRows,
    Terms,
    Times,
    denoising_noise,
    denoising_terms,
    edge_terms,
    part_of_update,
)
from tests.support.by_hand import gaussian_step, leaf_values, snapshot
from tests.support.toys import MIXED, PROMPTS, ToyBackbone, chains, tree

PLANS = {"tree": tree(6, (1, 3, 4)), "chains": chains(4, 3, "sde"), "mixed rules": MIXED}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())

# float32 log-densities and KLs of a few units, averaged over 18 dimensions.
ROUNDING = 1e-5


def velocities(toy: ToyBackbone, rows: EdgeRows) -> Tensor:
    return predict(toy, rows.x, rows.sigma, toy.encode(rows.forest.prompts), rows.group)


def all_terms(toy: ToyBackbone, forest: RolloutForest) -> Terms:
    rows = EdgeRows.of(forest)
    velocity = velocities(toy, rows)
    with toy.reference():
        return edge_terms(rows, velocity, velocities(toy, rows).detach())


@every_plan
def test_under_the_behaviour_policy_log_probs_are_the_old_ones_without_drift(plan: object) -> None:
    toy = ToyBackbone()
    forest = rollout(toy, PROMPTS, plan, seed=0)  # type: ignore[arg-type]
    terms = all_terms(toy, forest)
    assert torch.allclose(terms["log_prob"], forest.old_log_prob, atol=ROUNDING)
    assert torch.allclose(terms["drift_noise"], torch.zeros_like(forest.old_log_prob), atol=ROUNDING)
    # The policy is still the base model.
    assert torch.allclose(terms["kl"], torch.zeros_like(forest.old_log_prob), atol=ROUNDING)
    assert torch.allclose(terms["log_prob_reference"], forest.old_log_prob, atol=ROUNDING)


@every_plan
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_terms_of_a_moved_policy_equal_those_replayed_leaf_by_leaf(plan: object, reduction: Reduction) -> None:
    toy = ToyBackbone()
    toy.nudge(0.1, seed=1)
    behaviour = snapshot(toy)
    forest = rollout(toy, PROMPTS, plan, seed=0, reduction=reduction)  # type: ignore[arg-type]
    toy.nudge(0.1, seed=2)
    terms, expected = all_terms(toy, forest), leaf_values(toy, behaviour, forest)
    for name in ("log_prob", "drift_noise", "log_prob_reference", "kl"):
        on_leaves = terms[name][forest.leaf_edges]
        assert torch.allclose(on_leaves, getattr(expected, name), rtol=1e-4, atol=ROUNDING), name
        assert terms[name].dtype == torch.float32
    # Differences of log-densities, which are known to 1e-6 here: a mean, or a sum, over 18 dimensions.
    known_to = 1e-5 * (18 if reduction == "sum" else 1)
    ratio, of_reference = (terms[name][forest.leaf_edges] for name in ("log_ratio", "log_ratio_reference"))
    assert torch.allclose(ratio, expected.log_prob - expected.old_log_prob, atol=known_to)
    assert torch.allclose(of_reference, expected.log_prob - expected.log_prob_reference, atol=known_to)
    assert terms["kl"].min() > 0
    assert terms["drift_noise"].abs().max() > 1e-3
    assert min(ratio.abs().max(), of_reference.abs().max()) > 1e-3


def test_log_ratios_of_the_same_velocities_are_exactly_zero() -> None:
    forest = rollout(ToyBackbone(), PROMPTS, MIXED, seed=0, reduction="sum")
    terms = edge_terms(EdgeRows.of(forest), forest.row_velocity, forest.row_velocity)
    assert terms["log_ratio"].abs().max() == terms["log_ratio_reference"].abs().max() == terms["kl"].max() == 0


def test_drift_noise_is_the_regulated_log_ratio_of_a_single_edge() -> None:
    toy = ToyBackbone()
    forest = rollout(toy, ["a"], chains(2, 1), seed=0, reduction="sum")
    moved = forest.row_velocity + 0.3
    terms = edge_terms(EdgeRows.of(forest), moved)
    numbers = float(forest.edge_sigma[0]), float(forest.edge_sigma_next[0]), 0.7
    x = forest.states[forest.rows[0]]
    old, std = gaussian_step("cps", x, forest.row_velocity[0], *numbers)
    new, _ = gaussian_step("cps", x, moved[0], *numbers)
    # GRPO-Guard: std (log w + |mu - mu_old|^2 / (2 std^2)).
    log_w = float(terms["log_prob"][0] - forest.old_log_prob[0])
    regulated = std * (log_w + float(((new - old) ** 2).sum()) / (2 * std**2))
    assert float(terms["drift_noise"][0]) == pytest.approx(regulated, abs=1e-4)  # difference of two float32 sums


@pytest.mark.parametrize("rule", ["sde", "cps", "dance"])
def test_kl_is_the_closed_form_of_two_gaussians_of_equal_deviation(rule: str) -> None:
    toy = ToyBackbone()
    forest = rollout(toy, ["a"], chains(2, 1, rule), seed=0, reduction="sum")
    velocity = forest.row_velocity
    terms = edge_terms(EdgeRows.of(forest), velocity + 0.3, velocity)
    x, numbers = forest.states[forest.rows[0]], (float(forest.edge_sigma[0]), float(forest.edge_sigma_next[0]), 0.7)
    (new, std), (ref, _) = (gaussian_step(rule, x, v, *numbers) for v in (velocity[0] + 0.3, velocity[0]))
    normals = (torch.distributions.Normal(m, torch.tensor(std)) for m in (new, ref))
    expected = float(torch.distributions.kl_divergence(*normals).sum())
    assert terms["kl"].tolist() == pytest.approx([expected], rel=1e-4)  # float32 differences of means
    assert expected > 0.01


def test_kl_of_a_hand_computed_step() -> None:
    # sde from sigma 1 to .5 at level .5: std_t^2 = .25 / .5 = .5, std^2 = .25; d mean / d v = -.5.
    # Velocities 0 and 1: |.5|^2 / (2 * .25) = .5 in each dimension.
    forest = rollout(ToyBackbone(), ["a"], chains(2, 1, "sde", 0.5), seed=0)
    forest.edge_sigma_next = torch.tensor([0.5])
    zero = torch.zeros_like(forest.row_velocity)
    terms = edge_terms(EdgeRows.of(forest), zero + 1, zero)
    assert terms["kl"].tolist() == pytest.approx([0.5], abs=1e-6)  # float32


def test_without_a_reference_there_are_no_reference_terms() -> None:
    forest = rollout(ToyBackbone(), ["a"], chains(3, 2), seed=0)
    assert set(edge_terms(EdgeRows.of(forest), forest.row_velocity)) == {"log_prob", "log_ratio", "drift_noise", "kl_behaviour"}


def test_the_reference_receives_no_gradient() -> None:
    forest = rollout(ToyBackbone(), ["a"], chains(3, 2), seed=0)
    velocity = forest.row_velocity.clone().requires_grad_()
    reference = (forest.row_velocity + 0.1).requires_grad_()
    terms = edge_terms(EdgeRows.of(forest), velocity, reference)
    assert not terms["log_prob_reference"].requires_grad
    torch.autograd.backward(terms["kl"].sum())
    assert reference.grad is None
    assert velocity.grad is not None
    assert velocity.grad.abs().sum() > 0


@every_plan
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_parts_of_the_rows_have_the_terms_of_the_whole_in_order(plan: object, size: int) -> None:
    toy = ToyBackbone()
    forest = rollout(toy, PROMPTS, plan, seed=0)  # type: ignore[arg-type]
    toy.nudge(0.1)
    rows = EdgeRows.of(forest)
    parts = [rows.part(i, i + size) for i in range(0, len(rows), size)]
    assert [len(p) for p in parts][-1] == len(rows) - size * (len(parts) - 1)
    assert torch.equal(torch.cat([p.x for p in parts]), rows.x)
    assert torch.equal(torch.cat([p.sigma for p in parts]), rows.sigma)
    assert torch.equal(torch.cat([p.group for p in parts]), rows.group)
    whole, velocity = edge_terms(rows, velocities(toy, rows)), velocities(toy, rows)
    of_parts = [edge_terms(p, velocity[p.start : p.stop]) for p in parts]
    for name, value in whole.items():
        assert torch.allclose(torch.cat([t[name] for t in of_parts]), value, atol=1e-6), name  # float32


def test_a_part_of_a_part_counts_from_the_parts_start() -> None:
    forest = rollout(ToyBackbone(), PROMPTS, tree(6, (1, 3, 4)), seed=0)
    inner = EdgeRows.of(forest).part(4, 20).part(2, 5)
    assert (inner.start, inner.stop, len(inner)) == (6, 9, 3)
    # Each row has three edges.
    assert inner.edges == slice(18, 27)


def test_a_log_prob_falls_with_the_squared_distance_from_the_mean() -> None:
    forest = rollout(ToyBackbone(), ["a"], chains(2, 1), seed=0)
    x, numbers = forest.states[forest.rows[0]], (float(forest.edge_sigma[0]), float(forest.edge_sigma_next[0]), 0.7)
    mean, std = gaussian_step("cps", x, forest.row_velocity[0], *numbers)
    forest.states[forest.edge_child[0]] = mean + 3 * std
    # -9/2 - log std - log(2 pi)/2 in each dimension.
    expected = -4.5 - math.log(std) - 0.918939
    got = edge_terms(EdgeRows.of(forest), forest.row_velocity)["log_prob"]
    assert got.tolist() == pytest.approx([expected], abs=ROUNDING)


def times_of(forest: RolloutForest, times: Times, count: int = 20_000) -> Tensor:
    forest = replace(forest, states=torch.zeros(1, 1), leaves=torch.zeros(2, dtype=torch.long))
    return denoising_noise(forest, 0, [(i,) for i in range(count)], times)[0].double()


def test_sigmas_follow_the_models_own_schedule() -> None:
    forest = rollout(ToyBackbone(), ["a"], chains(2, 2), seed=0)
    assert forest.sigmas.tolist() == pytest.approx([1, 2 / 3, 0])  # 2 t / (1 + t)
    assert forest.schedule_shift == pytest.approx(2)
    # The mean of 3 t / (1 + 2 t) over logit-normal t, by 20,000 quantiles of the normal: Flow-GRPO's times on SD3.5.
    t = torch.sigmoid(torch.special.ndtri((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000))
    expected = float((3 * t / (1 + 2 * t)).mean())
    assert expected == pytest.approx(0.714, abs=5e-4)
    plain = times_of(forest, "logit_normal")
    shifted = times_of(replace(forest, schedule_shift=3.0), "schedule")
    assert float(shifted.mean()) == pytest.approx(expected, abs=5e-3)  # four standard errors: deviation 0.17 of 20,000
    assert float(plain.mean()) == pytest.approx(0.5, abs=6e-3)
    assert torch.allclose(shifted, 3 * plain / (1 + 2 * plain), atol=1e-6)
    assert torch.equal(times_of(replace(forest, schedule_shift=1.0), "schedule"), plain)
    even = times_of(forest, "uniform")
    assert float(even.mean()) == pytest.approx(0.5, abs=9e-3)
    assert float((even < 0.1).double().mean()) == pytest.approx(0.1, abs=9e-3)


def test_sigmas_of_the_steps_need_a_forest_that_has_them() -> None:
    forest = replace(rollout(ToyBackbone(), ["a"], chains(2, 2), seed=0), sigmas=torch.empty(0))
    with pytest.raises(RunError, match="needs the sigmas of the rollout's steps"):
        denoising_noise(forest, 0, [(0,)], "steps")


def test_parts_of_the_updates_are_disjoint_and_leave_nothing_out() -> None:
    forest = rollout(ToyBackbone(), ["a"], chains(2, 2), seed=0)
    assert part_of_update(forest, 5, 4, 1).tolist() == [0, 1, 2, 3]
    parts = [part_of_update(forest, update, 10, 3).tolist() for update in range(4)]
    assert sorted(parts[0] + parts[1] + parts[2]) == list(range(10))
    assert [len(part) for part in parts] == [4, 3, 3, 4]
    assert parts[3] == parts[0] == sorted(parts[0])
    assert parts != [part_of_update(replace(forest, iteration=1), update, 10, 3).tolist() for update in range(4)]
    assert part_of_update(forest, 1, 1, 2).tolist() == []


def test_denoising_errors_are_zero_for_the_velocity_from_picture_to_noise() -> None:
    forest = rollout(ToyBackbone(), PROMPTS, chains(2, 3), seed=0)
    leaf = torch.tensor([0, 2, 5])
    rows = DenoisingRows(forest, leaf, *denoising_noise(forest, 0, [(1,), (2,), (2,)]))
    x0, noise = forest.leaf_latents[leaf], rows.noise
    assert torch.equal(noise[1], noise[2])  # of equal keys
    assert not torch.equal(noise[0], noise[1])
    assert rows.group.tolist() == [0, 0, 1]
    sigma = rows.sigma.view(3, 1, 1, 1)
    # x moves from the image at sigma = 0 to the noise at sigma = 1 with this velocity.
    velocity = (noise - rows.x) / (1 - sigma)
    torch.testing.assert_close(rows.x - sigma * velocity, x0, atol=1e-4, rtol=0)  # differences of float32
    found = denoising_terms(rows, velocity, velocity + torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1))
    assert found["error"].tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert found["error_reference"].tolist() == pytest.approx([0.25, 1, 4], rel=1e-4)
    part = rows.part(1, 3)
    assert torch.equal(denoising_terms(part, velocity[1:] + 1)["error"], denoising_terms(rows, velocity + 1)["error"][1:])
