"""What every objective declares: settings that cannot act, and the target that it matches."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from alignbench import load_objective, load_sampler, registry, rollout
from alignbench.config.run_config import load_config
from alignbench.training.engine import backward
from alignbench.training.run import _ineffective_choices
from tests.support.plugins import toy_config, write_task
from tests.support.toys import ToyBackbone

NAMES = registry.names("objectives")


@pytest.mark.parametrize("name", NAMES)
def test_settings_named_as_ineffective_exist(name: str) -> None:
    objective = load_objective(name)
    fields = type(objective.settings).model_fields
    for updates in (1, 2):
        assert set(objective.ineffective_settings(updates)) <= set(fields)


@pytest.mark.parametrize("name", registry.strengths())
def test_a_declared_strength_is_accepted_and_runs_from_close_to_far(name: str) -> None:
    strength = load_objective(name).strength
    assert strength is not None
    assert registry.strengths()[name] == {"setting": strength.setting, "values": list(strength.values)}
    objectives = [load_objective(name, **{strength.setting: value}) for value in strength.values]
    assert len(strength.values) >= 3
    targets = [beta for o in objectives if (beta := o.target_beta(1000)) is not None]
    # A sharper target is further from the base model; a smaller weight of the KL divergence lets the policy go further, and
    # dpo's beta is such a weight, as is dgpo's.
    if targets:
        assert targets == sorted(set(strength.values))
    else:
        assert name in ("dpo", "dgpo") or strength.setting == "kl_beta"
        assert list(strength.values) == sorted(set(strength.values), reverse=True)


def test_objectives_without_a_strength_are_known() -> None:
    assert {name for name in NAMES if load_objective(name).strength is None} == set(NAMES) - set(registry.strengths())
    assert {"none", "ddpo", "ppo"} <= set(NAMES) - set(registry.strengths())


def test_a_clip_and_a_behaviour_reference_act_only_with_several_updates() -> None:
    names = ("grpo", "tmpo", "flowrl", "dpo")
    by_updates = [{name: set(load_objective(name).ineffective_settings(updates)) for name in names} for updates in (1, 2)]
    of_grpo = {"kl_limit", "kl", "part_by"}
    on_policy: dict[str, set[str]] = {"tmpo": {"clip", "lambda_ref"}, "flowrl": {"ratio_clip"}, "dpo": set()}
    assert by_updates[0] == {"grpo": {"clip", "trust_region", *of_grpo}, **on_policy}
    assert by_updates[1] == {"grpo": of_grpo, "tmpo": set(), "flowrl": set(), "dpo": set()}


DEAD_IN: list[tuple[str, dict[str, Any]]] = [
    ("tmpo", {}),
    ("tmpo", {"reference": "none", "ratio": "none"}),
    ("tmpo", {"ess_target": 0.5}),
    ("tmpo", {"beta_warmup": 0}),
    ("grpo", {}),
    ("grpo", {"std": "none", "kl_beta": 0.1}),
    ("gardo", {"kl_beta": 0.0}),
    ("raft", {"weights": "top"}),
    ("raft", {}),
    ("nft", {"decay_rate": 0.0}),
    ("flowrl", {}),
    ("ppo", {}),
    ("ddpo", {}),
    ("awm", {}),
    ("awm", {"decay_rate": 0.0}),
    ("awm", {"ema_beta": 0.0}),
    ("dgpo", {}),
    ("dgpo", {"clip": 0.1, "decay_rate": 0.0}),
    ("ram", {}),
    ("ram", {"centre": "average", "decay_rate": 0.0}),
    ("crd", {"kl_beta": 0.0, "anchor": "reference"}),
    ("crd", {"per": "image"}),
]


@pytest.mark.parametrize(("name", "given"), DEAD_IN, ids=str)
def test_no_setting_that_is_named_as_ineffective_changes_the_gradient(name: str, given: dict[str, Any]) -> None:
    dead = load_objective(name, **given).ineffective_settings(1)
    assert dead
    before = first_gradient(name, given)
    assert before.norm() > 0
    for setting in dead:
        changed = first_gradient(name, given | {setting: another_value(name, given, setting)})
        torch.testing.assert_close(changed, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize(
    ("name", "given", "setting"),
    [
        ("grpo", {"kl_beta": 0.1}, "kl"),
        ("grpo", {}, "std_correction"),
        ("tmpo", {"beta_warmup": 0}, "beta"),
        ("tmpo", {"beta_warmup": 10}, "beta_start"),
        ("tmpo", {"reference": "frozen"}, "lambda_ref"),
        ("raft", {}, "beta"),
        ("raft", {"weights": "top"}, "top"),
        ("nft", {}, "kl_beta"),
        ("awm", {}, "weight"),
        ("awm", {}, "kl_beta"),
        ("dgpo", {}, "beta"),
        ("dgpo", {}, "kl_beta"),
        ("ram", {}, "beta"),
        ("crd", {}, "kl_floor"),
        ("crd", {"anchor": "reference"}, "beta"),
    ],
    ids=str,
)
def test_settings_that_are_not_named_change_the_gradient(name: str, given: dict[str, Any], setting: str) -> None:
    assert setting not in load_objective(name, **given).ineffective_settings(1)
    before, after = (first_gradient(name, each) for each in (given, given | {setting: another_value(name, given, setting)}))
    assert float((after - before).norm()) > 1e-6 * float(before.norm())


def first_gradient(name: str, settings: dict[str, Any]) -> Tensor:
    """The gradient of the policy's weights at the first update of a rollout, away from the base model."""
    objective, policy = load_objective(name, **settings), ToyBackbone()
    policy.nudge(0.05)
    objective.prepare(policy.latent_shape, policy.device)
    plan = load_sampler("independent", steps=4, group_size=6).plan(0.0, np.random.default_rng(0))
    forest = rollout(policy, ["a", "b", "c"], plan, 0)
    forest.rewards = torch.linspace(0, 1, len(forest.leaves)) ** 2
    forest.scores = {"main": forest.rewards, "other": forest.rewards.flip(0)}
    forest.weights = {"main": 1.0}
    objective.observe(forest)
    backward(policy, objective, forest, on_policy=True)
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def another_value(name: str, given: dict[str, Any], setting: str) -> Any:
    """Another valid value of a setting."""
    settings = load_objective(name, **given).settings
    now, annotation = getattr(settings, setting), type(settings).model_fields[setting].annotation
    if isinstance(now, str):
        return next(value for value in get_args(annotation) if value != now)
    return not now if isinstance(now, bool) else now + 1 if isinstance(now, int) else now / 2


