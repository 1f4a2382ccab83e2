import math

import pytest
import torch

from alignbench import groups

NAN = math.nan


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_the_group_standard_deviation_is_the_population_one_of_each_group() -> None:
    z = groups.standardise(rows([0.0, 2.0], [1.0, 5.0]))
    assert z.tolist() == [[-1.0, 1.0], [-1.0, 1.0]]


def test_the_batch_deviation_is_one_scale_about_the_mean_of_all_rewards() -> None:
    z = groups.standardise(rows([0.0, 2.0], [1.0, 5.0]), std="batch")
    # 0, 2, 1, 5 have the mean 2 and the deviation sqrt((4 + 0 + 1 + 9) / 4) = 1.870829.
    assert z.flatten().tolist() == pytest.approx([-0.534522, 0.534522, -1.069045, 1.069045], abs=2e-6)  # six decimals


@pytest.mark.parametrize(("size", "factor"), [(2, 1.414214), (4, 1.154701), (8, 1.069045)])
def test_a_samples_deviation_is_the_populations_times_the_root_of_n_over_n_less_1(size: int, factor: float) -> None:
    rewards = rows([float(i * i) for i in range(size)], [NAN, *(float(3 * i) for i in range(1, size)), 100.0][:size])
    rewards = torch.cat([rewards, rows([7.0, *[NAN] * (size - 1)])])  # one reward alone has nothing to differ from
    first = torch.std(rewards[0], correction=1)
    found = groups.standardise(rewards, correction=1)
    assert found[0].tolist() == pytest.approx(((rewards[0] - rewards[0].mean()) / first).tolist(), abs=1e-6)  # float32
    assert (groups.standardise(rewards)[0] / found[0]).tolist() == pytest.approx([factor] * size, abs=2e-6)
    assert found[2].tolist() == [0.0] * size
    here = rewards[~rewards.isnan()]
    batch = groups.standardise(rewards, std="batch", correction=1)[0]
    assert batch.tolist() == pytest.approx(((rewards[0] - rewards[0].mean()) / here.std(correction=1)).tolist(), abs=1e-6)


def test_without_a_deviation_rewards_are_centred_only() -> None:
    assert groups.standardise(rows([0.0, 2.0], [1.0, 5.0]), std="none").tolist() == [[-1.0, 1.0], [-2.0, 2.0]]


def test_a_missing_reward_counts_nowhere_and_standardises_to_zero() -> None:
    for std, expected in (("group", [-1.0, 0.0, 1.0]), ("none", [-2.0, 0.0, 2.0]), ("batch", [-1.0, 0.0, 1.0])):
        assert groups.standardise(rows([1.0, NAN, 5.0]), std=std).tolist() == [expected]


@pytest.mark.parametrize("std", ["group", "batch", "none"])
@pytest.mark.parametrize(
    "group",
    # The mean of three times .11 rounds, in float32, to something else than .11.
    [[0.1, 0.1, 0.1], [0.11, 0.11, 0.11], [0.1, NAN, 0.1], [NAN, 0.7, NAN], [NAN, NAN, NAN]],
)
def test_a_group_with_nothing_to_prefer_standardises_to_exact_zeros(group: list[float], std: str) -> None:
    z = groups.standardise(rows(group, [0.0, 1.0, 2.0]), std=std)
    assert z[0].tolist() == [0.0, 0.0, 0.0]
    assert z[1].abs().sum() > 0


def test_a_tiny_spread_is_not_blown_up() -> None:
    z = groups.standardise(rows([0.0, 2e-6]))
    # Divided by 1e-4 rather than by its deviation 1e-6.
    assert z.flatten().tolist() == pytest.approx([-0.01, 0.01], rel=1e-5)  # float32


