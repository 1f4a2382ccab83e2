import numpy as np
import pytest
import torch

from alignbench import RolloutForest, UserError, load_objective, load_sampler, rollout
from alignbench.sampler import Sampler
from alignbench.training.engine import backward
from tests.support.by_hand import gaussian_step
from tests.support.toys import PROMPTS, ToyBackbone

RNG = np.random.default_rng(0)


def test_every_step_but_the_last_draws_noise_and_some_split() -> None:
    plan = load_sampler("branch", steps=5, children=2, splits=(0, 2), noise_level=0.3, split_noise_level=0.9).plan(0.0, RNG)
    assert [s.children for s in plan.steps] == [2, 1, 2, 1, 1]
    assert [s.eta for s in plan.steps] == [0.9, 0.3, 0.9, 0.3, 0.0]
    # 1 + 2 + 2 + 4 + 4 rows, of which the last draws no noise.
    assert (plan.roots, plan.leaves, plan.model_rows(), plan.replay_rows()) == (1, 4, 13, 9)


def test_the_published_geometry() -> None:
    plan = load_sampler(
        "branch", steps=20, children=2, levels=4, splits=(0, 3, 6, 9), rule="dance", noise_level=0.3
    ).plan(0.0, RNG)  # fmt: skip
    assert plan.leaves == 16
    # Model rows for each leaf over the steps, 13.68 in its table: 1 + 3 x (2 + 4 + 8) + 10 x 16 = 203 rows, 12.7 a leaf.
    assert plan.model_rows() == 203


def test_a_scale_of_the_noise_at_splits_moves_what_is_drawn_and_not_its_density() -> None:
    settings = {"steps": 5, "children": 2, "splits": (0, 2), "rule": "dance", "noise_level": 0.3}
    plan = load_sampler("branch", **settings, split_noise_scale=4.0).plan(0.0, RNG)
    assert [s.noise_scale for s in plan.steps] == [4.0, 1.0, 4.0, 1.0, 1.0]
    assert [s.eta for s in plan.steps] == [0.3] * 4 + [0.0]
    toy = ToyBackbone()
    plain, loud = (rollout(toy, PROMPTS, p, seed=0) for p in (load_sampler("branch", **settings).plan(0.0, RNG), plan))
    first = plain.edge_step == 0  # from the same states
    velocity = plain.row_velocity[plain.edge_row[first]]
    x = plain.states[plain.rows][plain.edge_row[first]]
    sigma, sigma_next = toy.sigmas(5)[:2].tolist()
    mean, std = gaussian_step("dance", x, velocity, sigma, sigma_next, 0.3)
    quiet_noise, loud_noise = ((f.states[f.edge_child[first]] - mean) / std for f in (plain, loud))
    assert torch.allclose(loud_noise, 4 * quiet_noise, atol=1e-4)  # float32, over a deviation of 0.1
    # log N(4 eps) - log N(eps) = -(16 - 1) eps^2 / 2, a mean over dimensions.
    expected = -7.5 * quiet_noise.flatten(1).square().mean(1)
    assert torch.allclose(loud.old_log_prob[first] - plain.old_log_prob[first], expected, atol=1e-3)


@pytest.mark.parametrize("splits", [(0,), (0, 0), (0, 5)])
def test_splits_that_do_not_fit_are_refused(splits: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"splits must be 2 different steps between 0 and 4, got"):
        load_sampler("branch", splits=splits)


def test_depth_pruning_leaves_out_a_window_that_moves_from_the_image_to_its_stop() -> None:
    sampler = load_sampler("branch", steps=8, children=2, splits=(0, 2), depth_pruning=3, pruning_stop=2)
    whole = load_sampler("branch", steps=8, children=2, splits=(0, 2)).plan(0.0, RNG)
    trained = [sampler.plan(u, RNG).stochastic_steps for u in (0.0, 0.4, 1.0)]
    # Seven stochastic steps; windows start at 4, 3 and 2.
    assert trained == [(0, 1, 2, 3), (0, 1, 2, 6), (0, 1, 5, 6)]
    plan = sampler.plan(0.0, RNG)
    # 1 + 2 + 2 + 4 x 4 parents without pruning, of which three steps of four branches each are left out.
    assert (whole.replay_rows(), plan.replay_rows()) == (21, 9)
    assert (plan.model_rows(), plan.leaves, plan.splits) == (whole.model_rows(), 4, (0, 2))


