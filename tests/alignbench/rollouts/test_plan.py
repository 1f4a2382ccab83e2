import math

import pytest

from alignbench import Plan, Step, UserError
from alignbench.rollouts.plan import Rule, Side
from tests.support.toys import MIXED, chains, tree


@pytest.mark.parametrize(
    ("splits", "rows"),
    # Sums of live branches by hand: (1, 3, 4) is 1 + 1 + 3 + 3 + 9 + 27.
    [((1, 3, 4), 44), ((1, 2, 3), 68), ((1, 2, 4), 50), ((2, 3, 4), 42), ((0, 1, 2), 94)],
)
def test_rollout_rows_of_a_3x3x3_tree_over_six_steps(splits: tuple[int, ...], rows: int) -> None:
    plan = tree(6, splits)
    assert plan.model_rows() == rows
    assert plan.model_rows(5) == 5 * rows


@pytest.mark.parametrize("splits", [(1, 3, 4), (1, 2, 3), (2, 3, 4)])
def test_a_3x3x3_tree_has_27_leaves_and_13_replay_rows_wherever_it_splits(splits: tuple[int, ...]) -> None:
    plan = tree(6, splits)
    assert plan.leaves == 27
    assert plan.replay_rows() == 1 + 3 + 9
    assert plan.replay_rows(4) == 52
    assert plan.splits == plan.stochastic_steps == splits


def test_27_rollouts_of_six_steps_cost_162_rows_and_replay_all_but_the_last_step() -> None:
    plan = chains(6, 27)
    assert plan.leaves == 27
    assert plan.model_rows() == 27 * 6 == 162
    assert plan.replay_rows() == 27 * 5
    assert plan.splits == ()
    assert plan.stochastic_steps == (0, 1, 2, 3, 4)


def test_live_branches_multiply_after_a_split() -> None:
    assert [tree(6, (1, 3, 4)).branches_before(t) for t in range(7)] == [1, 1, 3, 3, 9, 27, 27]


def test_prefixes_count_branches_after_each_split() -> None:
    assert tree(6, (1, 3, 4)).branch_counts == (1, 3, 9, 27)
    assert Plan(MIXED.steps, roots=2).branch_counts == (2, 4, 12)
    assert chains(4, 5).branch_counts == (5,)


def test_independent_leaves_take_the_same_steps_from_roots_of_their_own() -> None:
    plan = Plan(MIXED.steps, roots=2).as_independent()
    assert (plan.roots, plan.leaves, plan.splits) == (12, 12, ())
    assert [(s.rule, s.eta) for s in plan.steps] == [(s.rule, s.eta) for s in MIXED.steps]
    assert chains(4, 5).as_independent() == chains(4, 5)


def test_rollouts_from_one_noise_are_one_branch_until_they_part() -> None:
    plan = chains(4, 5).from_one_noise()
    assert (plan.roots, plan.leaves, plan.branch_counts, plan.splits) == (1, 5, (1, 5), (0,))
    assert (plan.model_rows(), plan.replay_rows()) == (1 + 5 + 5 + 5, 1 + 5 + 5)
    late = Plan((Step(), Step(), Step("cps", 0.5), Step("cps", 0.5), Step()), roots=4).from_one_noise()
    assert (late.leaves, late.splits, late.stochastic_steps) == (4, (2,), (2, 3))
    assert (late.model_rows(), late.replay_rows()) == (1 + 1 + 1 + 4 + 4, 1 + 4)
    # Trees whose roots were different part at the first split, into as many branches as they had there together.
    assert Plan(MIXED.steps, roots=3).from_one_noise().branch_counts == (1, 6, 18)


def test_rollouts_from_one_noise_need_a_step_to_part_at() -> None:
    with pytest.raises(UserError, match="need a stochastic step to differ"):
        Plan((Step(), Step()), roots=3).from_one_noise()


@pytest.mark.parametrize(("rule", "level", "scale"), [("cps", 0.5, 0.0), ("cps", 0.5, math.inf), ("ode", 0.0, 4.0)])
def test_a_noise_scale_that_means_nothing_is_refused(rule: Rule, level: float, scale: float) -> None:
    with pytest.raises(UserError, match="noise_scale is above 0, and 1 for an ode step, got"):
        Step(rule, level, noise_scale=scale)


def test_roots_multiply_every_cost() -> None:
    two = Plan(tree(4, (1,)).steps, roots=2)
    assert (two.leaves, two.model_rows(), two.replay_rows()) == (6, 2 + 2 + 6 + 6, 2)


def test_a_stochastic_step_without_a_split_is_replayed_but_no_split() -> None:
    assert MIXED.stochastic_steps == (0, 2, 3)
    assert MIXED.splits == (0, 3)
    assert MIXED.leaves == 6
    assert MIXED.model_rows() == 1 + 2 + 2 + 2 + 6
    assert MIXED.replay_rows() == 1 + 2 + 2


def test_strides_change_where_steps_stop_and_not_what_they_cost() -> None:
    plan = Plan((Step(stride=2), Step("cps", 0.5, 3), Step(stride=4)), roots=2)
    assert plan.schedule_indices == (0, 2, 3, 7)
    assert (plan.model_rows(), plan.replay_rows()) == (2 + 2 + 6, 2)
    assert tree(4, (1,)).schedule_indices == (0, 1, 2, 3, 4)


