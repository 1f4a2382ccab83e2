"""Best-of-n: which candidate is taken, and the distribution of the images against its exact one."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch

from alignbench import load_backbone
from alignbench.backbones.gaussian_mixture import GaussianMixture
from alignbench.backbones.mixture.mixtures import from_images
from alignbench.backbones.mixture.scenarios import scored, world
from alignbench.inference.candidates import best_of_n, candidate
from alignbench.inference.reward import Reward
from alignbench.rollouts.executor import decode, sample
from alignbench.rollouts.noise import group_keys
from alignbench.statistics import best_of_n_kl_bound
from tests.support.toys import PROMPTS, ToyBackbone


def brightness(images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    return {"brightness": images[..., 0].mean((1, 2)) / 255.0}


REWARD = Reward(brightness, {"brightness": 1.0})
KEYS = group_keys(PROMPTS)
draw = partial(best_of_n, prompts=PROMPTS, keys=KEYS, images=3, steps=4, seed=0)


def test_an_image_is_the_brightest_of_its_candidates_and_no_other_images() -> None:
    policy = ToyBackbone()
    candidates = [sample(policy, PROMPTS, 3, 4, 0, keys=candidate(KEYS, j)) for j in range(4)]
    scores = np.stack([brightness(decode(policy, c), [])["brightness"] for c in candidates])
    found = draw(policy, reward=REWARD, n=4)
    for i, best in enumerate(scores.argmax(0)):
        assert torch.equal(found[i], candidates[best][i])
    assert len(set(scores.argmax(0))) > 1


def test_best_of_one_is_the_image_itself_to_the_bit_and_is_not_scored() -> None:
    def refuse(images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        raise AssertionError("scored")

    policy = ToyBackbone()
    assert torch.equal(draw(policy, reward=Reward(refuse, {"brightness": 1.0}), n=1), sample(policy, PROMPTS, 3, 4, 0))


def test_a_negative_weight_takes_the_darkest() -> None:
    policy = ToyBackbone()
    brightest, darkest = (draw(policy, reward=Reward(brightness, {"brightness": w}), n=4) for w in (1.0, -1.0))
    score = [brightness(decode(policy, x), [])["brightness"] for x in (darkest, sample(policy, PROMPTS, 3, 4, 0), brightest)]
    assert (score[0] <= score[1]).all()
    assert (score[1] <= score[2]).all()


def test_a_candidate_without_a_score_is_never_taken_unless_none_has_one() -> None:
    policy = ToyBackbone()
    calls = iter(range(4))

    def some(images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        j = next(calls)
        scores = np.full(len(images), np.nan) if j != 2 else np.where(np.arange(len(images)) < 5, -9.0, np.nan)
        return {"brightness": scores}

    found = draw(policy, reward=Reward(some, {"brightness": 1.0}), n=4)
    third, first = (sample(policy, PROMPTS, 3, 4, 0, keys=candidate(KEYS, j)) for j in (2, 0))
    assert torch.equal(found[:5], third[:5])
    assert torch.equal(found[5], first[5])


def test_several_rewards_are_standardised_among_the_candidates_of_an_image() -> None:
    policy = ToyBackbone()

    def two(images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        bright = brightness(images, prompts)["brightness"]
        return {"large": 1000 * bright, "small": -bright}

    # On one scale the two cancel but for their weights; as raw numbers `large` would always win.
    found = draw(policy, reward=Reward(two, {"large": 1.0, "small": 2.0}), n=4)
    assert torch.equal(found, draw(policy, reward=Reward(brightness, {"brightness": -1.0}), n=4))
    raw = draw(policy, reward=Reward(two, {"large": 1.0, "small": 2.0}, normalise=False), n=4)
    assert torch.equal(raw, draw(policy, reward=REWARD, n=4))


# ----------------------------------------------------------------------------------------- the exact distribution


def mixture(**settings: object) -> GaussianMixture:
    found = load_backbone("gaussian_mixture", device="cpu", **settings)
    assert isinstance(found, GaussianMixture)
    return found


@pytest.mark.parametrize(("prompt", "n"), [("unequal_modes 1", 2), ("unequal_modes 1", 8), ("noisy_reward 0", 4)])
def test_images_have_the_mean_reward_and_the_modes_of_the_exact_distribution(prompt: str, n: int) -> None:
    policy, count = mixture(), 3000

    def score(images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return {"reward": scored(from_images(images), prompt, true=False)}

    keys = group_keys([prompt])
    found = best_of_n(policy, [prompt], keys, count, Reward(score, {"reward": 1.0}), n=n, steps=16, seed=0).double()
    w, exact = world(prompt), policy.measure([prompt], n)
    reward = w.reward(found)
    error = float(reward.std()) / count**0.5
    assert float(reward.mean()) == pytest.approx(float(exact["exact_reward"].values[0]), abs=5 * error)
    known = policy.distribution(prompt, n)
    assert known is not None
    masses = np.bincount(known.mode, weights=known.mass, minlength=6)
    shares = np.bincount(w.base.log_joint(found).argmax(1).numpy(), minlength=6) / count
    assert np.abs(shares - masses).max() < 5 * 0.5 / count**0.5


@pytest.mark.parametrize("n", [2, 16])
def test_without_ties_the_divergence_from_the_base_is_log_n_minus_n_minus_1_over_n(n: int) -> None:
    policy = mixture(steps=40, quadrature=80)
    found = float(policy.measure(["unequal_modes 0"], n)["kl_base"].values[0])
    assert found == pytest.approx(best_of_n_kl_bound(n), abs=0.03)


def test_best_of_one_measures_the_model_itself() -> None:
    policy = mixture(quadrature=10)
    one, plain = policy.measure(["rare_mode 0"], 1), policy.measure(["rare_mode 0"])
    assert {name: m.values[0] for name, m in one.items()} == {name: m.values[0] for name, m in plain.items()}
    assert "velocity_error" not in policy.measure(["rare_mode 0"], 2)