def test_pruning_does_not_change_what_is_drawn() -> None:
    toy, settings = ToyBackbone(), {"steps": 6, "children": 2, "splits": (0, 2)}
    whole, pruned = (
        rollout(toy, PROMPTS, load_sampler("branch", **settings, depth_pruning=n).plan(0.5, RNG), seed=0) for n in (0, 2)
    )
    assert torch.equal(whole.leaf_latents, pruned.leaf_latents)
    kept = torch.isin(whole.edge_step, torch.tensor(pruned.plan.stochastic_steps))
    assert torch.equal(whole.old_log_prob[kept], pruned.old_log_prob)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"depth_pruning": 5}, "depth_pruning=5 leaves no step to train on"),
        (
            {"depth_pruning": 3, "pruning_stop": 3},
            "depth_pruning=3 steps from pruning_stop=3 on do not fit into the 5 stochastic",
        ),
        ({"width_pruning": "extreme", "extremes": 5}, "extremes=5 best and as many worst are all of 9 leaves; lower it"),
    ],
)
def test_pruning_without_room_is_refused(settings: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_sampler("branch", **settings)


NAN = float("nan")
REWARDS = [0.3, 0.9, 0.1, 0.2, 0.6, 0.5, NAN, 0.4]
"""Of eight leaves, two below each branch of the last split."""


def width_pruned(**settings: object) -> Sampler:
    return load_sampler("branch", steps=6, children=2, levels=3, splits=(0, 1, 3), **settings)


def grown(sampler: Sampler) -> tuple[ToyBackbone, RolloutForest]:
    toy = ToyBackbone()
    forest = rollout(toy, PROMPTS, sampler.plan(0.0, RNG), seed=0)
    forest.rewards = torch.tensor([*REWARDS, *reversed(REWARDS)])
    return toy, forest


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"width_pruning": "parent_top1"}, [1, 3, 4, 7]),
        ({"width_pruning": "extreme", "extremes": 1}, [1, 2]),
        ({"width_pruning": "extreme", "extremes": 2}, [1, 2, 3, 4]),
    ],
)
def test_width_pruning_keeps_the_best_child_of_each_branch_or_the_groups_extremes(
    settings: dict[str, object], kept: list[int]
) -> None:
    sampler = width_pruned(**settings)
    _, forest = grown(sampler)
    found = sampler.trained_leaves(forest)
    assert found is not None
    assert forest.by_group(found)[0].nonzero().flatten().tolist() == kept
    assert width_pruned().trained_leaves(forest) is None


def test_width_pruning_leaves_out_the_rows_behind_the_leaves_it_drops() -> None:
    sampler = width_pruned(width_pruning="parent_top1")
    toy, forest = grown(sampler)
    kept = sampler.trained_leaves(forest)
    assert kept is not None
    forest.train_only(kept)
    found = backward(toy, load_objective("grpo"), forest)
    # Parents: 1, 2, 4, 4 up to the last split, where each branch has a best child, and 4 of 8 behind it.
    assert forest.plan.replay_rows() == 1 + 2 + 4 + 4 + 8
    assert found.rows == found.forward_rows == 2 * (1 + 2 + 4 + 4 + 4)
    toy.reset_counters()
    backward(toy, load_objective("tmpo"), forest, micro_batch=4)
    assert toy.rows == 2 * found.rows


def test_a_group_of_several_trees_has_as_many_roots() -> None:
    settings = {"steps": 5, "children": 2, "splits": (0, 2), "roots": 3}
    plan = load_sampler("branch", **settings).plan(0.0, RNG)
    assert (plan.roots, plan.leaves) == (3, 12)
    with pytest.raises(UserError, match="extremes=6 best and as many worst are all of 12 leaves"):
        load_sampler("branch", **settings, width_pruning="extreme", extremes=6)
    assert load_sampler("branch", **settings, width_pruning="extreme", extremes=5).plan(0.0, RNG).leaves == 12