def test_a_step_that_is_not_scored_costs_no_training_row_but_its_leaves() -> None:
    plan = Plan((Step("cps", 0.5, 2), Step("cps", 0.5, 3, scored=False), Step("cps", 0.5), Step()))
    assert (plan.stochastic_steps, plan.splits, plan.leaves) == ((0, 2), (0, 1), 6)
    assert (plan.model_rows(), plan.replay_rows()) == (1 + 2 + 6 + 6, 1 + 6)


def test_a_call_is_scored_where_one_of_its_steps_is() -> None:
    plan = Plan((Step("cps", 0.5, 2), Step("cps", 0.5, 3, scored=False), Step("cps", 0.5), Step()))
    assert plan.scored_calls == {0, 2}
    assert Plan((Step(), Step())).scored_calls == frozenset()
    # A side branch leaves at the second state with a scored step, beside deterministic rows of the other one.
    early, late = Side(0, (NOISY, Step(), Step())), Side(1, (NOISY, Step()))
    assert trunk(early, late, steps=1).scored_calls == {0, 1}


def test_an_ode_plan_replays_nothing() -> None:
    plan = Plan((Step(), Step()), roots=3)
    assert (plan.leaves, plan.model_rows(2), plan.replay_rows(2)) == (3, 12, 0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rule": "heun"}, "ode, sde, cps, dance, memoryless, got 'heun'"),
        ({"rule": "cps", "eta": 0.5, "children": 0}, "at least one child"),
        ({"stride": 0}, "at least one step of the schedule, got stride 0"),
        ({"rule": "ode", "eta": 0.5}, "draws no noise"),
        ({"rule": "ode", "children": 2}, "cannot split"),
        ({"rule": "sde", "eta": 0.0}, r"eta \(noise_level\) above 0, got 0.0; use rule 'ode'"),
        ({"rule": "cps", "eta": float("nan")}, r"eta \(noise_level\) above 0, got nan"),
        ({"rule": "sde", "eta": float("inf")}, r"eta \(noise_level\) above 0, got inf"),
        ({"rule": "cps", "eta": 1.2}, "share of the noise, at most 1, got 1.2"),
    ],
)
def test_a_step_that_cannot_be_run_is_refused(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Step(**arguments)  # type: ignore[arg-type]


def test_a_plan_without_roots_or_steps_is_refused() -> None:
    with pytest.raises(UserError, match="at least one root and one step, got 0 and 1"):
        Plan((Step(),), roots=0)
    with pytest.raises(UserError, match="at least one root and one step, got 1 and 0"):
        Plan(())


def trunk(*sides: Side, steps: int = 2) -> Plan:
    return Plan((Step(),) * steps, sides=sides)


NOISY = Step("cps", 0.5, 2)


def test_two_classes_of_branches_with_noise_of_their_own_can_leave_one_state() -> None:
    # One state at step 1 serves two quiet and three loud branches; the loud ones skip a step.
    quiet = Side(1, (Step("sde", 0.3, 2), Step(), Step()))
    loud = Side(1, (Step("sde", 0.9, 3), Step(stride=2)))
    made = trunk(quiet, loud, steps=1)
    assert (made.leaves, made.groups, made.path_length) == (5, 1, 1)
    assert made.rows_of_calls == (1, 1, 5, 2)
    assert (made.model_rows(2), made.replay_rows(2)) == (18, 2)


def test_a_line_that_reaches_the_image_has_images_beside_those_of_its_sides() -> None:
    # The line's own step at 0 is scored like that of its side, so that all paths have one scored step.
    made = Plan((NOISY, Step(), Step()), roots=2, sides=(Side(0, (NOISY, Step(stride=2)), group=1),))
    assert (made.leaves, made.groups, made.rows_of_calls) == (8, 2, (2, 8, 4))
    assert made.splits == (0,)


@pytest.mark.parametrize(
    ("sides", "sentence"),
    [
        ((Side(3, (NOISY, Step())),), "a side branch leaves before step 3 of a line that has 2 steps"),
        ((Side(-1, (NOISY, Step())),), "a side branch leaves before step -1"),
        ((Side(1, ()), Side(0, (NOISY,))), "a side branch of a plan needs at least one step"),
        ((Side(1, (NOISY,)), Side(0, (NOISY, Step(), Step()))), "stops at step 2 of the schedule, before its end at 3"),
        ((Side(2, (NOISY, Step()), group=1),), r"numbered from 0 without a gap, got \[1\]"),
        (
            (Side(2, (NOISY, Step())), Side(2, (Step("cps", 0.5, 3), Step()), group=1)),
            r"the same number of images, got \[2, 3\]",
        ),
        ((Side(2, (NOISY, Step())), Side(2, (Step(), Step()))), r"the same number of scored steps, got \[0, 1\]"),
    ],
)
def test_side_branches_that_cannot_be_run_or_compared_are_refused(sides: tuple[Side, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        trunk(*sides)


def test_side_branches_have_no_independent_counterpart() -> None:
    made = trunk(Side(2, (NOISY, Step())))
    with pytest.raises(UserError, match="cannot be drawn as independent rollouts"):
        made.as_independent()
    with pytest.raises(UserError, match="give it one root"):
        made.from_one_noise()
