"""The unit of the reward in a Boltzmann target, by hand, and the fixed points that it gives."""

from typing import Any

import pytest
import torch

from alignbench import RolloutForest, UserError, load_objective
from tests.support.replays import two_splits

WITH_TARGET = ["tmpo", "vargrad", "flowrl", "ftb", "subtb", "raft", "crd"]
NARROW, WIDE = [0.0, 0.1, 0.2, 0.3], [0.0, 1.0, 2.0, 3.0]


def target(objective: Any, made: RolloutForest) -> list[list[float]]:
    objective.observe(made)
    found: list[list[float]] = objective.target_reward(made).tolist()
    return found


@pytest.mark.parametrize("name", WITH_TARGET)
def test_by_default_each_group_is_standardised_to_the_last_bit(name: str) -> None:
    made = two_splits(NARROW, WIDE)
    objective: Any = load_objective(name)
    objective.observe(made)
    assert torch.equal(objective.target_reward(made), made.target_reward)


@pytest.mark.parametrize("name", WITH_TARGET)
def test_raw_rewards_are_only_centred(name: str) -> None:
    found = target(load_objective(name, reward_scale="raw"), two_splits(NARROW, WIDE))
    assert found == [pytest.approx([-0.15, -0.05, 0.05, 0.15]), pytest.approx([-1.5, -0.5, 0.5, 1.5])]


def test_batch_divides_by_the_deviation_within_groups_pooled_over_the_rollout() -> None:
    found = target(load_objective("vargrad", reward_scale="batch"), two_splits(NARROW, WIDE))
    pooled = ((1.25 + 0.0125) / 2) ** 0.5
    assert found[1] == pytest.approx([v / pooled for v in (-1.5, -0.5, 0.5, 1.5)])
    assert found[0] == pytest.approx([v / pooled for v in (-0.15, -0.05, 0.05, 0.15)])


def test_running_pools_all_rollouts_so_far_and_survives_a_checkpoint() -> None:
    objective: Any = load_objective("vargrad", reward_scale="running")
    objective.observe(two_splits(WIDE))
    again: Any = load_objective("vargrad", reward_scale="running")
    again.load_state(objective.state())
    found = target(again, two_splits(NARROW))
    assert found[0] == pytest.approx([v / ((1.25 + 0.0125) / 2) ** 0.5 for v in (-0.15, -0.05, 0.05, 0.15)])


def test_checkpoints_of_before_the_scales_load() -> None:
    objective: Any = load_objective("tmpo")
    objective.load_state({"solved_beta": 0.8})
    assert objective.state() == {"solved_beta": 0.8, "square_sum": 0.0, "reward_count": 0}


@pytest.mark.parametrize("scale", ["batch", "running", "raw"])
def test_groups_without_spread_and_missing_rewards_pull_nowhere(scale: str) -> None:
    found = target(load_objective("vargrad", reward_scale=scale), two_splits([0.5] * 4, [float("nan"), 1.0, 2.0, 3.0]))
    assert found[0] == [0.0] * 4
    assert found[1][0] == 0.0
    assert found[1][2] == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(("scale", "changes"), [("group", False), ("batch", False), ("running", False), ("raw", True)])
def test_only_raw_rewards_know_the_scorers_scale(scale: str, changes: bool) -> None:
    plain, large = (
        target(load_objective("vargrad", reward_scale=scale), two_splits([factor * r for r in WIDE])) for factor in (1.0, 10.0)
    )
    assert (plain[0] != pytest.approx(large[0])) == changes


@pytest.mark.parametrize("name", ["vargrad", "ftb"])
def test_the_fixed_point_of_raw_rewards_is_the_tilt_by_beta(name: str) -> None:
    """Log-ratios beta R + c balance every group, however narrow its rewards are; standardised groups ask for more."""
    made = two_splits(NARROW, WIDE)
    log_ratio = torch.zeros(len(made.old_log_prob))
    log_ratio[made.leaf_edges[:, 1]] = 1.5 * made.rewards.float() + 0.3
    terms = {"log_prob": log_ratio, "log_prob_reference": torch.zeros_like(log_ratio), "log_ratio_reference": log_ratio}
    assert load_objective(name, beta=1.5, reward_scale="raw").loss(terms, made).item() == pytest.approx(0.0, abs=1e-6)
    assert load_objective(name, beta=1.5).loss(terms, made).item() > 0.1


def test_an_unknown_scale_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="'group', 'batch', 'running' or 'raw', got 'grup'"):
        load_objective("tmpo", reward_scale="grup")
