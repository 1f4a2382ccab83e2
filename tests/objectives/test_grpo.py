import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from alignbench import Plan, RolloutForest, Step, UserError, load_objective, load_sampler, rollout
from alignbench.rollouts.terms import Terms
from alignbench.training.engine import backward
from objectives.grpo import GRPO
from tests.support.by_hand import gaussian_step
from tests.support.replays import drawn, plan_of
from tests.support.toys import PROMPTS, ToyBackbone, chains, hand_made_forest, tree

NAN = math.nan
LN2 = math.log(2)
# Group means 1 and 3, group deviations 1 and 2; the batch has mean 2 and deviation sqrt((4 + 0 + 1 + 9) / 4) = 1.870829.
TWO_GROUPS = [[0.0, 2.0], [1.0, 5.0]]
ONE_EDGE_EACH = [[0], [1], [2], [3]]


def grpo(**settings: object) -> GRPO:
    objective = load_objective("grpo", **settings)
    assert isinstance(objective, GRPO)
    return objective


def terms_of(log_prob: Sequence[float], kl: Sequence[float] | None = None) -> Terms:
    terms = {"log_prob": torch.tensor(log_prob, requires_grad=True)}
    if kl is not None:
        terms["kl"] = torch.tensor(kl, requires_grad=True)
    return terms


def gradient(terms: Terms, name: str = "log_prob") -> list[float]:
    found = terms[name].grad
    assert found is not None
    return list(found.tolist())


@pytest.mark.parametrize(
    ("std", "expected"),
    [
        ("group", [[-1, 1], [-1, 1]]),
        ("batch", [[-0.534522, 0.534522], [-1.069045, 1.069045]]),
        ("none", [[-1, 1], [-2, 2]]),
    ],
)
def test_advantages_of_two_groups_of_two(std: str, expected: list[list[float]]) -> None:
    found = grpo(std=std).advantage(hand_made_forest(TWO_GROUPS, ONE_EDGE_EACH, [0.0] * 4))
    assert found.flatten().tolist() == pytest.approx(np.array(expected).flatten(), abs=2e-6)  # six decimals


def test_advantages_are_clamped() -> None:
    found = grpo(std="none", adv_clip=1.5).advantage(hand_made_forest(TWO_GROUPS, ONE_EDGE_EACH, [0.0] * 4))
    assert found.tolist() == [[-1.0, 1.0], [-1.5, 1.5]]


def test_the_clipped_loss_of_two_groups_of_two() -> None:
    terms = terms_of([LN2, -LN2, 0.0, 0.0])
    loss = grpo(std="none", clip=0.1).loss(terms, hand_made_forest(TWO_GROUPS, ONE_EDGE_EACH, [0.0] * 4))
    # r = (2, .5, 1, 1): max(2, 1.1) = 2, max(-.5, -.9) = -.5, 2 and -2; their mean.
    assert loss.item() == pytest.approx(1.5 / 4, abs=1e-6)  # float32
    torch.autograd.backward(loss)
    assert gradient(terms) == pytest.approx([2 / 4, -0.5 / 4, 2 / 4, -2 / 4], abs=1e-6)


def test_a_ratio_that_has_gone_far_in_the_wanted_direction_gets_no_more_gradient() -> None:
    terms = terms_of([-LN2, LN2, 0.0, 0.0])
    loss = grpo(std="none", clip=0.1).loss(terms, hand_made_forest(TWO_GROUPS, ONE_EDGE_EACH, [0.0] * 4))
    # max(.5, .9), max(-2, -1.1), 2, -2
    assert loss.item() == pytest.approx((0.9 - 1.1) / 4, abs=1e-6)  # float32
    torch.autograd.backward(loss)
    assert gradient(terms) == pytest.approx([0.0, 0.0, 0.5, -0.5], abs=1e-6)