def test_the_target_beta_follows_the_schedule_and_is_none_without_a_target() -> None:
    # Halfway through a linear warm-up from 0.8 to 2.
    assert load_objective("tmpo", beta_warmup=10).target_beta(5) == pytest.approx(1.4)
    assert load_objective("vargrad", beta=3.0).target_beta(5) == 3.0
    assert load_objective("raft", weights="top").target_beta(0) is None
    assert load_objective("grpo").target_beta(0) is None


@pytest.mark.parametrize("backbone", ["tiny", "gaussian_mixture", "sd3", "flux"])
@pytest.mark.parametrize("preset", ["smoke", "quick", "paper"])
def test_no_preset_ships_a_setting_that_cannot_act(preset: str, backbone: str) -> None:
    for name in NAMES:
        for sampler in registry.names("samplers"):
            config = load_config(preset=preset, options={"objective": name, "sampler": sampler, "backbone": backbone})
            objective = load_objective(name, **config.objective.settings)
            assert _ineffective_choices(config, objective) == [], (name, sampler)


def test_a_chosen_setting_that_cannot_act_is_named_with_its_reason(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path), objective={"name": "flowrl", "ratio_clip": 0.1}, updates_per_rollout=1)
    assert _ineffective_choices(config, load_objective("flowrl", ratio_clip=0.1)) == [
        "objective.ratio_clip has no effect: with updates_per_rollout=1 every importance ratio is 1"
    ]
