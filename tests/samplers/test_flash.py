import numpy as np
import pytest

from alignbench import UserError, load_sampler
from alignbench.rollouts.executor import rollout
from tests.support.toys import PROMPTS, ToyBackbone

RNG = np.random.default_rng(0)


def test_behind_the_window_fewer_steps_cover_what_is_left_of_the_schedule() -> None:
    sampler = load_sampler("flash", steps=10, group_size=4, window=3, compress=0.4)
    plan = sampler.plan(0.0, RNG)
    # Seven steps are left behind a window at the noise; 0.4 x 7 = 2.8, so three are made, of 3, 2 and 2.
    assert [s.stochastic for s in plan.steps] == [True] * 3 + [False] * 3
    assert plan.schedule_indices == (0, 1, 2, 3, 6, 8, 10)
    assert (plan.leaves, plan.model_rows(), plan.replay_rows()) == (4, 24, 12)
    # At the end of the training one step is left, and nothing can be saved.
    assert sampler.plan(1.0, RNG).schedule_indices == tuple(range(11))


def test_the_published_setting_makes_13_steps_of_25_at_the_start() -> None:
    # 21 left, 0.4 x 21 = 8.4: nine steps behind a window of four.
    plan = load_sampler("flash", steps=25, group_size=12, window=4, rule="sde").plan(0.0, RNG)
    assert (len(plan.steps), plan.schedule_indices[-1], plan.model_rows()) == (13, 25, 13 * 12)


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.7, 1.0])
def test_the_window_is_where_sliding_windows_is_and_compress_1_is_the_same_plan(progress: float) -> None:
    settings = {"steps": 9, "window": 3, "group_size": 5}
    sliding = load_sampler("sliding_window", **settings).plan(progress, RNG)
    assert load_sampler("flash", **settings, compress=1.0).plan(progress, RNG) == sliding
    flash = load_sampler("flash", **settings).plan(progress, RNG)
    assert flash.stochastic_steps == sliding.stochastic_steps
    assert flash.replay_rows() == sliding.replay_rows()
    assert flash.schedule_indices[-1] == 9


def test_steps_behind_the_window_go_from_and_to_sigmas_of_the_full_schedule() -> None:
    toy = ToyBackbone()
    forest = rollout(toy, PROMPTS, load_sampler("flash", steps=9, window=2, group_size=2).plan(0.0, RNG), seed=0)
    schedule = toy.sigmas(9)
    assert sorted(set(forest.edge_sigma.tolist())) == pytest.approx(sorted(schedule[:2].tolist()))
    x = forest.states[forest.edge_child[forest.edge_step == 1]]
    group = forest.edge_group[forest.edge_step == 1]
    for here, there in ((2, 5), (5, 7), (7, 9)):  # 7 left, three steps
        v = toy.net(x, schedule[here].expand(len(x)), toy.encode(PROMPTS)[group])
        x = x + (schedule[there] - schedule[here]) * v
    assert (x - forest.leaf_latents).abs().max() < 2e-6  # three float32 steps


def test_a_window_without_room_is_refused() -> None:
    with pytest.raises(UserError, match="window=6 leaves no deterministic step at the end of steps=6"):
        load_sampler("flash", window=6)


@pytest.mark.parametrize(
    ("progress", "left", "behind"),
    # The public code makes int(0.4 (left + 1)) points behind the window, which are one step fewer: 8, 8, 3, 1 and 1 points.
    [(0.0, 21, 7), (2 / 21 + 0.01, 19, 7), (14 / 21 + 0.01, 7, 2), (18 / 21 + 0.01, 3, 1), (1.0, 1, 1)],
)
def test_the_public_codes_count_of_steps_behind_the_window(progress: float, left: int, behind: int) -> None:
    sampler = load_sampler("flash", steps=25, group_size=12, window=4, rounding="released")
    plan = sampler.plan(progress, RNG)
    assert plan.schedule_indices[-behind - 1] == 25 - left
    assert (len(plan.steps), plan.schedule_indices[-1]) == (25 - left + behind, 25)
    assert plan.model_rows() == 12 * len(plan.steps)


def test_the_public_codes_steps_at_the_start_are_even() -> None:
    plan = load_sampler("flash", steps=25, window=4, rounding="released").plan(0.0, RNG)
    assert plan.schedule_indices == (0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25)