def test_each_step_of_a_path_counts_and_a_shared_edge_sums_its_descendants() -> None:
    forest = hand_made_forest([[0.0, 2.0]], [[0, 1], [0, 2]], [0.0] * 3)
    terms = terms_of([0.0, 0.0, 0.0])
    loss = grpo().loss(terms, forest)
    torch.autograd.backward(loss)
    # A = (-1, 1), four (leaf, step) pairs: the shared edge's parts cancel.
    assert loss.item() == 0.0
    assert gradient(terms) == pytest.approx([0.0, 0.25, -0.25], abs=1e-6)  # float32


def test_kl_is_averaged_over_paths_and_weighted() -> None:
    forest = hand_made_forest([[0.0, 2.0]], [[0, 1], [0, 2]], [0.0] * 3)
    loss = grpo(kl_beta=0.5).loss(terms_of([0.0] * 3, kl=[0.1, 0.2, 0.4]), forest)
    # (.1 + .2 + .1 + .4) / 4, halved
    assert loss.item() == pytest.approx(0.1, abs=1e-6)  # float32


@pytest.mark.parametrize(
    ("zero_advantage", "loss", "of_log_prob", "of_kl"),
    # A = (-1, 1, 0, 0). keep: means over four leaves. drop: over the two of the group that has a preference.
    [
        ("keep", 0.5 * (0.1 + 0.2 + 0.4 + 0.8) / 4, [0.25, -0.25, 0, 0], [0.125] * 4),
        ("drop", 0.5 * (0.1 + 0.2) / 2, [0.5, -0.5, 0, 0], [0.25, 0.25, 0, 0]),
    ],
)
def test_leaves_of_zero_advantage_count_or_do_not(
    zero_advantage: str, loss: float, of_log_prob: list[float], of_kl: list[float]
) -> None:
    terms = terms_of([0.0] * 4, kl=[0.1, 0.2, 0.4, 0.8])
    forest = hand_made_forest([[0.0, 2.0], [1.0, 1.0]], ONE_EDGE_EACH, [0.0] * 4)
    found = grpo(kl_beta=0.5, zero_advantage=zero_advantage).loss(terms, forest)
    assert found.item() == pytest.approx(loss, abs=1e-6)  # float32
    torch.autograd.backward(found)
    assert gradient(terms) == pytest.approx(of_log_prob, abs=1e-6)
    assert gradient(terms, "kl") == pytest.approx(of_kl, abs=1e-6)


def test_a_leaf_at_its_groups_mean_is_dropped_and_only_such_leaves_do_nothing() -> None:
    terms = terms_of([0.0] * 3, kl=[0.1, 0.2, 0.4])
    drop = grpo(kl_beta=1.0, zero_advantage="drop")
    assert drop.loss(terms, hand_made_forest([[0.0, 1.0, 2.0]], [[0], [1], [2]], [0.0] * 3)).item() == pytest.approx(0.25)
    flat = drop.loss(terms, hand_made_forest([[1.0] * 3], [[0], [1], [2]], [0.0] * 3))
    torch.autograd.backward(flat)
    assert (flat.item(), gradient(terms), gradient(terms, "kl")) == (0.0, [0.0] * 3, [0.0] * 3)


def test_each_update_trains_on_its_own_part_of_the_leaves() -> None:
    forest = hand_made_forest([[0.0, 2.0, 4.0, 6.0]], ONE_EDGE_EACH, [0.0] * 4)
    objective = grpo(parts=2, std="none")
    trained: list[Tensor] = []
    for update in (0, 1):
        forest.update = update
        terms = terms_of([0.0] * 4)
        torch.autograd.backward(objective.loss(terms, forest))
        leaves = objective.trained_leaves(forest)
        assert leaves is not None
        trained.append(leaves)
        # -A / 2 for the two leaves of the part, by the advantages of the whole group.
        wanted = torch.where(leaves, torch.tensor([3.0, 1.0, -1.0, -3.0]) / 2, 0.0)
        assert gradient(terms) == pytest.approx(wanted.tolist(), abs=1e-6)
    assert torch.equal(trained[0], ~trained[1])
    assert int(trained[0].sum()) == 2


