from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from alignbench import UserError, load_objective, load_sampler, registry
from alignbench.config import run_config as config
from alignbench.config.run_config import RunConfig, load_config, presets
from alignbench.settings import validate


@pytest.fixture
def own_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`quick` and `other` with a common part and parts for plug-ins, in place of those that ship."""
    quick = {
        "common": {"iterations": 10, "seed": 1, "optimizer": {"lr": 0.1, "eps": 0.1}},
        "backbones": {
            "tiny": {
                "iterations": 11,
                "micro_batch": 5,
                "tasks": {"geneval": {"evals": {"geneval": {"reward": "graded"}}, "seed": 4}},
            },
            "flux": {
                "guidance": 3.5,
                "optimizer": {"eps": 0.5},
                "objectives": {
                    "tmpo": {"optimizer": {"lr": 0.3}, "samplers": {"dynamic_tree": {"sampler": {"steps": 9}}}},
                    "dpo": {"sampler": {"group_size": 7}},
                },
            },
        },
        "samplers": {
            "dynamic_tree": {"iterations": 12, "sampler": {"kappa": 1.0, "steps": 8}},
            "independent": {"sampler": {"group_size": 4}},
        },
        "objectives": {
            "tmpo": {"iterations": 13, "optimizer": {"lr": 0.2}, "objective": {"beta": 1.5}},
            "grpo": {"iterations": 14, "objective": {"clip": 0.01}},
            "dpo": {"sampler": {"name": "independent", "steps": 3}},
        },
    }
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "quick.yaml").write_text(yaml.safe_dump(quick))
    (folder / "other.yaml").write_text(yaml.safe_dump({"common": {"iterations": 99}}))
    longer = {
        "extends": "quick",
        "common": {"seed": 2, "iterations": 50},
        "samplers": {"dynamic_tree": {"sampler": {"steps": 5}}},
    }
    (folder / "longer.yaml").write_text(yaml.safe_dump(longer))
    (folder / "notes.txt").write_text("no preset")
    monkeypatch.setattr(config, "resources", SimpleNamespace(files=lambda _: tmp_path))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.yaml"


def chosen(**layers: Any) -> dict[str, Any]:
    return load_config(**layers).resolved()


def problem(**layers: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_config(**layers)
    return str(caught.value)


# --- presets that ship


def test_the_promised_presets_ship() -> None:
    assert {"smoke", "quick", "paper"} <= set(presets())


def test_every_preset_fits_every_objective_and_sampler() -> None:
    for preset in presets():
        for objective in ("tmpo", "grpo"):
            for sampler in ("independent", "fixed_tree", "dynamic_tree"):
                found = load_config(preset=preset, options={"objective": objective, "sampler": sampler})
                assert (found.preset, found.objective.name, found.sampler.name) == (preset, objective, sampler)
                load_objective(objective, **found.objective.settings)
                load_sampler(sampler, **found.sampler.settings)


def test_in_the_plane_samplers_draw_by_sde_and_a_plug_in_needs_no_rule() -> None:
    for sampler in registry.names("samplers"):
        found = load_config(options={"backbone": "gaussian_mixture", "sampler": sampler})
        assert found.sampler.settings["rule"] == "sde"
    plugin = load_config(options={"backbone": "gaussian_mixture", "sampler": "own:Sampler"})
    assert plugin.sampler.settings == {}


PAPER: dict[tuple[str, str], dict[str, Any]] = {
    ("sd3", "tmpo"): {
        "iterations": 300, "prompts_per_iteration": 8, "updates_per_rollout": 4, "lr": 1e-5, "max_grad_norm": 1.0,
        "lr_schedule": "cosine", "sampler": "dynamic_tree", "schedule": "reward", "steps": 28, "levels": 3,
        "children": 3, "min_gap": 3, "beta_start": 15, "beta": 15, "lambda_ref": 0.1, "clip": 0.2,
        "lora_rank": 32, "lora_alpha": 32,
    },
    ("sd3", "grpo"): {
        "iterations": 250, "prompts_per_iteration": 48, "updates_per_rollout": 2, "lr": 3e-4, "max_grad_norm": 1.0,
        "lr_schedule": "constant", "sampler": "independent", "steps": 10, "group_size": 24, "rule": "sde", "noise_level": 0.7,
        "clip": 1e-4, "kl_beta": 0.04, "kl": "released", "std": "batch", "zero_advantage": "drop", "parts": 2,
    },
    ("sd3", "gardo"): {
        "prompts_per_iteration": 48, "updates_per_rollout": 2, "lr": 3e-4, "sampler": "independent", "steps": 10,
        "group_size": 24, "rule": "sde", "noise_level": 0.7, "clip": 1e-5, "kl_beta": 0.04, "kl": "released", "kl_share": 0.1,
        "reference_refresh": 16, "reference_refresh_kl": 3e-4, "step_weight": "none", "zero_advantage": "drop",
        "parts": 2,
    },
    ("sd3", "nft"): {
        "prompts_per_iteration": 48, "updates_per_rollout": 2, "lr": 3e-4, "sampler": "independent", "steps": 10,
        "group_size": 24, "stochastic_share": 0, "guidance": 1, "beta": 0.1, "adv_clip": 5, "kl_beta": 1e-4,
        "decay_rate": 0.0075, "decay_start": 75, "decay_max": 0.999, "std": "batch", "draws": 9, "times": "steps", "parts": 2,
        "flat_groups": "keep",
    },
    ("sd3", "diffusion_nft"): {
        "prompts_per_iteration": 48, "updates_per_rollout": 2, "lr": 3e-4, "steps": 10, "group_size": 24, "guidance": 1,
        "beta": 0.1, "decay_rate": 0.0075, "decay_start": 75, "decay_max": 0.999, "std": "batch", "draws": 9, "parts": 2,
    },
    ("sd3", "awm"): {
        "updates_per_rollout": 1, "lr": 3e-4, "sampler": "independent", "steps": 14, "group_size": 24, "stochastic_share": 0,
        "guidance": 1, "weight": "ghuber", "std": "batch", "adv_clip": 5, "kl_beta": 3e-3, "ema_beta": 1, "decay_rate": 1e-3,
        "decay_max": 0.3, "ratio": "none", "draws": 6, "times": "steps",
    },
    ("sd3", "dgpo"): {
        "updates_per_rollout": 1, "lr": 3e-4, "sampler": "independent", "steps": 10, "group_size": 16, "stochastic_share": 0,
        "beta": 100, "std": "batch", "kl_beta": 0.02, "clip": 1e-2, "decay_rate": 1e-3, "decay_max": 0.3,
        "drawn_by": "average", "draws": 4, "times": "steps",
    },
    ("sd3", "crd"): {
        "prompts_per_iteration": 48, "updates_per_rollout": 2, "sampler": "independent", "steps": 10, "group_size": 24,
        "stochastic_share": 0, "guidance": 1, "beta": 0.1, "anchor": "average", "adv_clip": 5, "kl_beta": 0.1,
        "kl_floor": 1e-4, "decay_first": 0.25, "decay_rate": 5e-3, "decay_max": 0.999, "draws": 10, "times": "steps",
    },
    ("sd3", "ram"): {
        "sampler": "independent", "steps": 20, "group_size": 8, "stochastic_share": 0, "beta": 100, "reward_scale": "batch",
        "centre": "average", "decay_rate": 0.01, "decay_max": 0.9, "draws": 4,
    },
    ("flux", "diffusion_nft"): {"steps": 10, "group_size": 24, "stochastic_share": 0, "decay_start": 75},
    ("flux", "awm"): {"steps": 14, "group_size": 24, "stochastic_share": 0, "kl_beta": 0.4, "draws": 6},
    ("flux", "dgpo"): {"steps": 10, "group_size": 16, "stochastic_share": 0, "beta": 100},
    ("flux", "crd"): {"steps": 10, "group_size": 24, "stochastic_share": 0, "draws": 10},
    ("flux", "ram"): {"steps": 20, "group_size": 8, "stochastic_share": 0, "beta": 100},
    ("sd3", "ddpo"): {
        "prompts_per_iteration": 32, "updates_per_rollout": 4, "lr": 3e-4, "sampler": "independent", "steps": 10,
        "group_size": 8, "clip": 1e-4, "buffer": 32, "min_count": 16,
    },
    ("sd3", "dpo"): {
        "prompts_per_iteration": 48, "updates_per_rollout": 2, "lr": 3e-4, "sampler": "independent", "steps": 40,
        "group_size": 24, "beta": 100, "pairs": "best_worst", "drawn_by": "reference", "draws": 39, "times": "schedule",
        "parts": 2,
    },
    ("flux", "tmpo"): {
        "iterations": 250, "prompts_per_iteration": 8, "updates_per_rollout": 1, "lr": 3e-5, "max_grad_norm": 0.5,
        "lr_schedule": "cosine", "sampler": "dynamic_tree", "steps": 6, "early": [1, 2, 3], "late": [1, 3, 5], "kappa": 6,
        "noise_level": 0.7, "early_split": "roots", "beta_start": 0.8, "beta": 2, "beta_warmup": 100, "lambda_ref": 0.05,
        "clip": 0.2,
    },
    ("flux", "grpo"): {
        "prompts_per_iteration": 8, "updates_per_rollout": 1, "lr": 3e-4, "sampler": "independent", "steps": 6,
        "group_size": 27, "rule": "sde", "noise_level": 0.9, "clip": 1e-4, "kl_beta": 0.0, "parts": 1,
    },
    ("flux", "gardo"): {
        "prompts_per_iteration": 8, "updates_per_rollout": 1, "steps": 6, "group_size": 27, "noise_level": 0.9, "kl_beta": 0.01,
        "kl": "released", "reference_refresh": 16, "step_weight": "none",
    },
    ("flux", "nft"): {"prompts_per_iteration": 48, "steps": 10, "group_size": 24, "stochastic_share": 0},
    ("flux", "ddpo"): {
        "prompts_per_iteration": 32, "updates_per_rollout": 4, "lr": 3e-4, "sampler": "independent", "steps": 6,
        "group_size": 8, "noise_level": 0.9, "clip": 1e-4,
    },
    ("flux", "dpo"): {
        "prompts_per_iteration": 48, "lr": 3e-4, "sampler": "independent", "steps": 40, "group_size": 24, "beta": 100,
    },
}  # fmt: skip
"""(family, objective) -> what its sources say, wherever it stands in the configuration."""


@pytest.mark.parametrize(("family", "objective"), PAPER)
def test_the_paper_preset_has_the_published_settings_of_each_family(family: str, objective: str) -> None:
    found = load_config(preset="paper", options={"backbone": family, "objective": objective})
    data = found.resolved()
    plugins = {**data["objective"], **data["backbone"], **data["sampler"]}
    flat = {**data, **data["optimizer"], **plugins}
    flat |= {"sampler": found.sampler.name, "lr_schedule": found.optimizer.schedule}
    wanted = PAPER[family, objective]
    assert {key: flat[key] for key in wanted} == wanted
    assert (data["optimizer"]["weight_decay"], data["ema"]) == (1e-4, {"decay": 0.9, "every": 8})
    guidance, steps = {"sd3": (4.5, 40), "flux": (3.5, 28)}[family]
    assert (found.guidance, found.evaluation.steps) == (wanted.get("guidance", guidance), steps)
    assert {key: plugins[key] for key in ("resolution", "precision")} == {"resolution": 512, "precision": "bf16"}
    load_objective(objective, **found.objective.settings)
    load_sampler(found.sampler.name, **found.sampler.settings).plan(0.5, np.random.default_rng(0))


KIN: dict[str, dict[str, Any]] = {
    "sliding_window": {"initial_noise": "shared", "std": "group", "std_correction": 1, "credit": "leaf"},
    "flash": {"initial_noise": "shared", "rounding": "released", "std": "group", "std_correction": 1, "credit": "leaf"},
    "tree_window": {"std": "group", "std_correction": 0, "credit": "edge"},
    "branch": {
        "split_noise_scale": 4,
        "noise_level": 0.3,
        "std": "group",
        "std_correction": 1,
        "credit": "depth",
        "clip": 1e-3,
    },
    "trunk_tree": {"roots": 4, "children": 6, "std": "group", "step_weight": "noise", "kl_beta": 0.004, "kl": "exact"},
    "granular": {
        "children": 12,
        "last_branch": 7,
        "strides": (1, 2),
        "coarse": "released",
        "std": "group",
        "std_correction": 1,
        "parts": 8,
        "part_by": "step",
    },
}
"""sampler -> what the code of MixGRPO, MixGRPO-Flash, TreeGRPO, BranchGRPO, TempFlow-GRPO and G2RPO has, which are grpo."""


@pytest.mark.parametrize("sampler", KIN)
def test_the_paper_preset_has_the_settings_of_grpos_kin_on_their_samplers(sampler: str) -> None:
    wanted = {"kl_beta": 0, "zero_advantage": "keep", **KIN[sampler]}
    for family in ("sd3", "flux"):
        found = load_config(preset="paper", options={"backbone": family, "objective": "grpo", "sampler": sampler})
        made = load_objective("grpo", **found.objective.settings), load_sampler(sampler, **found.sampler.settings)
        settings = made[0].settings.model_dump() | made[1].settings.model_dump()
        assert {key: settings[key] for key in wanted} == wanted
        assert found.updates_per_rollout == {"granular": 8}.get(sampler, 2 if family == "sd3" else 1)
    # What belongs to the method and not to its sampler does not follow the sampler.
    other = load_config(preset="paper", options={"backbone": "sd3", "objective": "tmpo", "sampler": sampler}).resolved()
    assert other["sampler"].get("split_noise_scale", 1) == 1


def test_without_anything_given_the_quick_preset_is_used() -> None:
    assert load_config() == load_config(preset="quick")
    assert load_config().preset == "quick"


def test_a_misspelt_preset_is_refused_with_the_nearest_name() -> None:
    assert problem(preset="quik") == "there is no preset 'quik'; did you mean 'quick'?"
    assert "there is no preset 'thorough'; known: " in problem(sets=["preset=thorough"])


# --- layers


@pytest.mark.usefixtures("own_presets")
class TestLayers:
    def test_presets_are_the_yaml_files_of_their_folder(self) -> None:
        assert presets() == ["longer", "other", "quick"]

    def test_a_preset_overrides_all_parts_of_the_one_that_it_extends(self) -> None:
        found = chosen(preset="longer")
        assert found["iterations"] == 50  # not the 13 of a part for the objective
        assert found["seed"] == 2
        assert found["sampler"] == {"name": "dynamic_tree", "kappa": 1.0, "steps": 5}
        assert found["objective"] == {"name": "tmpo", "beta": 1.5}
        assert found["preset"] == "longer"

    def test_parts_of_a_preset_win_in_the_order_backbone_sampler_objective(self) -> None:
        found = chosen()
        assert found["iterations"] == 13
        assert found["micro_batch"] == 5
        assert found["seed"] == 1
        assert found["objective"] == {"name": "tmpo", "beta": 1.5}
        assert found["sampler"] == {"name": "dynamic_tree", "kappa": 1.0, "steps": 8}
        assert found["optimizer"]["lr"] == 0.2

    def test_a_part_for_a_task_applies_to_that_task_alone_wherever_it_was_chosen(self, file: Path) -> None:
        file.write_text("task: geneval\n")
        for layers in ({"options": {"task": "geneval"}}, {"sets": ["task=geneval"]}, {"file": file}):
            found = chosen(**layers)
            assert found["evals"] == {"geneval": {"reward": "graded"}}
            assert found["seed"] == 4
        assert (chosen()["evals"], chosen()["seed"]) == ({}, 1)
        assert chosen(options={"task": "geneval", "backbone": "flux"})["evals"] == {}

    def test_nested_keys_are_merged_one_by_one(self) -> None:
        found = chosen(sets=["optimizer.weight_decay=0.5"])
        assert [found["optimizer"][k] for k in ("lr", "eps", "weight_decay")] == [0.2, 0.1, 0.5]
        # Not given anywhere: the default.
        assert found["optimizer"]["max_grad_norm"] == 1.0

    def test_a_file_wins_over_the_preset_options_over_the_file_and_sets_over_all(self, file: Path) -> None:
        file.write_text("iterations: 20\nseed: 20\nguidance: 2.0\nupdates_per_rollout: 2\n")
        found = chosen(file=file, options={"seed": 30, "guidance": 3.0}, sets=["guidance=4.0"])
        assert [found[k] for k in ("micro_batch", "iterations", "seed", "guidance")] == [5, 20, 30, 4.0]
        assert found["updates_per_rollout"] == 2

    def test_a_later_set_wins_over_an_earlier_one(self) -> None:
        assert chosen(sets=["seed=1", "seed=2"])["seed"] == 2

    def test_a_run_without_iterations_needs_a_budget(self) -> None:
        assert chosen(options={"iterations": None, "budget": {"model_rows": 9}})["iterations"] is None
        with pytest.raises(UserError, match="so a budget must end the run"):
            chosen(options={"iterations": None})

    def test_the_parts_of_the_plug_ins_that_were_chosen_apply_wherever_they_were_chosen(self, file: Path) -> None:
        file.write_text("objective: grpo\nsampler: {name: independent}\n")
        for layers in (
            {"options": {"objective": "grpo", "sampler": "independent"}},
            {"sets": ["objective=grpo", "sampler.name=independent"]},
            {"file": file},
        ):
            found = chosen(**layers)
            assert found["iterations"] == 14
            assert found["objective"] == {"name": "grpo", "clip": 0.01}
            assert found["sampler"] == {"name": "independent", "group_size": 4}
            assert found["optimizer"]["lr"] == 0.1

    def test_a_part_for_two_names_wins_over_those_for_one_and_one_for_three_over_all(self) -> None:
        found = chosen(options={"backbone": "flux"})
        assert found["guidance"] == 3.5
        assert found["iterations"] == 13
        assert (found["optimizer"]["lr"], found["optimizer"]["eps"]) == (0.3, 0.5)
        assert found["sampler"] == {"name": "dynamic_tree", "kappa": 1.0, "steps": 9}
        assert chosen(options={"backbone": "flux", "objective": "grpo"})["optimizer"]["lr"] == 0.1

    def test_an_objective_may_bring_its_sampler_where_nobody_asks_for_another(self, file: Path) -> None:
        assert chosen(options={"objective": "dpo"})["sampler"] == {"name": "independent", "group_size": 4, "steps": 3}
        flux = {"objective": "dpo", "backbone": "flux"}
        assert chosen(options=flux)["sampler"] == {"name": "independent", "group_size": 7, "steps": 3}
        other = chosen(options={"objective": "dpo", "sampler": "dynamic_tree"})
        assert other["sampler"] == {"name": "dynamic_tree", "kappa": 1.0, "steps": 8}

    def test_of_two_parts_that_name_a_sampler_the_more_special_one_is_heard(self, tmp_path: Path) -> None:
        preset = {
            "backbones": {"tiny": {"sampler": "fixed_tree"}, "flux": {"objectives": {"dpo": {"sampler": "flash"}}}},
            "objectives": {"dpo": {"sampler": {"name": "independent", "steps": 3}}},
        }
        (tmp_path / "presets" / "third.yaml").write_text(yaml.safe_dump(preset))
        assert chosen(preset="third")["sampler"] == {"name": "fixed_tree"}
        assert chosen(preset="third", options={"objective": "dpo"})["sampler"] == {"name": "independent", "steps": 3}
        assert chosen(preset="third", options={"objective": "dpo", "backbone": "flux"})["sampler"] == {"name": "flash"}

    def test_a_local_folder_goes_by_its_family(self, tmp_path: Path) -> None:
        model = tmp_path / "model"
        model.mkdir()
        (model / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
        found = chosen(options={"backbone": str(model)})
        assert found["backbone"] == {"name": str(model)}
        assert found["guidance"] == 3.5
        # What it is no folder of is told where it is opened.
        (model / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
        assert chosen(options={"backbone": str(model)})["guidance"] is None

    def test_settings_of_a_plug_in_can_be_set_without_its_name(self) -> None:
        assert chosen(sets=["objective.clip=0.3"])["objective"] == {"name": "tmpo", "beta": 1.5, "clip": 0.3}

    def test_settings_of_a_plug_in_that_was_replaced_do_not_apply(self, file: Path) -> None:
        file.write_text("objective: {name: tmpo, temperature: 3}\n")
        assert chosen(file=file, options={"objective": "grpo"})["objective"] == {"name": "grpo", "clip": 0.01}

    @pytest.mark.parametrize("set_", ["sampler.settings.kappa=0", "sampler={name: dynamic_tree, settings: {kappa: 0}}"])
    def test_settings_may_be_spelt_out_under_their_own_key(self, set_: str) -> None:
        assert chosen(sets=[set_])["sampler"] == {"name": "dynamic_tree", "kappa": 0, "steps": 8}

    def test_a_file_names_its_preset_and_an_explicit_one_wins(self, file: Path) -> None:
        file.write_text("preset: other\n")
        other, quick = load_config(file=file), load_config(file=file, preset="quick")
        assert (other.iterations, other.preset) == (99, "other")
        assert (quick.iterations, quick.preset) == (13, "quick")
        assert chosen(sets=["preset=other"])["iterations"] == 99


# --- --set


@pytest.mark.parametrize(
    ("text", "value"),
    # YAML 1.1 reads 1e-4 as text.
    [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("0.5", 0.5), ("3", 3.0), ("1E-3", 1e-3), (" 2e-2 ", 2e-2)],
)
def test_a_number_may_be_written_in_any_usual_way(text: str, value: float) -> None:
    assert load_config(sets=[f"optimizer.lr={text}"]).optimizer.lr == value


def test_numbers_of_plug_in_settings_are_numbers_too() -> None:
    assert load_config(sets=["objective.clip=1e-4"]).objective.settings["clip"] == 1e-4


def test_sets_read_yaml_values() -> None:
    found = load_config(
        sets=["normalise_rewards=false", "ema={decay: 0.5, every: 2}", "optimizer.betas=[0.8, 0.9]", "task=a=b"]
    )
    assert found.normalise_rewards is False
    assert found.ema is not None
    assert (found.ema.decay, found.ema.every) == (0.5, 2)
    assert found.optimizer.betas == (0.8, 0.9)
    assert found.task == "a=b"
    assert load_config(sets=["ema={decay: 0.5}", "ema=null"]).ema is None


def test_a_whole_number_in_exponent_form_serves_as_a_count() -> None:
    assert load_config(sets=["iterations=1e2"]).iterations == 100


@pytest.mark.parametrize("text", ["lr", "=3", " =3", ""])
def test_a_set_without_key_or_value_is_refused(text: str) -> None:
    assert problem(sets=[text]) == f"--set takes dotted.key=value, got {text!r}"


def test_a_set_whose_value_is_no_yaml_is_refused() -> None:
    quotes = "a text that begins with [ needs quotes around it"
    assert problem(sets=["optimizer.lr=[1"]) == f"--set optimizer.lr: '[1' is not a valid YAML value: {quotes}"


# --- strictness


@pytest.mark.parametrize(
    ("set_", "sentence"),
    [
        ("optimiser.lr=1", "there is no key 'optimiser'; did you mean 'optimizer'?"),
        ("optimizer.weight_deccay=1", "there is no key 'optimizer.weight_deccay'; did you mean 'weight_decay'?"),
        ("ema.deca=0.5", "there is no key 'ema.deca'; did you mean 'decay'?"),
        ("evaluation.step=3", "there is no key 'evaluation.step'; did you mean 'steps'"),
        ("budget.rows=3", "there is no key 'budget.rows'; did you mean 'model_rows'?"),
        ("iteration=3", "there is no key 'iteration'; did you mean 'iterations'"),
        ("optimizer.zzz=1", "there is no key 'optimizer.zzz'; known: betas, eps, lr, max_grad_norm, schedule, weight"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_of_its_level(set_: str, sentence: str) -> None:
    assert sentence in problem(sets=[set_])


@pytest.mark.parametrize(
    ("set_", "sentence"),
    [
        ("seed=-1", "seed: input should be greater than or equal to 0, got -1"),
        ("iterations=2.5", "iterations: input should be a valid integer, got a number with a fractional part, got 2.5"),
        ("optimizer.lr=0", "optimizer.lr: input should be greater than 0, got 0"),
        ("optimizer.lr=nan", "optimizer.lr: input should be a finite number, got 'nan'"),
        ("optimizer.lr=.inf", "optimizer.lr: input should be a finite number, got inf"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas.1: input should be less than 1, got 1"),
        ("seed=9223372036854775808", "seed: a whole number must fit into 64 bits"),
        ("evaluation={seed: [1, -9223372036854775809]}", "evaluation.seed.1: a whole number must fit into 64 bits"),
        ("optimizer.lr=fast", "optimizer.lr: input should be a valid number"),
        ("optimizer.schedule=linear", "optimizer.schedule: input should be 'constant' or 'cosine', got 'linear'"),
        ("optimizer=3", "optimizer: input should be a valid dictionary"),
        ("ema.decay=1", "ema.decay: input should be less than 1, got 1"),
        ("evaluation.images_per_prompt=1", "evaluation.images_per_prompt: input should be greater than or equal to 2"),
        ("log_prob_reduction=max", "log_prob_reduction: input should be 'mean' or 'sum', got 'max'"),
        ("prompts_per_iteration=0", "prompts_per_iteration: input should be greater than or equal to 1, got 0"),
        ("budget.model_rows=0", "budget.model_rows: input should be greater than or equal to 1, got 0"),
    ],
)
def test_a_value_out_of_range_or_kind_is_refused_by_name(set_: str, sentence: str) -> None:
    assert f"configuration: {sentence}" in problem(sets=[set_])


@pytest.mark.parametrize("value", ["true", "[tmpo, grpo]"])
@pytest.mark.parametrize("kind", ["objective", "sampler", "backbone"])
def test_a_plug_in_that_is_neither_name_nor_settings_is_refused(kind: str, value: str) -> None:
    assert kind in problem(sets=[f"{kind}={value}"])


def test_several_problems_are_counted() -> None:
    assert problem(sets=["seed=-1", "iterations=-1"]).endswith("got -1 (and 1 more)")


def test_a_problem_in_a_file_names_the_file(file: Path) -> None:
    file.write_text("seeed: 3\n")
    assert problem(file=file).startswith(f"{file}: there is no key 'seeed'; did you mean 'seed'")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- 1\n", "must hold keys and values, not list"),
        ("just words\n", "must hold keys and values, not str"),
        ("a: [1\n", "is not valid YAML"),
    ],
)
def test_a_file_that_holds_no_keys_is_refused(file: Path, text: str, sentence: str) -> None:
    file.write_text(text)
    assert problem(file=file).startswith(f"the config file {file} {sentence}")


def test_a_file_that_is_missing_a_folder_or_no_text_is_refused(file: Path) -> None:
    assert problem(file=file) == f"cannot read the config file {file}: No such file or directory"
    assert problem(file=file.parent) == f"cannot read the config file {file.parent}: Is a directory"
    file.write_bytes(b"\xff\xfe\x00")
    assert problem(file=file).startswith(f"the config file {file} is not valid YAML")


# --- resolved


def test_the_resolved_configuration_reads_back_as_itself_from_yaml(file: Path) -> None:
    sets = ["objective.clip=1e-4", "ema.decay=0.5", "budget.seconds=9"]
    found = load_config(options={"objective": "grpo"}, sets=sets)
    file.write_text(yaml.safe_dump(found.resolved()))
    assert load_config(file=file) == found
    assert validate(RunConfig, found.resolved(), where="again") == found


def test_a_plug_in_is_a_name_or_a_name_with_settings() -> None:
    assert validate(RunConfig, {"objective": "grpo"}, where="x").objective.name == "grpo"
    flat = validate(RunConfig, {"objective": {"name": "grpo", "clip": 0.1}}, where="x")
    nested = validate(RunConfig, {"objective": {"name": "grpo", "settings": {"clip": 0.1}}}, where="x")
    assert flat == nested
    assert flat.objective.settings == {"clip": 0.1}


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config().seed = 3  # type: ignore[misc]


# --- what a value is


def test_labels_and_names_are_texts_whatever_yaml_takes_them_for(file: Path) -> None:
    file.write_text("objective: {name: tmpo, label: 1e3}\nsampler: {name: dynamic_tree, label: no}\ntask: 1.10\nbackbone: 3\n")
    found = load_config(file=file)
    assert (found.objective.label, found.sampler.label, found.task, found.backbone.name) == ("1e3", "no", "1.10", "3")
    for label in ("2", "true", "2024-01-01", "0x10", "010", "1_000"):
        assert load_config(sets=[f"objective.label={label}"]).objective.label == label
    assert load_config(sets=["objective.label=null"]).objective.label is None


@pytest.mark.parametrize("key", ["checkpoint_every", "optimizer.lr", "seed", "guidance", "optimizer.betas", "task", "pairs"])
def test_true_is_neither_a_number_nor_a_text(key: str) -> None:
    value = "[0.9, true]" if key == "optimizer.betas" else "true"
    assert f"configuration: {key}: true and false are not possible values here" in problem(sets=[f"{key}={value}"])


def test_true_is_no_number_of_a_plug_ins_settings_either() -> None:
    with pytest.raises(UserError, match="objective tmpo: beta: true and false are not possible values here"):
        load_objective("tmpo", beta=True)
    assert load_config(sets=["save_images=no"]).save_images is False


@pytest.mark.parametrize(
    ("text", "value"), [("010", 10), ("1_000", 1000), ("+5", 5), ("0x10", None), ("1:30", None), ("yes", None)]
)
def test_a_number_is_the_one_that_stands_there_or_refused(text: str, value: int | None) -> None:
    if value is None:
        assert "seed: input should be a valid integer" in problem(sets=[f"seed={text}"])
    else:
        assert load_config(sets=[f"seed={text}"]).seed == value


def test_no_setting_is_infinite_even_where_nobody_looks_yet() -> None:
    assert "objective.x.0: input should be a finite number, got inf" in problem(sets=["objective.x=[.inf]"])


def test_a_configuration_of_before_is_read_by_its_former_key(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("pictures: true\nbackbone: gaussian_mixture\n")
    # The preset smoke draws no images on gaussian_mixture; the file has the last word under either name.
    assert load_config(preset="smoke", options={"backbone": "gaussian_mixture"}).save_images is False
    assert load_config(preset="smoke", file=tmp_path / "config.yaml").save_images is True
    assert load_config(file=tmp_path / "config.yaml", sets=["save_images=false"]).save_images is False
    assert load_config(sets=["pictures=false"]).save_images is False
    assert "pictures" not in load_config(file=tmp_path / "config.yaml").resolved()
    assert RunConfig.model_validate({"pictures": False}).save_images is False
