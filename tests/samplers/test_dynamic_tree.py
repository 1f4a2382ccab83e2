import math

import numpy as np
import pytest

from alignbench import RolloutForest, Sampler, UserError, load_sampler
from alignbench.testing import hand_made_forest
from samplers._tree import distinct


def draws(sampler: Sampler, progress: float, n: int = 300) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([sampler.plan(progress, rng).splits for _ in range(n)])


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.5, 0.8, 1.0, 1.7, -0.2])
def test_splits_are_always_distinct_ordered_and_inside_and_leave_27_leaves(progress: float) -> None:
    sampler, rng = load_sampler("dynamic_tree"), np.random.default_rng(1)
    for _ in range(300):
        plan = sampler.plan(progress, rng)
        assert len(plan.splits) == 3
        assert 1 <= plan.splits[0] < plan.splits[1] < plan.splits[2] <= 4
        assert plan.stochastic_steps == plan.splits
        assert (plan.roots, plan.leaves, plan.replay_rows()) == (1, 27, 13)
        assert {s.eta for s in plan.steps if s.stochastic} == {0.7}


@pytest.mark.parametrize(
    ("progress", "splits"),
    # Means (1, 2, 3) to (1, 3, 5), the latter cut at the last step that may split, 4.
    [(0.0, (1, 2, 3)), (0.25, (1, 2, 4)), (0.5, (1, 2, 4)), (0.75, (1, 3, 4)), (1.0, (1, 3, 4)), (3.0, (1, 3, 4))],
)
def test_kappa_zero_gives_the_rounded_means(progress: float, splits: tuple[int, ...]) -> None:
    sampler = load_sampler("dynamic_tree", kappa=0)
    assert sampler.plan(progress, np.random.default_rng(0)).splits == splits
    assert sampler.plan(progress, np.random.default_rng(9)).splits == splits


def test_early_first_splits_may_be_initial_noises_as_in_the_released_code() -> None:
    sampler = load_sampler("dynamic_tree", early_split="roots", kappa=0)
    early, late = (sampler.plan(u, np.random.default_rng(0)) for u in (0.0, 1.0))
    # (1, 2, 3) and (1, 3, 4) without their first.
    assert (early.roots, early.splits, early.leaves, early.model_rows()) == (3, (2, 3), 27, 72)
    assert (late.roots, late.splits, late.leaves, late.model_rows()) == (3, (3, 4), 27, 48)


@pytest.mark.parametrize("kappa", [0.0, 6.0])
def test_splits_move_from_early_to_late_steps_as_training_progresses(kappa: float) -> None:
    sampler = load_sampler("dynamic_tree", kappa=kappa)
    means = [draws(sampler, u).mean(0) for u in (0.0, 0.5, 1.0)]
    assert means[0].sum() < means[1].sum() < means[2].sum()
    # Late training branches late, which costs less: the published mean is about 65 rows at the start and 45 at the end.
    costs = [np.mean([sampler.plan(u, np.random.default_rng(i)).model_rows() for i in range(100)]) for u in (0.0, 1.0)]
    assert costs[0] > costs[1] + 5


def test_draws_concentrate_about_their_means_as_kappa_grows() -> None:
    settings = {"steps": 40, "early": (6, 15, 25), "late": (6, 15, 25), "first_split": 1}
    wide, narrow = (draws(load_sampler("dynamic_tree", kappa=k, **settings), 0.0) for k in (6.0, 600.0))
    assert (narrow.std(0) < wide.std(0) / 3).all()
    # Beta draws have mean mu_j; rounding and five standard errors (Var = m (1 - m) / 601 of a range of 37) allow .4.
    assert narrow.mean(0) == pytest.approx([6, 15, 25], abs=0.4)


def test_the_middle_split_varies_as_the_beta_law_says() -> None:
    # One level: no neighbour moves a draw. first 1, last 38, m = 1/2: Var(xi) = 1 / (4 (kappa + 1)), range 37.
    sampler = load_sampler("dynamic_tree", steps=40, levels=1, children=2, early=(19.5,), late=(19.5,), kappa=3.0)
    found = draws(sampler, 0.0, 2000)
    assert found.mean() == pytest.approx(19.5, abs=0.9)  # four standard errors of 9.25 / sqrt 2000
    assert found.std() == pytest.approx(37 / 4, rel=0.06)  # about four standard errors


def test_plans_depend_on_the_generator_alone() -> None:
    sampler = load_sampler("dynamic_tree")
    assert np.array_equal(draws(sampler, 0.5, 20), draws(sampler, 0.5, 20))
    assert len({tuple(row) for row in draws(sampler, 0.5, 50)}) > 1


def test_a_tree_that_fills_all_steps_that_may_split_is_always_the_same() -> None:
    sampler = load_sampler("dynamic_tree", steps=5)
    assert {tuple(row) for row in draws(sampler, 0.5, 50)} == {(1, 2, 3)}
    single = load_sampler("dynamic_tree", steps=3, levels=1, early=(1,), late=(1,))
    assert {tuple(row) for row in draws(single, 0.5, 5)} == {(1,)}