@pytest.mark.parametrize("std", ["group", "batch"])
@pytest.mark.parametrize(
    ("offset", "scale"), [(1e8, 1.0), (2.0**24, 1.0), (-1e12, 1.0), (0.0, 1e20), (0.0, 1e300), (1e300, 1e299)]
)
def test_an_offset_or_a_scale_of_the_rewards_changes_no_standardised_reward(offset: float, scale: float, std: str) -> None:
    plain = torch.tensor([[0.0, 1.0, 2.0, NAN, 3.5], [1.0, 1.0, 0.0, 4.0, 1.0]], dtype=torch.float64)
    z = groups.standardise(offset + scale * plain, std=std)
    # float64 keeps 1e12 + 0.5 to 1e-4, and 1e300 + 1e299 to 1e-15 of it.
    assert torch.allclose(z, groups.standardise(plain, std=std), atol=1e-3 if offset == -1e12 else 1e-6)
    assert z.dtype == torch.float32


def test_rounding_is_no_reward() -> None:
    one_unit = [0.95, 0.95, 0.95, 0.95000005]
    assert groups.standardise(rows(one_unit)).tolist() == [[0.0] * 4]
    # Scorers answer in float32 and their answers are kept in float64: still rounding.
    assert groups.standardise(rows(one_unit).double()).tolist() == [[0.0] * 4]
    # As float64 numbers of their own they differ.
    assert groups.has_distinct_rewards(torch.tensor([one_unit], dtype=torch.float64)).tolist() == [True]
    assert groups.has_distinct_rewards(torch.tensor([[0.1 + 0.2, 0.3]], dtype=torch.float64)).tolist() == [False]


def test_the_total_of_one_reward_is_its_weight_times_itself() -> None:
    got = groups.total({"a": rows([1.0, NAN, 3.0]), "unused": rows([9.0, 9.0, 9.0])}, {"a": 0.5}, normalise=True)
    assert got[0, [0, 2]].tolist() == [0.5, 1.5]
    assert bool(got[0, 1].isnan())


def test_the_total_of_several_rewards_adds_up_what_each_is_in_its_group() -> None:
    scores = {"a": rows([0.0, 2.0, 4.0]), "b": rows([300.0, 100.0, NAN])}
    got = groups.total(scores, {"a": 0.6, "b": 0.4}, normalise=True)
    # a: -sqrt(3/2), 0, sqrt(3/2); b: 1, -1.
    assert got[0, :2].tolist() == pytest.approx([-0.6 * 1.5**0.5 + 0.4, -0.4], abs=1e-6)  # float32
    assert bool(got[0, 2].isnan())
    raw = groups.total(scores, {"a": 0.6, "b": 0.4}, normalise=False)
    assert raw[0, :2].tolist() == pytest.approx([120.0, 41.2])


def test_rewards_that_differ_by_their_rounding_add_up_to_equal_totals() -> None:
    scores = {"a": rows([0.95, 0.95000005]), "b": rows([1.0, 1.0])}
    for weights, normalise in (({"a": 0.7}, False), ({"a": 0.7, "b": 0.3}, False), ({"a": 0.7, "b": 0.3}, True)):
        total = groups.total(scores, weights, normalise=normalise)
        assert total[0, 0] == total[0, 1]


def test_several_rewards_are_not_standardised_again_for_a_target() -> None:
    # Two rewards that are +-1 in their group and have nothing to do with each other, with weights .6 and .4.
    scores = {"a": rows([1.0, 1.0, -1.0, -1.0]), "b": rows([1.0, -1.0, 1.0, -1.0])}
    total = groups.total(scores, {"a": 0.6, "b": 0.4}, normalise=True)
    assert groups.target_reward(total, standardised=True)[0].tolist() == pytest.approx([1.0, 0.2, -0.2, -1.0])
    # Standardised again they would be divided by sqrt(.36 + .16).
    again = groups.target_reward(total, standardised=False)
    assert again[0].tolist() == pytest.approx([1.386750, 0.277350, -0.277350, -1.386750], abs=2e-6)  # six decimals


def test_an_unknown_deviation_is_an_error() -> None:
    with pytest.raises(ValueError, match="'group', 'batch' or 'none', got 'global'"):
        groups.standardise(rows([0.0, 1.0]), std="global")


