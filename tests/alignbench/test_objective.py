"""What every objective declares: settings that cannot act, and the target that it matches."""

from pathlib import Path

import pytest

from alignbench import load_objective, registry
from alignbench.config.run_config import load_config
from alignbench.training.run import _ineffective_choices
from tests.support.plugins import toy_config, write_task

NAMES = registry.names("objectives")


@pytest.mark.parametrize("name", NAMES)
def test_settings_named_as_ineffective_exist(name: str) -> None:
    objective = load_objective(name)
    fields = type(objective.settings).model_fields
    assert set(objective.ineffective_settings(updates_per_rollout=1)) <= set(fields)
    assert objective.ineffective_settings(updates_per_rollout=2) == {}


def test_a_clip_range_acts_only_with_several_updates() -> None:
    on_policy = {name: set(load_objective(name).ineffective_settings(1)) for name in ("grpo", "tmpo", "flowrl", "dpo")}
    assert on_policy == {"grpo": {"clip"}, "tmpo": {"clip"}, "flowrl": {"ratio_clip"}, "dpo": set()}


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
