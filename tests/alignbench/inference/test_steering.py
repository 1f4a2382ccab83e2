"""Feynman-Kac steering: weights by hand, its limits, and what it is without a reward."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch

from alignbench import load_backbone
from alignbench.backbones.gaussian_mixture import GaussianMixture
from alignbench.backbones.mixture.mixtures import from_images
from alignbench.backbones.mixture.scenarios import scored, world
from alignbench.config.inference import InferenceConfig
from alignbench.inference import solvers
from alignbench.inference.candidates import candidate
from alignbench.inference.reward import Reward
from alignbench.inference.steering import Weights, resampling_steps, reward_calls, steer
from alignbench.rollouts.executor import sample
from alignbench.rollouts.noise import group_keys
from tests.support.toys import PROMPTS, ToyBackbone

KEYS = group_keys(PROMPTS)


def fk(**settings: object) -> InferenceConfig:
    return InferenceConfig(method="fk", **settings)


def constant(images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    return {"reward": np.full(len(images), 3.0)}


CONSTANT = Reward(constant, {"reward": 1.0})


def test_one_particle_is_the_stochastic_sampler_to_the_bit() -> None:
    policy = ToyBackbone()
    found = steer(policy, PROMPTS, KEYS, 3, CONSTANT, fk(n=1), steps=6, seed=4)
    assert torch.equal(found, solvers.draw(policy, PROMPTS, KEYS, 3, steps=6, seed=4, solver="sde"))


def test_one_particle_without_noise_is_the_base_model_to_the_bit() -> None:
    policy = ToyBackbone()
    found = steer(policy, PROMPTS, KEYS, 3, CONSTANT, fk(n=1, eta=0.0), steps=6, seed=4)
    assert torch.equal(found, sample(policy, PROMPTS, 3, 6, 4))


@pytest.mark.parametrize("potential", ["max", "difference", "sum"])
def test_a_constant_reward_gives_plain_samples(potential: str) -> None:
    policy = ToyBackbone()
    found = steer(policy, PROMPTS, KEYS, 8, CONSTANT, fk(n=4, potential=potential), steps=10, seed=4)
    draw = partial(solvers.draw, policy, PROMPTS, images=8, steps=10, seed=4, solver="sde")
    plain = torch.stack([draw(candidate(KEYS, j)) for j in range(4)])
    same = (found == plain).flatten(2).all(2)  # particles x images
    assert same.any(0).all()
    assert len(set(same.int().argmax(0).tolist())) == 4


def test_the_steps_of_the_paper() -> None:
    assert resampling_steps(100, 4) == [20, 40, 60, 80]
    assert resampling_steps(10, 4) == [2, 4, 6, 8]
    assert (resampling_steps(10, 0), resampling_steps(10, 1), resampling_steps(1, 4)) == ([], [5], [])
    assert reward_calls(fk(n=4), 100) == 20


@pytest.mark.parametrize(("potential", "arguments"), [("max", [1.0, 1.0]), ("difference", [1.0, -0.6]), ("sum", [1.0, 1.4])])
def test_potentials_by_hand(potential: str, arguments: list[float]) -> None:
    weights = Weights(1, 2, 2.0, potential)
    for t, score in enumerate((1.0, 0.4)):
        before = weights.log_weight[0, 0].item()
        weights.add(torch.tensor([[score, 0.0]], dtype=torch.float64))
        assert weights.log_weight[0, 0].item() - before == pytest.approx(2 * arguments[t])
        assert weights.log_weight[0, 1].item() == 0
    assert weights.applied[0, 0].item() == pytest.approx(2 * sum(arguments))


@pytest.mark.parametrize("potential", ["max", "difference", "sum"])
def test_without_resampling_the_final_weights_are_those_of_the_final_reward_alone(potential: str) -> None:
    weights = Weights(1, 3, 1.5, potential)
    for scores in ([0.1, 0.9, -0.3], [0.5, 0.2, 0.0]):
        weights.add(torch.tensor([scores], dtype=torch.float64))
    weights.finish(torch.tensor([[0.3, 0.1, 0.7]], dtype=torch.float64))
    assert weights.log_weight[0].tolist() == pytest.approx([0.45, 0.15, 1.05])


def test_after_resampling_the_potentials_of_the_ancestors_are_divided_out() -> None:
    weights = Weights(1, 2, 1.0, "max")
    weights.add(torch.tensor([[2.0, 0.5]], dtype=torch.float64))
    weights.resample(0, torch.tensor([0, 0]))
    assert weights.log_weight[0].tolist() == [0, 0]
    weights.add(torch.tensor([[1.0, 3.0]], dtype=torch.float64))  # the largest so far: 2 and 3
    assert weights.log_weight[0].tolist() == [2, 3]
    weights.finish(torch.tensor([[1.0, 4.0]], dtype=torch.float64))
    # exp(2) and exp(3) since the resampling, times exp(r) / (exp(2) exp(2)) and exp(r) / (exp(2) exp(3)).
    assert weights.log_weight[0].tolist() == [2 + 1 - 4, 3 + 4 - 5]


def test_particles_are_resampled_where_less_than_half_of_them_count() -> None:
    weights = Weights(2, 4, 1.0, "max")
    weights.add(torch.tensor([[9.0, 0, 0, 0], [0.5, 0, 0, 0]], dtype=torch.float64))
    assert weights.degenerate().tolist() == [True, False]


def test_a_particle_without_a_score_keeps_its_last_one_and_is_not_drawn_in_the_end() -> None:
    weights = Weights(2, 2, 1.0, "difference")
    nan = float("nan")
    weights.add(torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64))
    weights.add(torch.tensor([[nan, 2.0], [0.0, 0.0]], dtype=torch.float64))
    assert weights.log_weight[0].tolist() == [1, 2]
    weights.finish(torch.tensor([[nan, 5.0], [nan, nan]], dtype=torch.float64))
    assert weights.log_weight[0].tolist() == [-torch.inf, 5]
    assert weights.log_weight[1].tolist() == [0, 0]


@pytest.mark.parametrize("potential", ["max", "difference"])
def test_many_particles_reach_the_tilted_target(potential: str) -> None:
    prompt, strength, count, steps = "quadratic 1", 4.0, 300, 32
    policy = load_backbone("gaussian_mixture", device="cpu")
    assert isinstance(policy, GaussianMixture)

    def score(images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return {"reward": scored(from_images(images), prompt, true=False)}

    config = fk(n=24, strength=strength, potential=potential, eta=1.0)
    found = steer(policy, [prompt], group_keys([prompt]), count, Reward(score, {"reward": 1.0}), config, steps=steps, seed=0)
    reward = world(prompt).reward(found.double())
    target, base = policy.tilted(prompt, strength).reward, policy.tilted(prompt, 0.0).reward
    error = float(reward.std()) / count**0.5
    assert float(reward.mean()) == pytest.approx(target, abs=4 * error + 0.05 * (target - base))
    assert target - base > 20 * error


@pytest.mark.parametrize("potential", ["max", "difference", "sum"])
def test_a_particle_that_never_had_a_score_counts_as_the_others_do_on_average(potential: str) -> None:
    nan = float("nan")
    weights = Weights(2, 3, 1.0, potential)
    # With 0 in its place the unscored particle would have e^2 times the weight of the others.
    weights.add(torch.tensor([[-2.0, -3.0, nan], [nan, nan, nan]], dtype=torch.float64))
    assert weights.log_weight[0].tolist() == [-2, -3, -2.5]
    assert weights.log_weight[1].tolist() == [0, 0, 0]
    weights.add(torch.tensor([[-2.0, -3.0, -2.5], [-1.0, -2.0, nan]], dtype=torch.float64))
    assert weights.log_weight[1].tolist() == [-1, -2, -1.5]
