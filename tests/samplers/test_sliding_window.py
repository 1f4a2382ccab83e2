from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignbench import Sampler, UserError, load_sampler, rollout
from alignbench.rollouts import executor
from alignbench.rollouts.noise import Key, normal
from tests.support.toys import PROMPTS, ToyBackbone

RNG = np.random.default_rng(0)


def start(sampler: Sampler, progress: float) -> int:
    return sampler.plan(progress, RNG).stochastic_steps[0]


def test_steps_are_stochastic_inside_the_window_and_cost_no_training_row_outside() -> None:
    plan = load_sampler("sliding_window", steps=5, group_size=4, window=2, noise_level=0.5).plan(0.0, RNG)
    assert [s.eta for s in plan.steps] == [0.5, 0.5, 0, 0, 0]
    assert (plan.leaves, plan.model_rows(), plan.replay_rows()) == (4, 20, 8)


def test_the_window_moves_from_the_noise_to_the_image_and_leaves_the_last_step_alone() -> None:
    sampler = load_sampler("sliding_window", steps=6, window=2)
    # Four places; each has a quarter of the training.
    assert [start(sampler, u) for u in (-1, 0, 0.24, 0.26, 0.5, 0.76, 1, 2)] == [0, 0, 0, 1, 2, 3, 3, 3]
    assert all(not sampler.plan(u, RNG).steps[-1].stochastic for u in np.linspace(0, 1, 50))


def test_passes_start_again_at_the_noise() -> None:
    sampler = load_sampler("sliding_window", steps=4, window=2, passes=3)
    assert [start(sampler, (i + 0.5) / 6) for i in range(6)] == [0, 1, 0, 1, 0, 1]


def test_random_windows_stand_everywhere_alike() -> None:
    sampler, rng = load_sampler("sliding_window", steps=6, window=2, order="random"), np.random.default_rng(0)
    places = [sampler.plan(0.0, rng).stochastic_steps[0] for _ in range(4000)]
    # Four places of 1000 each; five standard deviations of a binomial are 137.
    assert np.bincount(places, minlength=4) == pytest.approx(1000, abs=137)


def test_a_window_without_room_is_refused() -> None:
    with pytest.raises(UserError, match="window=4 leaves no deterministic step at the end of steps=4"):
        load_sampler("sliding_window", steps=4, window=4)


def test_a_group_may_start_from_one_noise_and_part_at_the_windows_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"steps": 6, "group_size": 4, "window": 2}
    own = load_sampler("sliding_window", **settings).plan(0.5, RNG)
    shared = load_sampler("sliding_window", **settings, initial_noise="shared").plan(0.5, RNG)
    assert (shared.roots, shared.leaves, shared.splits, shared.stochastic_steps) == (1, 4, (2,), (2, 3))
    # Rows until the window's first step are the group's, not each rollout's.
    assert (own.model_rows(), shared.model_rows()) == (24, 3 + 3 * 4)
    assert (own.replay_rows(), shared.replay_rows()) == (8, 1 + 4)

    def of_one_root(keys: Sequence[Key], *rest: Any) -> Tensor:
        return normal([(*key[:-1], 0) if key[-2] == "root" else key for key in keys], *rest)

    forest = rollout(ToyBackbone(), PROMPTS, shared, seed=0)
    monkeypatch.setattr(executor, "normal", of_one_root)
    apart = rollout(ToyBackbone(), PROMPTS, own, seed=0)  # four rollouts that happen to start from the same noise
    assert torch.allclose(forest.leaf_latents, apart.leaf_latents, atol=1e-5)  # float32
    ones = torch.ones_like
    assert torch.equal(forest.path_sum(ones(forest.old_log_prob)), apart.path_sum(ones(apart.old_log_prob)))
    assert torch.allclose(forest.path_sum(forest.old_log_prob), apart.path_sum(apart.old_log_prob), atol=1e-5)
