import math
from dataclasses import replace

import pytest
import torch

from alignbench import RolloutForest, UserError, load_objective
from objectives.gardo import GARDO, nearest_distance
from tests.support.by_hand import clipped, leaf_values
from tests.support.replays import REWARDS, by_autograd, check, drawn, plan_of
from tests.support.toys import hand_made_forest

NAN = math.nan
ONE_EDGE_EACH = [[0], [1], [2], [3]]


def gardo(**settings: object) -> GARDO:
    objective = load_objective("gardo", **settings)
    assert isinstance(objective, GARDO)
    return objective


def at_angles(rewards: list[float], degrees: list[float]) -> RolloutForest:
    """One group of four leaves whose latents point where they are told to, at lengths that must not matter."""
    forest = hand_made_forest([rewards], ONE_EDGE_EACH, [0.0] * 4)
    angle = torch.deg2rad(torch.tensor(degrees))
    length = torch.tensor([1.0, 2.0, 0.5, 3.0])
    forest.states = torch.zeros(len(forest.states), 2)
    forest.states[forest.leaves] = length[:, None] * torch.stack([torch.cos(angle), torch.sin(angle)], dim=1)
    return forest


def test_the_distance_to_the_nearest_other_leaf() -> None:
    forest = at_angles([0.0, 1.0, 2.0, 3.0], [0, 60, 90, 180])
    here = torch.ones(1, 4, dtype=torch.bool)
    # Neighbours are 60, 30, 30 and 90 degrees away.
    expected = [1 - 0.5, 1 - math.sqrt(0.75), 1 - math.sqrt(0.75), 1.0]
    assert nearest_distance(forest.leaf_latents.view(1, 4, -1), here)[0].tolist() == pytest.approx(expected, abs=1e-6)
    here[0, 2] = False  # without the leaf at 90 degrees
    found = nearest_distance(forest.leaf_latents.view(1, 4, -1), here)[0]
    assert found.tolist() == pytest.approx([0.5, 0.5, 1 - math.sqrt(0.75), 1.5], abs=1e-6)


def test_only_good_leaves_are_scaled_by_how_far_they_are_from_others() -> None:
    forest = at_angles([0.0, 1.0, 2.0, 5.0], [0, 60, 90, 180])
    d = [0.5, 1 - math.sqrt(0.75), 1 - math.sqrt(0.75), 1.0]
    # The mean is 2: the third leaf is at it and has advantage 0 either way.
    found = gardo(adv_clip=10).advantage(forest)[0].tolist()
    assert found == pytest.approx([-2, -1, 0, 3 * d[3] / (sum(d) / 4)], abs=1e-5)


def test_a_missing_reward_is_nobodys_neighbour_and_gets_no_advantage() -> None:
    forest = at_angles([0.0, 2.0, NAN, 4.0], [0, 60, 90, 180])
    # d of the others: .5, .5 and 1.5, of mean 5 / 6.
    assert gardo().advantage(forest)[0].tolist() == pytest.approx([-2, 0, 0, 2 * 1.5 * 6 / 5], abs=1e-5)


def test_equal_rewards_have_no_advantage() -> None:
    assert gardo().advantage(at_angles([1.0] * 4, [0, 60, 90, 180])).tolist() == [[0.0] * 4]


def with_scores(**scores: list[float]) -> RolloutForest:
    forest = hand_made_forest([scores["main"]], ONE_EDGE_EACH, [0.0] * 4)
    forest.scores = {name: torch.tensor(values) for name, values in scores.items()}
    forest.weights = {"main": 1.0}
    return forest


def test_the_kl_counts_for_leaves_that_rank_higher_in_reward_than_in_auxiliary_ones() -> None:
    # Ranks: main 1, 2, 3, 4; first 4, 1, 2, 3; second 3, 1, 2, 4. Doubt: 2.5, -1, -1, -.5.
    forest = with_scores(main=[9.0, 8.0, 7.0, 6.0], first=[0.0, 3.0, 2.0, 1.0], second=[0.2, 0.4, 0.3, 0.1])
    assert gardo(kl_share=0.25).kl_weight(forest).tolist() == [1.0, 0.0, 0.0, 0.0]
    # Only those with a rank gap above 0, however many are allowed.
    assert gardo(kl_share=1.0).kl_weight(forest).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert gardo(kl_share=1.0, doubt="underrated").kl_weight(forest).tolist() == [0.0, 1.0, 1.0, 1.0]