def test_spread_tells_whether_two_rewards_differ() -> None:
    values = rows([1, 1, 1], [1, 1, 2], [NAN, 1, 1], [NAN, 1, 2], [NAN, NAN, 1], [NAN, NAN, NAN])
    assert groups.has_distinct_rewards(values).tolist() == [False, True, False, True, False, False]


def test_mean_is_over_the_chosen_places_and_zero_without_any() -> None:
    values = rows([1.0, 2.0], [3.0, 100.0])
    assert groups.mean(values, torch.tensor([[True, True], [True, False]])).item() == 2.0
    assert groups.mean(values, torch.zeros(2, 2, dtype=torch.bool)).item() == 0.0


def test_clipped_stops_the_gain_of_a_ratio_that_went_too_far_and_never_a_loss() -> None:
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1], requires_grad=True)
    surrogate = groups.clipped(ratio, torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0]), 0.2)
    # By hand: min(3, 2.4), min(1, 1.6), min(-3, -2.4), min(-1, -1.6), min(2.2, 2.2).
    assert surrogate.tolist() == pytest.approx([2.4, 1.0, -3.0, -1.6, 2.2])
    surrogate[:4].sum().backward()
    assert ratio.grad is not None
    assert ratio.grad[:4].tolist() == [0.0, 2.0, -2.0, 0.0]


def test_the_boltzmann_target_is_the_softmax_of_beta_times_reward_over_chosen_leaves() -> None:
    where = torch.tensor([[True, True, False], [False, False, False]])
    log_q = groups.boltzmann_log_prob(rows([0.0, math.log(3.0), 9.0], [1.0, 2.0, 3.0]), 2.0, where)
    # exp(2 log 3) = 9 against 1.
    assert log_q.exp()[0].tolist() == pytest.approx([0.1, 0.9, 1.0])
    assert log_q[1].tolist() == [0.0, 0.0, 0.0]


def test_the_mean_of_a_group_is_over_its_chosen_leaves_and_zero_without_any() -> None:
    where = torch.tensor([[True, True, False], [False, False, False]])
    assert groups.group_mean(rows([1.0, 2.0, 9.0], [1.0, 2.0, 3.0]), where).tolist() == [[1.5], [0.0]]


def test_log_softmax_is_over_the_chosen_leaves_of_each_group() -> None:
    values = rows([0.0, math.log(3), 50.0], [math.log(2), 0.0, 0.0], [1.0, 2.0, 3.0])
    where = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    logs = groups.log_softmax(values, where)
    expected = [math.log(0.25), math.log(0.75), 0, math.log(0.5), math.log(0.25), math.log(0.25), 0, 0, 0]
    assert logs.flatten().tolist() == pytest.approx(expected, abs=1e-6)  # float32


def test_log_softmax_has_finite_gradients_where_leaves_are_left_out() -> None:
    values = rows([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]).requires_grad_()
    where = torch.tensor([[True, True, False], [False, False, False]])
    torch.autograd.backward(groups.log_softmax(values, where)[0, 0])
    assert values.grad is not None
    p = math.e / (1 + math.e)
    assert values.grad.flatten().tolist() == pytest.approx([p, -p, 0, 0, 0, 0], abs=1e-6)  # float32


def test_effective_sample_size_is_one_for_a_single_leaf_and_all_for_uniform() -> None:
    log_p = torch.log(rows([0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 1e-12, 1e-12], [1.0, 1e-12, 1e-12, 1e-12]))
    sizes = groups.effective_sample_size(log_p, torch.ones(3, 4, dtype=torch.bool))
    assert sizes.tolist() == pytest.approx([4.0, 2.0, 1.0], rel=1e-5)  # float32


def test_log_size_counts_the_chosen_leaves() -> None:
    where = torch.tensor([[True, True, True], [True, False, False]])
    assert groups.log_size(where).flatten().tolist() == pytest.approx([math.log(3), 0.0], abs=1e-6)  # float32