def test_leaves_of_another_part_and_dropped_ones_cost_no_row() -> None:
    toy, _, forest = drawn(plan_of("independent"), rewards=[[0.0, 1.0, 2.0, 3.0], [1.0] * 4])
    rows = len(forest.rows)
    assert backward(toy, grpo(), forest).rows == rows
    assert backward(toy, grpo(zero_advantage="drop"), forest).rows == rows // 2
    halves = [backward(toy, grpo(parts=2, zero_advantage="drop"), forest, update=update).rows for update in (0, 1)]
    assert sum(halves) == rows // 2
    assert backward(toy, grpo(parts=2), forest).rows == rows // 2


def test_parts_need_the_credit_of_leaves() -> None:
    with pytest.raises(UserError, match="parts=2 divides the leaves, which needs credit=leaf, got credit="):
        grpo(parts=2, credit="edge")


def test_with_edge_credit_it_is_edges_of_zero_advantage_that_are_dropped() -> None:
    forest = drawn_tree()
    terms = terms_of(forest.old_log_prob.tolist())
    torch.autograd.backward(grpo(credit="edge", std="none", zero_advantage="drop").loss(terms, forest))
    # Advantages -2, 2, -3, -1, 1, 3 of six edges; those of the second group, whose rewards are equal, are 0.
    assert gradient(terms) == pytest.approx([2 / 6, -2 / 6, 0, 0, 3 / 6, 1 / 6, -1 / 6, -3 / 6, 0, 0, 0, 0], abs=1e-6)


def test_the_released_kl_leaves_out_the_time_step() -> None:
    forest = hand_made_forest([[0.0, 2.0]], [[0, 1], [0, 2]], [0.0] * 3)
    forest.edge_sigma, forest.edge_sigma_next = torch.tensor([1.0, 0.75, 0.75]), torch.tensor([0.75, 0.25, 0.25])
    objective = grpo(kl_beta=0.5, kl="released")
    terms = terms_of([0.0] * 3, kl=[0.1, 0.2, 0.4])
    # |mu - mu_ref|^2 / (2 sigma_t^2), where the step's variance is sigma_t^2 |dt|: times .25, .5 and .5.
    assert objective.loss(terms, forest).item() == pytest.approx(0.5 * (0.025 + 0.1 + 0.025 + 0.2) / 4, abs=1e-6)  # float32
    terms = {name: value.detach() for name, value in terms.items()}
    assert objective.diagnostics(terms, forest)["kl_reference"] == pytest.approx((0.025 + 0.1 + 0.2) / 3, abs=1e-6)


def test_a_reference_is_asked_for_only_with_a_kl_term() -> None:
    assert grpo(kl_beta=0.01).needs.reference
    assert not grpo().needs.reference


def test_the_kl_part_of_the_loss_is_the_closed_form_over_a_rollout() -> None:
    toy = ToyBackbone()
    toy.nudge(0.2)
    forest = rollout(toy, PROMPTS, chains(4, 3, "sde"), seed=0)
    forest.rewards = torch.tensor([0.0, 1.0, 2.0] * 2)
    loss = backward(toy, grpo(kl_beta=0.7), forest).loss - backward(toy, grpo(), forest).loss
    sigma = forest.row_sigma
    condition = toy.encode(PROMPTS)[forest.row_group]
    x = forest.states[forest.rows]
    policy, base = toy.net(x, sigma, condition), toy.frozen(x, sigma, condition)
    divergences = []
    for row in range(len(forest.rows)):
        numbers = float(sigma[row]), float(forest.edge_sigma_next[row]), 0.7
        (new, std), (ref, _) = (gaussian_step("sde", x[row], v[row].detach(), *numbers) for v in (policy, base))
        pair = (torch.distributions.Normal(m, torch.tensor(std)) for m in (new, ref))
        divergences.append(float(torch.distributions.kl_divergence(*pair).mean()))
    assert loss == pytest.approx(0.7 * np.mean(divergences), rel=1e-4)  # difference of two float32 losses
    assert loss > 1e-3