def test_auxiliary_rewards_are_those_without_a_weight_wherever_the_task_lists_them() -> None:
    forest = with_scores(first=[0.0, 3.0, 2.0, 1.0], main=[9.0, 8.0, 7.0, 6.0])  # ranks 4, 1, 2, 3 and 1, 2, 3, 4
    assert gardo().rank_gap(forest).tolist() == [3.0, -1.0, -1.0, -1.0]
    # With a weight each, both are trained on: no image is doubtful.
    forest.weights = {"first": 0.5, "main": 1.0}
    assert gardo().kl_weight(forest).tolist() == [1.0] * 4


def test_the_share_is_one_of_the_doubtful_leaves() -> None:
    # Ranks 1, 2, 3, 4 against 4, 3, 1, 2: the gap is 3, 1, -2, -2.
    forest = with_scores(main=[9.0, 8.0, 7.0, 6.0], other=[0.0, 1.0, 3.0, 2.0])
    assert gardo(kl_share=0.5).kl_weight(forest).tolist() == [1.0, 0.0, 0.0, 0.0]  # one of two
    assert gardo(kl_share=1.0).kl_weight(forest).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_the_share_follows_the_doubt_of_recent_rollouts_and_survives_a_checkpoint() -> None:
    def of_rank_gap(three_two_or_one: int) -> RolloutForest:
        other = {3: [0.0, 3.0, 2.0, 1.0], 2: [1.0, 3.0, 2.0, 0.0], 1: [2.0, 3.0, 1.0, 0.0]}[three_two_or_one]
        return with_scores(main=[9.0, 8.0, 7.0, 6.0], other=other)  # ranks of the first: 1 against 4, 3 or 2

    objective = gardo(kl_share=0.2)
    shares = []
    for gap in (2, 3, 3, 1, 2, 1):
        objective.observe(of_rank_gap(gap))
        shares.append(objective.share)
    # A tenth more where the gap was never so large, a tenth less where it was never so small; ties change nothing.
    assert shares == pytest.approx([0.2, 0.22, 0.22, 0.198, 0.198, 0.198])
    other = gardo(kl_share=0.2)
    other.load_state(objective.state())
    assert (other.share, other.recent) == (objective.share, [2.0, 3.0, 3.0, 1.0, 2.0, 1.0])
    fixed = gardo(kl_share=0.2, kl_share_adapts=False)
    for gap in (1, 3):
        fixed.observe(of_rank_gap(gap))
    assert fixed.share == 0.2


def test_the_share_stays_between_a_fifth_and_twice_of_what_it_was_at_first() -> None:
    objective = gardo(kl_share=0.1)
    other = torch.arange(40.0)
    for top in range(1, 40):  # the first of forty leaves is overrated by more and more ranks
        main = other.clone()
        main[0] = top + 0.5
        forest = hand_made_forest([main.tolist()], [[i] for i in range(40)], [0.0] * 40)
        forest.scores, forest.weights = {"main": main, "other": other}, {"main": 1.0}
        objective.observe(forest)
    assert objective.share == pytest.approx(0.2)


def test_equal_scores_share_their_rank() -> None:
    # Auxiliary ranks are all 2.5, so the gaps are 1.5, .5, -.5 and -1.5.
    forest = with_scores(main=[4.0, 3.0, 2.0, 1.0], other=[0.0] * 4)
    assert gardo(kl_share=1.0).kl_weight(forest).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_with_one_reward_the_kl_counts_for_all() -> None:
    assert gardo().kl_weight(with_scores(main=[1.0, 2.0, 3.0, 4.0])).tolist() == [1.0] * 4


def test_the_loss_of_one_group_by_hand() -> None:
    forest = at_angles([0.0, 1.0, 2.0, 5.0], [0, 60, 90, 180])
    forest.scores, forest.weights = {"main": forest.rewards, "other": -forest.rewards}, {"main": 1.0}
    terms = {"log_prob": torch.zeros(4, requires_grad=True), "kl": torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)}
    loss = gardo(kl="exact", kl_beta=0.5, kl_share=0.25, adv_clip=10).loss(terms, forest)
    d = [0.5, 1 - math.sqrt(0.75), 1 - math.sqrt(0.75), 1.0]
    good = 3 * d[3] / (sum(d) / 4)
    # Ratios are 1; the best leaf is the most overrated one (rank 1 against 4), and its KL is 4.
    assert loss.item() == pytest.approx((2 + 1 - good) / 4 + 0.5 * 4 / 4, abs=1e-5)
    torch.autograd.backward(loss)
    assert terms["log_prob"].grad is not None
    assert terms["kl"].grad is not None
    assert terms["log_prob"].grad.tolist() == pytest.approx([0.5, 0.25, 0, -good / 4], abs=1e-5)
    assert terms["kl"].grad.tolist() == pytest.approx([0, 0, 0, 0.125], abs=1e-7)