@pytest.mark.parametrize(
    ("wanted", "splits"),
    [
        ([1, 2, 3], (1, 2, 3)),
        ([3, 1, 2], (1, 2, 3)),
        ([1, 1, 1], (1, 2, 3)),
        ([4, 4, 4], (2, 3, 4)),
        ([1, 4, 4], (1, 3, 4)),
        ([2, 2, 4], (2, 3, 4)),
        ([0, 9, 9], (1, 3, 4)),
    ],
)
def test_colliding_splits_are_moved_apart_inside_the_range(wanted: list[int], splits: tuple[int, ...]) -> None:
    assert distinct(wanted, 1, 4) == splits


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"levels": 5, "early": (1, 2, 3, 4, 5), "late": (1, 2, 3, 4, 5), "children": 2},
            r"sampler dynamic_tree: levels=5 splits do not fit into steps 1..4 of 6; raise steps or lower levels",
        ),
        ({"tail_guard": 4}, r"levels=3 splits do not fit into steps 1..2 of 6"),
        ({"children": 5}, r"sampler dynamic_tree: children \*\* levels = 5\*\*3 = 125 leaves exceed max_leaves=81"),
        ({"max_leaves": 26}, r"children \*\* levels = 3\*\*3 = 27 leaves exceed max_leaves=26"),
        ({"children": 1}, r"sampler dynamic_tree: children: .*greater than or equal to 2, got 1"),
        ({"levels": 2}, r"early must name 2 steps, one for each level, got \[1.0, 2.0, 3.0\]"),
        ({"late": (1, 3)}, r"late must name 3 steps, one for each level, got \[1.0, 3.0\]"),
        ({"kappa": -1}, r"sampler dynamic_tree: kappa: .*greater than or equal to 0, got -1"),
        ({"split": (1, 2, 3)}, r"sampler dynamic_tree: there is no key 'split'"),
    ],
)
def test_geometries_that_cannot_work_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_sampler("dynamic_tree", **settings)


def noise_level(sampler: Sampler) -> float:
    (level,) = {s.eta for s in sampler.plan(0.5, np.random.default_rng(0)).steps if s.stochastic}
    return level


def with_rewards(*rewards: float) -> RolloutForest:
    return hand_made_forest([list(rewards)], [[i] for i in range(len(rewards))], [0.0] * len(rewards))


def test_rewards_move_the_bounds_and_alpha_by_hand() -> None:
    sampler = load_sampler("dynamic_tree", schedule="reward", reward_bounds=(0.0, 1.0))
    sampler.observe(with_rewards(0.2, math.nan, 0.6))
    # Bounds a hundredth of the way to 0.2 and 0.6; the mean 0.4 stands at (0.4 - .002) / (.996 - .002) between them.
    place = (0.4 - 0.002) / 0.994
    expected = {"low": 0.002, "high": 0.996, "alpha": 0.1 + 0.15 * (place - 0.1)}
    assert sampler.state() == pytest.approx(expected, abs=1e-6)  # float32 rewards
    sampler.observe(with_rewards(math.nan, math.nan))
    assert sampler.state() == pytest.approx(expected, abs=1e-6)


def test_low_rewards_branch_early_and_loudly_and_high_ones_late() -> None:
    means, levels = [], []
    for reward in (0.0, 1.0):
        sampler = load_sampler("dynamic_tree", schedule="reward", steps=28, reward_bounds=(0.0, 1.0), min_gap=3)
        for _ in range(100):
            sampler.observe(with_rewards(reward, reward))
        splits = draws(sampler, 0.5)
        assert (np.diff(splits, axis=1) >= 3).all()
        assert splits.min() >= 1
        assert splits.max() <= 26
        means.append(splits.mean())
        levels.append(noise_level(sampler))
    assert means[0] < 10
    assert means[1] > 17
    assert levels[0] > levels[1]
    # alpha starts at 0.1: 0.7 (1 + 0.3 x 0.9 - 0.2 x 0.1).
    assert noise_level(load_sampler("dynamic_tree", schedule="reward")) == pytest.approx(0.875)


def test_what_was_observed_survives_a_checkpoint() -> None:
    one, two = (load_sampler("dynamic_tree", schedule="reward", steps=28) for _ in range(2))
    for reward in (0.3, 0.5, 0.9):
        one.observe(with_rewards(reward, 0.1))
    two.load_state(one.state())
    assert [one.plan(0, np.random.default_rng(i)) for i in range(9)] == [
        two.plan(0, np.random.default_rng(i)) for i in range(9)
    ]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"schedule": "reward", "reward_bounds": (0.4, 0.4)}, "reward_bounds must rise"),
        ({"min_gap": 2}, r"levels=3 splits with min_gap=2 do not fit into steps 1\.\.4"),
    ],
)
def test_settings_of_the_schedules_that_cannot_be_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_sampler("dynamic_tree", **settings)