def in_numpy(forest: RolloutForest, terms: Terms, std: str, clip: float, kl_beta: float, adv_clip: float) -> float:
    """The loss once more, in float64 and numpy."""
    r = forest.by_group(forest.rewards).numpy().astype(np.float64)
    centred = r - np.nanmean(r, axis=1, keepdims=True)
    scale = {
        "group": np.sqrt(np.nanmean(centred**2, axis=1, keepdims=True)),
        "batch": np.nanstd(r),
        "none": 1.0,
    }[std]
    a = np.clip(centred / scale, -adv_clip, adv_clip).reshape(-1, 1)
    log_ratio = (terms["log_prob"] - forest.old_log_prob).detach().numpy().astype(np.float64)
    ratio = np.exp(log_ratio)[forest.leaf_edges.numpy()]
    surrogate = np.minimum(ratio * a, np.clip(ratio, 1 - clip, 1 + clip) * a)
    kl = terms["kl"].detach().numpy()[forest.leaf_edges.numpy()]
    kl = np.where(np.isnan(a), np.nan, kl)
    return float(-np.nanmean(surrogate) + kl_beta * np.nanmean(kl))


@pytest.mark.parametrize("std", ["group", "batch", "none"])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("kl_beta", [0.0, 0.4])
def test_the_loss_equals_a_second_implementation_off_policy(std: str, missing: bool, kl_beta: float) -> None:
    rng = np.random.default_rng(1)
    paths = [[12 * g + i, 12 * g + 3 + 3 * i + j] for g in range(2) for i in range(3) for j in range(3)]
    rewards = rng.normal(size=(2, 9))
    if missing:
        rewards[0, 2] = rewards[1, 5] = rewards[1, 8] = NAN
    old = rng.normal(0, 0.5, 24)
    forest = hand_made_forest(rewards.tolist(), paths, old.tolist())
    terms = terms_of((old + rng.normal(0, 0.15, 24)).tolist(), np.abs(rng.normal(size=24)).tolist())
    options = {"std": std, "clip": 0.1, "kl_beta": kl_beta, "adv_clip": 1.3}
    loss = grpo(**options).loss(terms, forest)
    expected = in_numpy(forest, terms, **options)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(expected, abs=1e-5)  # float32
    torch.autograd.backward(loss)
    assert np.isfinite(gradient(terms)).all()
    if missing:
        assert [gradient(terms)[int(forest.leaf_edges[leaf, 1])] for leaf in (2, 14, 17)] == [0.0] * 3


@pytest.mark.parametrize("std", ["group", "batch", "none"])
@pytest.mark.parametrize("group", [[0.1, 0.1, 0.1], [0.1, NAN, 0.1], [0.7, NAN, NAN], [NAN, NAN, NAN]])
def test_a_group_with_nothing_to_prefer_gets_exactly_no_gradient(std: str, group: list[float]) -> None:
    forest = hand_made_forest([group, [0.0, 1.0, 2.0]], [[i] for i in range(6)], [0.0] * 6)
    terms = terms_of([0.1, 0.2, 0.3, 0.0, 0.0, 0.0])
    torch.autograd.backward(grpo(std=std).loss(terms, forest))
    assert gradient(terms)[:3] == [0.0, 0.0, 0.0]
    assert all(abs(g) > 0 for g in (gradient(terms)[3], gradient(terms)[5]))


def test_a_batch_of_equal_or_missing_rewards_has_loss_and_gradient_zero() -> None:
    for rewards in ([[0.3, 0.3, 0.3]], [[NAN, NAN, NAN]]):
        terms = terms_of([0.1, 0.2, 0.3])
        loss = grpo(std="batch").loss(terms, hand_made_forest(rewards, [[0], [1], [2]], [0.0] * 3))
        torch.autograd.backward(loss)
        assert loss.item() == 0.0
        assert gradient(terms) == [0.0, 0.0, 0.0]


def test_a_constant_added_to_rewards_and_the_order_of_leaves_change_nothing() -> None:
    old, new = [0.0, 0.1, -0.2, 0.3], [0.1, 0.0, -0.1, 0.2]
    loss = grpo(clip=0.15).loss(terms_of(new), hand_made_forest(TWO_GROUPS, ONE_EDGE_EACH, old))
    shifted = hand_made_forest([[r + 8 for r in group] for group in TWO_GROUPS], ONE_EDGE_EACH, old)
    swapped = hand_made_forest([[2.0, 0.0], [5.0, 1.0]], [[1], [0], [3], [2]], old)
    for forest in (shifted, swapped):
        assert grpo(clip=0.15).loss(terms_of(new), forest).item() == pytest.approx(loss.item(), abs=1e-6)  # float32