def test_leaves_of_zero_advantage_are_dropped_with_their_kl() -> None:
    forest = at_angles([0.0, 1.0, 2.0, 5.0], [0, 60, 90, 180])
    terms = {"log_prob": torch.zeros(4), "kl": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    d = [0.5, 1 - math.sqrt(0.75), 1 - math.sqrt(0.75), 1.0]
    # One reward casts no doubt, so the KL counts for all but the third leaf, which is at the mean.
    loss = gardo(kl="exact", kl_beta=0.5, adv_clip=10, zero_advantage="drop").loss(terms, forest).item()
    assert loss == pytest.approx((2 + 1 - 3 * d[3] / (sum(d) / 4)) / 3 + 0.5 * (1 + 2 + 4) / 3, abs=1e-5)


def test_credit_is_the_leafs_own() -> None:
    with pytest.raises(UserError, match="objective gardo: credit"):
        load_objective("gardo", credit="edge")


def test_loss_and_gradient_equal_those_of_a_second_implementation() -> None:
    toy, behaviour, forest = drawn(plan_of("fixed_tree"))
    others = [4.0, 1.0, 5.0, 2.0, 8.0, 6.0, 7.0, 3.0]
    forest.scores = {"main": forest.rewards + torch.arange(8) * 1e-3, "other": torch.tensor(others)}  # without ties
    forest.weights = {"main": 1.0}
    objective = gardo(kl="exact", clip=0.01, kl_beta=0.3, kl_share=0.7)
    v = leaf_values(toy, behaviour, forest)
    images = forest.states[forest.leaves].flatten(1)

    def rank(scores: list[float], i: int) -> int:
        return 1 + sum(s > scores[i] for s in scores)

    main = forest.scores["main"].tolist()
    doubts = [rank(others, i) - rank(main, i) for i in range(8)]
    doubtful = sorted((d for d in doubts if d > 0), reverse=True)
    least = doubtful[round(0.7 * len(doubtful)) - 1]
    assert doubtful == [6, 5, 2, 1]
    stds = torch.tensor([math.sin(0.35 * math.pi) * float(s) for s in forest.edge_sigma_next])  # cps at level 0.7
    parts = []
    for leaf in range(8):
        g, k = divmod(leaf, 4)
        nearest = []
        for i in range(4 * g, 4 * g + 4):
            cosines = [torch.cosine_similarity(images[i], images[j], 0).item() for j in range(4 * g, 4 * g + 4) if j != i]
            nearest.append(1 - max(cosines))
        a = REWARDS[g][k] - sum(REWARDS[g]) / 4
        if a > 0:
            a = min(a * nearest[k] / (sum(nearest) / 4), 5.0)
        for t in range(2):
            ratio = torch.exp(v.log_prob[leaf, t] - v.old_log_prob[leaf, t])
            weight = float(stds[forest.leaf_edges[leaf, t]] / stds.mean())
            parts.append(-weight * clipped(ratio, a, 0.01) + 0.3 * (doubts[leaf] >= least) * v.kl[leaf, t])
    check(toy, objective, forest, *by_autograd(toy, torch.stack(parts).mean()))


def test_a_constant_added_to_rewards_and_the_order_of_leaves_change_nothing() -> None:
    forest = at_angles([0.0, 1.0, 2.0, 5.0], [0, 60, 90, 180])
    terms = {"log_prob": torch.tensor([0.05, -0.1, 0.0, 0.2]), "kl": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    objective, order = gardo(clip=0.1), [2, 0, 3, 1]
    loss = objective.loss(terms, forest).item()
    leaves, leaf_edges, rewards = forest.leaves[order], forest.leaf_edges[order], forest.rewards[order]
    turned = replace(forest, leaves=leaves, leaf_edges=leaf_edges, rewards=rewards)
    for other in (replace(forest, rewards=forest.rewards + 16), turned):
        assert objective.loss(terms, other).item() == pytest.approx(loss, abs=1e-5)  # float32
