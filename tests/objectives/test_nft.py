from dataclasses import replace
from statistics import mean, pstdev
from typing import Any

import pytest
import torch

from alignbench import RolloutForest, load_objective
from alignbench.rollouts.terms import Velocities
from alignbench.training.engine import backward
from objectives.nft import NFT
from tests.support.toys import ToyBackbone, two_groups_of_three

NAN = float("nan")


@pytest.fixture
def policy() -> ToyBackbone:
    return ToyBackbone()


@pytest.fixture
def forest(policy: ToyBackbone) -> RolloutForest:
    return two_groups_of_three(policy, [0.0, 1.0, 2.0, 0.3, 0.3, 0.3])


def nft(**settings: Any) -> NFT:
    objective = load_objective("nft", **settings)
    assert isinstance(objective, NFT)
    return objective


def test_the_old_policys_decay_grows_with_the_updates_to_its_largest() -> None:
    # DiffusionNFT's two schedules.
    assert [nft().behaviour_ema_decay(n) for n in (0, 1, 250, 500, 900)] == pytest.approx([0, 0.001, 0.25, 0.5, 0.5])
    late = nft(decay_rate=0.0075, decay_start=75, decay_max=0.999)
    assert [late.behaviour_ema_decay(n) for n in (0, 75, 95, 900)] == pytest.approx([0, 0, 0.15, 0.999])
    assert nft().needs.behaviour_is_ema
    assert not nft(decay_rate=0).needs.behaviour_is_ema


def test_reward_weight_by_hand(forest: RolloutForest) -> None:
    # z = -sqrt 1.5, 0, sqrt 1.5; r = z / 2 + 1/2 at a clip of 1, which is beyond 0 and 1 at both ends.
    assert nft(adv_clip=1.0).reward_weight(forest)[0].tolist() == [0.0, 0.5, 1.0]
    assert nft().reward_weight(forest)[0].tolist() == pytest.approx([0.5 - 1.5**0.5 / 10, 0.5, 0.5 + 1.5**0.5 / 10], abs=1e-6)


def test_with_the_batchs_deviation_r_stays_near_a_half_in_a_group_of_small_spread(forest: RolloutForest) -> None:
    # As the code has it: (reward - group mean) / population deviation of all six rewards.
    rewards = [[0.0, 1.0, 2.0], [0.50, 0.51, 0.54]]
    forest.rewards = torch.tensor(rewards).flatten()
    scale = pstdev([r for group in rewards for r in group])
    expected = [[0.5 + (r - mean(group)) / scale / 10 for r in group] for group in rewards]
    found = nft(std="batch").reward_weight(forest)
    assert found.flatten().tolist() == pytest.approx([r for group in expected for r in group], abs=1e-6)
    assert found[1].tolist() == pytest.approx([0.4973, 0.4989, 0.5037], abs=1e-4)
    # By the group's own deviation they are as far apart as in any other group.
    assert nft().reward_weight(forest)[1].tolist() == pytest.approx([0.4019, 0.4608, 0.6373], abs=1e-4)


def test_groups_without_spread_count_unless_dropped_images_without_a_reward_never_do(
    forest: RolloutForest,
) -> None:
    dropping = nft(draws=2, flat_groups="drop")
    assert dropping.rows(forest, 0).leaf.tolist() == [0, 0, 1, 1, 2, 2]
    assert nft().rows(forest, 0).leaf.tolist() == [0, 1, 2, 3, 4, 5]
    forest.rewards[[1, 4]] = NAN
    assert dropping.rows(forest, 0).leaf.tolist() == [0, 0, 2, 2]
    assert nft().rows(forest, 0).leaf.tolist() == [0, 2, 3, 5]
    forest.rewards[:] = 1.0
    assert len(dropping.rows(forest, 0)) == 0


def test_equal_rewards_pull_the_policy_to_a_lagging_old_one_and_nowhere_at_it(forest: RolloutForest) -> None:
    forest.rewards[:] = 1.0
    objective = nft(kl_beta=0.0, beta=0.5)
    rows = objective.rows(forest, 0)
    generator = torch.Generator().manual_seed(2)
    v, old = (torch.randn(rows.x.shape, generator=generator) for _ in range(2))

    def gradient(at: torch.Tensor) -> torch.Tensor:
        at = at.clone().requires_grad_()
        objective.loss(objective.terms(rows, Velocities(at, None, old)), forest).backward()
        assert at.grad is not None
        return at.grad

    assert not gradient(old).any()
    # A step against the gradient brings v nearer to v_old in every row.
    nearer = (gradient(v) * (v - old)).flatten(1).sum(1)
    assert (nearer > 0).all()


def test_updates_take_disjoint_parts_of_the_images(forest: RolloutForest) -> None:
    objective = nft(parts=2, draws=2)
    halves = [set(objective.rows(forest, update).leaf.tolist()) for update in range(3)]
    assert [len(half) for half in halves] == [3, 3, 3]
    assert halves[0] | halves[1] == set(range(6))
    assert halves[2] == halves[0]
    # r is that of the whole rollout's statistics.
    rows = objective.rows(forest, 1)
    terms = objective.terms(rows, Velocities(rows.x, rows.x, rows.x))
    assert torch.equal(terms["reward_weight"], objective.reward_weight(forest).flatten()[rows.leaf])


def test_times_of_the_steps_are_the_rollouts_own_each_once_for_a_image(forest: RolloutForest) -> None:
    # Three steps by the toy's schedule 2 t / (1 + t); draws beyond them begin again.
    rows = nft(times="steps", draws=5).rows(forest, 0)
    assert rows.leaf.tolist() == [leaf for leaf in range(6) for _ in range(5)]
    levels = [1.0, 0.8, 0.5]
    orders = rows.sigma.view(6, 5).tolist()
    for order in orders:
        assert sorted(order[:3], reverse=True) == pytest.approx(levels)
        assert len(set(order[3:])) == 2
    assert len({tuple(order) for order in orders}) > 1