def test_diagnostics_tell_advantages_clipped_edges_and_kl() -> None:
    forest = hand_made_forest(TWO_GROUPS, ONE_EDGE_EACH, [0.0] * 4)
    terms = {"log_prob": torch.tensor([LN2, 0.0, 0.05, -LN2]), "kl": torch.tensor([0.0, 1.0, 2.0, 3.0])}
    numbers = grpo(std="none", clip=0.1, kl_beta=1.0).diagnostics(terms, forest)
    assert numbers == pytest.approx({"advantage_abs": 1.5, "clip_share": 0.5, "kl_reference": 1.5})
    assert "kl_reference" not in grpo().diagnostics({"log_prob": torch.zeros(4)}, forest)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"clip_range": 0.1}, "objective grpo: there is no key 'clip_range'; did you mean .*'clip'"),
        ({"std": "global"}, "objective grpo: std: .*'group', 'batch' or 'none', got 'global'"),
        ({"kl_beta": -1}, "kl_beta: .*greater than or equal to 0, got -1"),
        ({"adv_clip": 0}, "adv_clip: .*greater than 0, got 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_objective("grpo", **settings)


def drawn_tree() -> RolloutForest:
    """Two groups of four leaves: splits in two at steps 1 and 2; edges 0-3 are of step 1, edges 4-11 of step 2."""
    forest = rollout(ToyBackbone(), PROMPTS, tree(4, (1, 2), children=2, rule="sde"), seed=0)
    forest.rewards = torch.tensor([0.0, 2.0, 4.0, 6.0, 1.0, 1.0, 1.0, 1.0])
    return forest


def test_an_edge_gets_the_mean_advantage_of_its_descendants() -> None:
    # A of the first group is R - 3.
    found = grpo(credit="edge", std="none").edge_advantage(drawn_tree())
    assert found.tolist() == [-2.0, 2.0, 0.0, 0.0, -3.0, -1.0, 1.0, 3.0, 0.0, 0.0, 0.0, 0.0]


def test_depth_credit_standardises_the_mean_rewards_of_each_step() -> None:
    found = grpo(credit="depth").edge_advantage(drawn_tree())
    # Step 1: means 1 and 5. Step 2: 0, 2, 4, 6 of deviation sqrt 5.
    expected = [-1, 1, 0, 0, *(np.array([-3, -1, 1, 3]) / math.sqrt(5)), 0, 0, 0, 0]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)  # float32


def test_weighted_depth_credit_takes_likelier_paths_for_more() -> None:
    forest = drawn_tree()
    # Below the first split paths of the same branch differ by their last edge alone: e^l is 3 to 1, and 1 to 1.
    forest.old_log_prob = torch.tensor([5.0, -300.0, 0.0, 0.0, math.log(3), 0.0, 0.25, 0.25, 0.1, 0.2, 0.3, 0.4])
    forest.rewards = torch.tensor([0.0, 2.0, 4.0, 6.0, 0.1, 0.1, 0.1, 0.1])
    found = grpo(credit="depth_weighted", std="none").edge_advantage(forest)
    # Step 1: (3 x 0 + 2) / 4 = 0.5 and 5, of mean 2.75. Step 2: single leaves. The second group has nothing to prefer.
    assert found.tolist() == pytest.approx([-2.25, 2.25, 0, 0, -3, -1, 1, 3, 0, 0, 0, 0], abs=1e-6)  # float32
    assert found[8:].tolist() == found[2:4].tolist() * 2 == [0.0] * 4


def test_depth_credit_with_a_samples_deviation_is_the_code_of_branchgrpo() -> None:
    found = grpo(credit="depth", std_correction=1).edge_advantage(drawn_tree())
    # Step 1: 1 and 5, of deviation sqrt 8. Step 2: 0, 2, 4, 6, of deviation sqrt(20 / 3).
    expected = [-2 / math.sqrt(8), 2 / math.sqrt(8), 0, 0, *(np.array([-3, -1, 1, 3]) / math.sqrt(20 / 3)), 0, 0, 0, 0]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)  # float32


