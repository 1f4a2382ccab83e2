from math import exp, log
from statistics import mean, pstdev
from typing import Any

import pytest
import torch
from torch import Tensor

from alignbench import RolloutForest, load_objective
from objectives.dgpo import DGPO
from tests.support.replays import REWARDS, by_autograd, check, drawn, plan_of
from tests.support.toys import PROMPTS, ToyBackbone, hand_made_forest, two_groups_of_three


@pytest.fixture
def forest() -> RolloutForest:
    return two_groups_of_three(ToyBackbone(), [0.0, 1.0, 2.0, 0.3, 0.3, 0.3])


def dgpo(**settings: Any) -> DGPO:
    objective = load_objective("dgpo", **settings)
    assert isinstance(objective, DGPO)
    return objective


def images(*rewards: list[float]) -> RolloutForest:
    """Groups of images of equal latents with these rewards."""
    size = len(rewards[0])
    forest = hand_made_forest(rewards, [[i] for i in range(size * len(rewards))], [0.0] * size * len(rewards))
    forest.states = forest.states[:, :, None, None].expand(-1, -1, 2, 2)
    return forest


def gradient(objective: Any, terms: dict[str, Tensor], forest: RolloutForest) -> tuple[float, Tensor]:
    error = terms["error"].clone().requires_grad_()
    loss = objective.loss({**terms, "error": error}, forest)
    loss.backward()
    assert error.grad is not None
    return float(loss.detach()), error.grad


def test_the_images_of_a_group_share_noise_and_sigma_and_groups_do_not(forest: RolloutForest) -> None:
    rows = dgpo(draws=2).rows(forest, 0)
    assert rows.leaf.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    noise, sigma = rows.noise.view(2, 3, 2, -1), rows.sigma.view(2, 3, 2)
    assert (noise == noise[:, :1]).all()
    assert (sigma == sigma[:, :1]).all()
    assert len(sigma.flatten().unique()) == 4
    assert not torch.equal(noise[0, 0], noise[1, 0])


def test_loss_by_hand() -> None:
    # Rewards 0, 1, 2 standardise to -z, 0, z with z = sqrt 1.5.
    z, beta = 1.5**0.5, 2.0
    terms = {
        "error": torch.tensor([1.0, 2.0, 0.5]),
        "error_reference": torch.tensor([0.9, 7.0, 1.0]),
        "velocity_distance": torch.tensor([1.0, 2.0, 3.0]),
    }
    s = beta / 3 * (-z * 0.1 + z * -0.5)
    expected = log(1 + exp(s)) / beta + 0.1 * 2
    forest = images([0.0, 1.0, 2.0])
    found, slope = gradient(dgpo(beta=beta, kl_beta=0.1), terms, forest)
    assert found == pytest.approx(expected, rel=1e-5)
    weight = 1 / (1 + exp(-s))
    assert slope.tolist() == pytest.approx([-z * weight / 3, 0, z * weight / 3], abs=1e-6)


def test_a_group_of_two_is_diffusion_dpo_over_beta() -> None:
    generator = torch.Generator().manual_seed(0)
    own, reference = (torch.rand(4, generator=generator) for _ in range(2))
    found, slope = gradient(
        dgpo(beta=3.0, kl_beta=0.0), {"error": own, "error_reference": reference}, images([1.0, 0.0], [0.2, 0.7])
    )
    # dpo takes the winners first, then the losers: images 0 and 3, then 1 and 2.
    order = torch.tensor([0, 3, 1, 2])
    terms = {"error": own[order], "error_reference": reference[order]}
    dpo, dpo_slope = gradient(load_objective("dpo", beta=3.0), terms, images([1.0, 0.0], [0.2, 0.7]))
    assert found == pytest.approx(dpo / 3.0, rel=1e-6)
    assert slope[order].tolist() == pytest.approx((dpo_slope / 3.0).tolist(), abs=1e-7)


def test_on_the_first_update_the_gradient_is_half_of_the_advantage_for_any_beta() -> None:
    forest, error = images([0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 0.5])
    for beta in (1.0, 100.0):
        slope = gradient(dgpo(beta=beta, kl_beta=0.0), {"error": error, "error_reference": error}, forest)[1]
        assert slope.tolist() == pytest.approx([-(1.5**0.5) / 6, 0, 1.5**0.5 / 6], abs=1e-6)