def test_loss_by_hand(forest: RolloutForest) -> None:
    terms = {
        "positive": torch.tensor([1.0, 2.0, 3.0]),
        "negative": torch.tensor([5.0, 4.0, 1.0]),
        "velocity_distance": torch.ones(3),
    }
    terms["reward_weight"] = torch.tensor([0.0, 0.5, 1.0])
    # (5 + (2 + 4) / 2 + 3) / 3, over b = 2; and a tenth of the distance.
    assert float(nft(adv_clip=1.0, beta=2.0, kl_beta=0.1).loss(terms, forest)) == pytest.approx(11 / 3 / 2 + 0.1, abs=1e-6)


def test_terms_are_the_errors_of_the_predicted_images(forest: RolloutForest) -> None:
    """The second implementation predicts x_0 from v+ and v-, as the paper writes it."""
    rows = nft().rows(forest, 0)
    generator = torch.Generator().manual_seed(0)
    v, old, reference = (torch.randn(rows.x.shape, generator=generator) for _ in range(3))
    found = nft(beta=0.3).terms(rows, Velocities(v, reference, old))
    for n in range(len(rows)):
        sigma = float(rows.sigma[n])
        plus = 0.3 * v[n] + 0.7 * old[n]
        minus = 1.3 * old[n] - 0.3 * v[n]
        for name, velocity in (("positive", plus), ("negative", minus)):
            error = (rows.x[n] - sigma * velocity) - rows.x0[n]
            assert float(found[name][n]) == pytest.approx(float((error**2).mean() / error.abs().mean()), rel=1e-4)
        assert float(found["velocity_distance"][n]) == pytest.approx(float(((v[n] - reference[n]) ** 2).mean()), rel=1e-5)


def test_on_the_first_update_a_middling_image_teaches_nothing_and_a_good_one_does(
    policy: ToyBackbone, forest: RolloutForest
) -> None:
    rows = nft().rows(forest, 0).part(0, 3)
    v = torch.randn(rows.x.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    terms = nft(kl_beta=0.0, adv_clip=1.0).terms(rows, Velocities(v, None, v.detach()))
    nft(kl_beta=0.0, adv_clip=1.0).loss(terms, forest).backward()
    assert v.grad is not None
    towards = (v.grad * (v.detach() - (rows.noise - rows.x0))).flatten(1).sum(1)  # > 0 where a step goes to the image
    # Of the worst image r = 0, of the middle one 1/2 where the two parts cancel, of the best 1.
    assert towards[0] < 0
    assert not v.grad[1].any()
    assert towards[2] > 0


@pytest.mark.parametrize("micro_batch", [1, 2, None])
def test_later_updates_compare_with_the_policy_of_the_rollout(forest: RolloutForest, micro_batch: int | None) -> None:
    fresh = ToyBackbone()
    at_rollout = [p.detach().clone() for p in fresh.parameters()]
    fresh.nudge(0.1)
    objective = nft(beta=0.5)
    found = backward(fresh, objective, forest, update=1, micro_batch=micro_batch, behaviour=at_rollout)
    rows = objective.rows(forest, 1)
    condition = fresh.encode(["a", "b"])[rows.group]
    nets = fresh.net, fresh.frozen, ToyBackbone().net
    v, reference, old = (net(rows.x, rows.sigma, condition) for net in nets)
    loss = objective.loss(objective.terms(rows, Velocities(v, reference.detach(), old.detach())), forest)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(fresh.net.parameters()))])
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(fresh.gradient(), expected, atol=1e-6)
    assert found.forward_rows == 6 * ((1 if micro_batch is None else 2) + 2)


def test_on_the_first_update_the_old_policy_costs_nothing(policy: ToyBackbone, forest: RolloutForest) -> None:
    assert backward(policy, nft(kl_beta=0.0), forest).forward_rows == 6


def test_reward_weight_follows_the_images_and_not_the_level_of_rewards(forest: RolloutForest) -> None:
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    found = nft().reward_weight(forest).flatten()
    assert torch.allclose(
        nft().reward_weight(replace(forest, rewards=forest.rewards[order])).flatten(), found[order], atol=1e-6
    )
    assert torch.allclose(nft().reward_weight(replace(forest, rewards=forest.rewards + 16)).flatten(), found, atol=1e-6)


def test_the_gradient_of_the_terms_by_hand(forest: RolloutForest) -> None:
    """With the weight w held, d/dv of mean (x0(v+) - x_0)^2 / w is -2 sigma b (x0(v+) - x_0) / (D w)."""
    rows, b = nft().rows(forest, 0), 0.3
    generator = torch.Generator().manual_seed(0)
    v, old = (torch.randn(rows.x.shape, generator=generator) for _ in range(2))
    v.requires_grad_()
    found = nft(beta=b).terms(rows, Velocities(v, None, old))
    sigma, size = rows.sigma.view(-1, 1, 1, 1), v[0].numel()
    for name, mixed, sign in (("positive", b * v + (1 - b) * old, -1), ("negative", (1 + b) * old - b * v, 1)):
        error = ((rows.x - sigma * mixed) - rows.x0).detach()
        expected = sign * 2 * sigma * b * error / size / error.abs().mean((1, 2, 3), keepdim=True)
        (gradient,) = torch.autograd.grad(found[name].sum(), v, retain_graph=True)
        assert torch.allclose(gradient, expected, atol=1e-5)  # float32