def test_nested_depth_credit_weighs_at_each_split_by_its_own_edges_alone() -> None:
    sde, split = Step("sde", 0.5), Step("sde", 0.5, 2)
    forest = rollout(ToyBackbone(), PROMPTS[:1], Plan((split, split, split, sde, Step())), seed=0)
    ln3, ln9 = math.log(3), math.log(9)
    forest.old_log_prob = torch.tensor(
        # Splits: two edges; their four; the four of the first branch in pairs of equal ones, then those of the second.
        [*(40.0, -40.0), *(0.0, ln3, 0.5, 0.5), *(0.0, 0.0, ln9, ln9, 0.0, ln3, 0.0, 0.0),
         # Between splits, or behind them, an edge has no rival.
         *(70.0, -70.0, 3.0, 5.0, 0.0, 1.0, 2.0, 3.0)]
    )  # fmt: skip
    forest.rewards = torch.tensor([0.0, 2.0, 4.0, 6.0, 1.0, 5.0, 3.0, 7.0])
    found = grpo(credit="depth_nested", std="none").edge_advantage(forest)
    # First branch: 1/4 (0 + 2)/2 + 3/4 (4 + 6)/2 = 4. Second: 1/2 (1/4 1 + 3/4 5) + 1/2 (3 + 7)/2 = 4.5. Mean 4.25.
    assert found[:2].tolist() == pytest.approx([-0.25, 0.25], abs=1e-5)  # float32, after log-probs of 40
    # Their children: 1, 5, 4, 5, of mean 3.75.
    assert found[2:6].tolist() == pytest.approx([-2.75, 1.25, 0.25, 1.25], abs=1e-5)
    # By path probability the first branch's leaves weigh 1, 1, 27 and 27, and what is behind them counts too.
    assert abs(float(grpo(credit="depth_weighted", std="none").edge_advantage(forest)[0]) + 0.25) > 0.5


@pytest.mark.parametrize("credit", ["edge", "depth", "depth_weighted", "depth_nested"])
def test_an_edge_without_any_scored_descendant_is_left_out(credit: str) -> None:
    forest = drawn_tree()
    forest.rewards = torch.tensor([NAN, NAN, 4.0, 6.0, NAN, 1.0, 2.0, 3.0])
    objective = grpo(credit=credit)
    gone = objective.edge_advantage(forest).isnan().nonzero()[:, 0].tolist()
    assert gone == [0, 4, 5, 8]
    terms = terms_of(forest.old_log_prob.tolist())
    torch.autograd.backward(objective.loss(terms, forest))
    assert [gradient(terms)[edge] for edge in gone] == [0.0] * 4
    # Eight edges count; at ratio 1 each gets minus its advantage over eight.
    assert gradient(terms)[7] == pytest.approx(-float(objective.edge_advantage(forest)[7]) / 8, abs=1e-6)


def test_on_chains_edge_credit_is_leaf_credit() -> None:
    forest = rollout(ToyBackbone(), PROMPTS, chains(4, 3, "sde"), seed=0)
    forest.rewards = torch.tensor([0.0, 1.0, 5.0, 2.0, 2.0, 3.0])
    moved = (forest.old_log_prob + 0.01 * torch.sin(torch.arange(len(forest.old_log_prob)))).tolist()
    by_leaf, by_edge = (grpo(credit=c, clip=0.005).loss(terms_of(moved), forest).item() for c in ("leaf", "edge"))
    assert by_edge == pytest.approx(by_leaf, abs=1e-6)  # float32


def test_the_guarded_ratio_is_the_exponential_of_the_regulated_log_ratio() -> None:
    forest = hand_made_forest([[0.0, 2.0]], [[0], [1]], [0.0] * 2)
    terms = {"log_prob": torch.tensor([9.0, 9.0]), "drift_noise": torch.tensor([LN2, LN2])}
    # A = (-1, 1), ratio 2: max(2, 1.1) and max(-2, -1.1).
    assert grpo(ratio="guard", clip=0.1).loss(terms, forest).item() == pytest.approx((2 - 1.1) / 2, abs=1e-6)  # float32


