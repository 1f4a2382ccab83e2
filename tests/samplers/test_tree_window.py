import numpy as np
import pytest

from alignbench import UserError, load_sampler

RNG = np.random.default_rng(0)
PUBLISHED = {"steps": 10, "children": 2, "levels": 4}


def test_splits_are_consecutive_and_move_with_the_training() -> None:
    sampler = load_sampler("tree_window", **PUBLISHED)
    # Steps 1..8 may split: five places for four splits.
    found = [sampler.plan(u, RNG).splits for u in (0.0, 0.19, 0.21, 0.99, 1.0, 1.5)]
    assert found == [(1, 2, 3, 4), (1, 2, 3, 4), (2, 3, 4, 5), (5, 6, 7, 8), (5, 6, 7, 8), (5, 6, 7, 8)]


def test_the_published_geometry_has_16_leaves_and_15_rows_in_replay() -> None:
    plan = load_sampler("tree_window", **PUBLISHED).plan(0.0, RNG)
    assert (plan.roots, plan.leaves, plan.replay_rows()) == (1, 16, 15)
    # 1 + 1 + 2 + 4 + 8, then 16 in each of five steps.
    assert plan.model_rows() == 96


def test_the_geometric_law_of_the_start() -> None:
    sampler, rng = load_sampler("tree_window", schedule="geometric", ratio=0.5, **PUBLISHED), np.random.default_rng(0)
    starts = [sampler.plan(0.0, rng).splits[0] for _ in range(6200)]
    # 1/2 to the j over 31/16: 3200, 1600, 800, 400, 200; five standard deviations are at most 197.
    assert np.bincount(starts, minlength=6)[1:] == pytest.approx([3200, 1600, 800, 400, 200], abs=197)


def test_a_tree_without_room_is_refused() -> None:
    with pytest.raises(UserError, match=r"levels=4 splits do not fit into steps 1\.\.3 of 5"):
        load_sampler("tree_window", steps=5, children=2, levels=4)
