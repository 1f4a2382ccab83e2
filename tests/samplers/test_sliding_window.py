import numpy as np
import pytest

from alignbench import Sampler, UserError, load_sampler

RNG = np.random.default_rng(0)


def start(sampler: Sampler, progress: float) -> int:
    return sampler.plan(progress, RNG).stochastic_steps[0]


def test_inside_the_window_steps_are_stochastic_and_outside_they_cost_no_training_row() -> None:
    plan = load_sampler("sliding_window", steps=5, group_size=4, window=2, noise_level=0.5).plan(0.0, RNG)
    assert [s.noise_level for s in plan.steps] == [0.5, 0.5, 0, 0, 0]
    assert (plan.leaves, plan.model_rows(), plan.replay_rows()) == (4, 20, 8)


def test_the_window_moves_from_the_noise_to_the_picture_and_leaves_the_last_step_alone() -> None:
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