def test_step_weights_by_hand() -> None:
    forest = hand_made_forest([[0.0, 2.0]], [[0], [1]], [0.0] * 2)
    forest.edge_sigma, forest.edge_sigma_next = torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.3])
    # 1 / .4 and 1 / .2 over their mean 3.75.
    assert grpo(step_weight="inverse_dt").weight(forest).tolist() == pytest.approx([2 / 3, 4 / 3], abs=1e-6)
    # cps draws with sigma_next sin(pi / 4): the weights are as .5 to .3.
    assert grpo(step_weight="noise").weight(forest).tolist() == pytest.approx([1.25, 0.75], abs=1e-6)
    terms = terms_of([0.0, 0.0])
    torch.autograd.backward(grpo(step_weight="noise").loss(terms, forest))
    assert gradient(terms) == pytest.approx([1.25 / 2, -0.75 / 2], abs=1e-6)


DANCE = {"group_size": 12, "initial_noise": "shared", "rule": "dance", "noise_level": 0.3}
TREE = {"steps": 10, "levels": 4, "children": 2, "rule": "sde"}
BRANCH = {"steps": 20, "levels": 4, "splits": [0, 3, 6, 9], "children": 2, "rule": "dance", "noise_level": 0.3}
WINDOW = {"steps": 25, "window": 4, "group_size": 12, "rule": "sde", "initial_noise": "shared"}


@pytest.mark.parametrize(
    ("sampler", "settings", "roots", "leaves", "replayed"),
    [
        # Twelve chains of five stochastic steps from one noise: its own row, and 12 for each of the steps 1 to 4.
        ("independent", DANCE, 1, 12, 1 + 4 * 12),
        # Four stochastic steps, the first from the one noise.
        ("sliding_window", WINDOW, 1, 12, 1 + 3 * 12),
        # (k^w - 1) / (k - 1) rows a tree.
        ("tree_window", TREE, 1, 16, 15),
        # Widths of 1; 2 at steps 1 to 3, 4 at 4 to 6, 8 at 7 to 9, 16 at 10 to 18.
        ("branch", BRANCH, 1, 16, 1 + 3 * 2 + 3 * 4 + 3 * 8 + 9 * 16),
    ],
)
def test_the_samplers_of_its_kin_draw_what_their_papers_say(
    sampler: str, settings: dict[str, object], roots: int, leaves: int, replayed: int
) -> None:
    plan = load_sampler(sampler, **settings).plan(0.0, np.random.default_rng(0))
    assert (plan.roots, plan.leaves, plan.replay_rows()) == (roots, leaves, replayed)


# ---------------------------------------------------------------------------------------------------- the trust region


def test_a_kl_limit_drops_outward_steps_beyond_it_and_no_step_back() -> None:
    # Advantages -1, 1, -2, 2. The first two steps have moved outward, the others back; all are beyond the limit but the second.
    terms = terms_of([-LN2, LN2, LN2, -LN2])
    terms["kl_behaviour"] = torch.tensor([0.2, 0.05, 0.2, 0.2])
    forest = hand_made_forest(TWO_GROUPS, ONE_EDGE_EACH, [0.0] * 4)
    loss = grpo(std="none", trust_region="kl", kl_limit=0.1).loss(terms, forest)
    # r = (.5, 2, 2, .5): 0, -2, 4 and -1. Dropped steps count in the mean.
    assert loss.item() == pytest.approx((-2 + 4 - 1) / 4, abs=1e-6)  # float32
    torch.autograd.backward(loss)
    assert gradient(terms) == pytest.approx([0, -2 / 4, 4 / 4, -1 / 4], abs=1e-6)