def test_a_change_of_all_errors_of_a_group_changes_nothing() -> None:
    forest, generator = images([0.0, 1.0, 5.0]), torch.Generator().manual_seed(0)
    own, reference = (torch.rand(3, generator=generator) for _ in range(2))
    objective = dgpo(beta=4.0, kl_beta=0.0)
    before, after = (gradient(objective, {"error": own + c, "error_reference": reference}, forest) for c in (0.0, 0.5))
    assert after[0] == pytest.approx(before[0], abs=1e-6)
    assert after[1].tolist() == pytest.approx(before[1].tolist(), abs=1e-6)


def test_a_clipped_image_has_no_gradient_and_a_step_back_always_has_one() -> None:
    # The first image is bad, the last good. An error that fell by 0.3 has the ratio e^0.3; one that rose, e^-0.3.
    forest, reference = images([0.0, 1.0, 2.0]), torch.ones(3)
    for old, active in (([0.7, 1.0, 1.3], [False, False]), ([1.3, 1.0, 0.7], [True, True]), ([0.95, 1.0, 1.05], [True, True])):
        terms = {"error": torch.ones(3), "error_reference": reference, "error_old": torch.tensor(old)}
        slope = gradient(dgpo(beta=1.0, kl_beta=0.0, clip=0.1), terms, forest)[1]
        assert [bool(slope[0]), bool(slope[2])] == active


def test_equal_rewards_count_for_the_distance_to_the_base_model_alone(forest: RolloutForest) -> None:
    assert dgpo(kl_beta=0.0).rows(forest, 0).leaf.tolist() == [0, 1, 2]
    assert len(dgpo().rows(forest, 0)) == 6
    forest.rewards[1] = torch.nan
    assert dgpo(kl_beta=0.0).rows(forest, 0).leaf.tolist() == [0, 2]


def test_only_a_clip_needs_an_average_which_draws_if_told_to() -> None:
    assert not dgpo().needs.behaviour
    assert dgpo(clip=0.01).needs.behaviour_is_ema
    assert dgpo(clip=0.01).needs.policy_draws_rollouts
    assert not dgpo(clip=0.01, drawn_by="average").needs.policy_draws_rollouts
    assert [dgpo().behaviour_ema_decay(n) for n in (0, 100, 900)] == pytest.approx([0, 0.1, 0.3])


@pytest.mark.parametrize("clip", [None, 0.02])
def test_loss_and_gradient_equal_those_of_a_second_implementation(clip: float | None) -> None:
    toy, behaviour, forest = drawn(plan_of("dynamic_tree"))
    objective, beta = dgpo(beta=5.0, draws=2, kl_beta=0.3, clip=clip), 5.0
    rows = objective.rows(forest, 1)
    imbalance, distance, clipped = [[torch.zeros(()), torch.zeros(())] for _ in PROMPTS], torch.zeros(()), 0
    for n in range(len(rows)):
        g, k = divmod(int(rows.leaf[n]), 4)
        a = (REWARDS[g][k] - mean(REWARDS[g])) / pstdev(REWARDS[g])
        s, image = rows.sigma[n], forest.states[forest.leaves[rows.leaf[n]]]
        at = ((1 - s) * image + s * rows.noise[n])[None], s[None], toy.encode(PROMPTS[g : g + 1])
        v, old, reference = toy.net(*at)[0], behaviour(*at)[0].detach(), toy.frozen(*at)[0].detach()
        e, e_old, e_reference = (((each - rows.noise[n] + image) ** 2).mean() for each in (v, old, reference))
        ratio = exp(float(e_old - e.detach()))
        if clip is not None and (ratio > 1 + clip if a > 0 else ratio < 1 - clip):
            e, clipped = e.detach(), clipped + 1
        imbalance[g][n % 2] = imbalance[g][n % 2] + beta * a * (e - e_reference) / 4
        distance = distance + ((v - reference) ** 2).mean() / len(rows)
    assert (clipped > 0) == (clip is not None)
    loss = 0.3 * distance + sum(torch.log1p(torch.exp(s)) / beta / 4 for group in imbalance for s in group)
    old_parameters = [p.detach().clone() for p in behaviour.parameters()]
    check(toy, objective, forest, *by_autograd(toy, loss), update=1, old=old_parameters)
