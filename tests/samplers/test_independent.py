import numpy as np
import pytest

from alignbench import UserError, load_sampler

RNG = np.random.default_rng(0)


def test_by_default_27_rollouts_of_six_steps_cost_162_rows() -> None:
    plan = load_sampler("independent").plan(0.0, RNG)
    assert (plan.roots, plan.leaves, plan.model_rows(), plan.replay_rows()) == (27, 27, 162, 135)


def test_all_steps_but_the_last_are_stochastic_and_none_splits() -> None:
    plan = load_sampler("independent", steps=4, group_size=5, rule="sde", noise_level=0.3).plan(0.5, RNG)
    assert [s.rule for s in plan.steps] == ["sde", "sde", "sde", "ode"]
    assert [s.eta for s in plan.steps] == [0.3, 0.3, 0.3, 0.0]
    assert plan.splits == ()
    assert plan.leaves == plan.roots == 5


@pytest.mark.parametrize(
    ("share", "stochastic"),
    # Of five steps before the last: 0.4 x 5 = 2, 0.41 x 5 = 2.05 rounded up.
    [(1.0, (0, 1, 2, 3, 4)), (0.4, (0, 1)), (0.41, (0, 1, 2)), (0.01, (0,)), (0.0, ())],
)
def test_a_share_of_the_steps_is_stochastic_from_the_noise_on(share: float, stochastic: tuple[int, ...]) -> None:
    plan = load_sampler("independent", group_size=4, stochastic_share=share).plan(0.0, RNG)
    assert plan.stochastic_steps == stochastic
    assert (plan.leaves, plan.model_rows(), plan.replay_rows()) == (4, 24, 4 * len(stochastic))


def test_a_group_may_start_from_one_noise() -> None:
    plan = load_sampler("independent", initial_noise="shared").plan(0.0, RNG)
    assert (plan.roots, plan.leaves, plan.splits, plan.stochastic_steps) == (1, 27, (0,), (0, 1, 2, 3, 4))
    assert (plan.model_rows(), plan.replay_rows()) == (1 + 27 * 5, 1 + 27 * 4)


def test_the_plan_is_the_same_at_any_progress() -> None:
    sampler = load_sampler("independent")
    assert sampler.plan(0.0, np.random.default_rng(0)) == sampler.plan(1.0, np.random.default_rng(1))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"group_size": 1}, "sampler independent: group_size: .*greater than or equal to 2, got 1"),
        ({"steps": 1}, "sampler independent: steps: .*greater than or equal to 2, got 1"),
        ({"stochastic_share": -1}, "sampler independent: stochastic_share: .*greater than or equal to 0, got -1"),
        ({"noise_level": 0}, "sampler independent: noise_level: .*greater than 0, got 0"),
        ({"rule": "ode"}, "sampler independent: rule: .*'sde', 'cps', 'dance' or 'memoryless', got 'ode'"),
        ({"initial_noise": "shared", "stochastic_share": 0}, "initial_noise=shared with stochastic_share=0 makes all rollouts"),
        ({"groupsize": 4}, "there is no key 'groupsize'; did you mean 'group_size'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_sampler("independent", **settings)