def test_without_a_kl_limit_all_steps_count_and_a_limit_of_zero_drops_outward_ones() -> None:
    forest = hand_made_forest(TWO_GROUPS, ONE_EDGE_EACH, [0.0] * 4)
    for limit, expected in ((1e9, [0.5, -2, 4, -1]), (0.0, [0.0, 0.0, 4, -1])):
        terms = terms_of([-LN2, LN2, LN2, -LN2])
        terms["kl_behaviour"] = torch.full((4,), 1e-9)
        torch.autograd.backward(grpo(std="none", trust_region="kl", kl_limit=limit).loss(terms, forest))
        assert gradient(terms) == pytest.approx([value / 4 for value in expected], abs=1e-6)


def test_the_divergence_to_the_behaviour_policy_is_that_of_the_steps_gaussians() -> None:
    """KL(N(m, s) || N(m', s)) by torch's own formula, from the moments of a second implementation of the step."""
    toy, behaviour, forest = drawn(Plan((Step("sde", 0.7), Step("cps", 0.5), Step()), roots=4))
    found = backward(toy, grpo(), forest, update=1).terms["kl_behaviour"]
    for e in range(len(found)):
        row, step = int(forest.edge_row[e]), forest.plan.steps[int(forest.edge_step[e])]
        x, sigma = forest.states[forest.rows[row]][None], forest.edge_sigma[e : e + 1]
        condition = toy.encode([PROMPTS[int(forest.row_group[row])]])
        gaussians = []
        for net in (toy.net, behaviour):
            v = net(x, sigma, condition).detach()
            mean, std = gaussian_step(step.rule, x, v, float(sigma), float(forest.edge_sigma_next[e]), step.eta)
            gaussians.append(torch.distributions.Normal(mean, torch.as_tensor(std).expand_as(mean)))
        expected = torch.distributions.kl_divergence(gaussians[1], gaussians[0]).mean()
        assert float(found[e]) == pytest.approx(float(expected), rel=1e-3, abs=1e-7)


def test_the_first_update_with_a_kl_limit_is_that_of_a_clip() -> None:
    gradients = []
    for region in ("clip", "kl"):
        toy, _, forest = drawn(plan_of("dynamic_tree"), move=0.0)
        backward(toy, grpo(trust_region=region), forest, on_policy=True)
        gradients.append(toy.gradient())
    assert torch.equal(gradients[0], gradients[1])
    assert gradients[0].any()


# ---------------------------------------------------------------------------------------------------- the ratio of a path


def test_the_ratio_of_a_path_is_the_product_over_its_steps() -> None:
    # Two leaves that share their first step. Ratios 2 x 1.5 and 2 x 0.25; advantages -1 and 1.
    forest = hand_made_forest([[0.0, 2.0]], [[0, 1], [0, 2]], [0.0] * 3)
    terms = terms_of([LN2, math.log(1.5), math.log(0.25)])
    objective = grpo(ratio="path", clip=0.2)
    loss = objective.loss(terms, forest)
    assert loss.item() == pytest.approx((max(3.0, 1.2) + max(-0.5, -0.8)) / 2, abs=1e-6)  # float32
    torch.autograd.backward(loss)
    assert gradient(terms) == pytest.approx([(3 - 0.5) / 2, 3 / 2, -0.5 / 2], abs=1e-6)
    assert not objective.separable


def test_a_kl_limit_on_paths_is_one_on_the_sum_over_their_steps() -> None:
    forest = hand_made_forest([[0.0, 2.0]], [[0, 1], [0, 2]], [0.0] * 3)
    for limit, expected in ((0.25, [0.0, 0.0]), (0.35, [-LN2, LN2])):
        terms = terms_of([0.0, -LN2, LN2])
        terms["kl_behaviour"] = torch.tensor([0.2, 0.1, 0.1])
        torch.autograd.backward(grpo(ratio="path", trust_region="kl", kl_limit=limit).loss(terms, forest))
        assert [bool(g) for g in gradient(terms)[1:]] == [bool(e) for e in expected]


def test_the_ratio_of_a_path_is_refused_with_the_credit_of_edges() -> None:
    with pytest.raises(UserError, match="ratio=path is that of a leaf, which needs credit=leaf, got credit=edge"):
        grpo(ratio="path", credit="edge")
