"""Sweeps: which methods they make, what is refused before anything runs, and what results say about the points."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from alignbench import UserError
from alignbench.comparison.grid import Grid
from alignbench.comparison.planning import Request, command_of, plan_grid, read_request
from alignbench.comparison.reading import read_results
from alignbench.comparison.runner import check_folder, compare
from alignbench.comparison.sweep_requests import parse_sweeps
from alignbench.comparison.sweeps import point_text, value_text
from tests.support.command_line import in_this_process

SMALL: dict[str, Any] = {
    "objectives": ["tmpo", "grpo"],
    "samplers": ["independent"],
    "tasks": ["rare_mode"],
    "seeds": [0],
    "backbone": "gaussian_mixture",
    "preset": "smoke",
    "threads": 1,
    "settings": {
        "backbone": {"name": "gaussian_mixture", "quadrature": 10},
        "evaluation": {"prompts": 2, "images_per_prompt": 4, "steps": 4},
        "save_images": False,
    },
}
TWO_REWARDS = {
    "description": "two rewards",
    "train_prompts": "prompts.txt",
    "eval_prompts": "prompts.txt",
    "same_prompts": True,
    "reward": [{"eval": "tests.support.plugins:Brightness", "label": name} for name in ("first", "second")],
}


def planned(*sweeps: str, **changes: Any) -> Grid:
    return plan_grid(Request(**{**SMALL, **changes}).with_options(sweep=parse_sweeps(sweeps)))


def methods(*sweeps: str, **changes: Any) -> list[str]:
    return [str(method).removesuffix(" x independent") for method in planned(*sweeps, **changes).methods()]


def test_each_value_makes_a_method_and_other_objectives_stay_one() -> None:
    grid = planned("tmpo.beta=0.5,4")
    assert [cell.id for cell in grid.cells()] == [
        "tmpo-beta=0.5-independent-rare_mode-s0",
        "tmpo-beta=4-independent-rare_mode-s0",
        "grpo-independent-rare_mode-s0",
    ]
    configs = [method.config.objective for method in grid.methods()]
    assert [(c.name, c.label, c.settings.get("beta")) for c in configs] == [
        ("tmpo", "tmpo(beta=0.5)", 0.5),
        ("tmpo", "tmpo(beta=4)", 4),
        ("grpo", None, None),
    ]


def test_a_name_alone_sweeps_the_declared_strength() -> None:
    assert methods("tmpo", "grpo.kl_beta=0,1") == [
        "tmpo(beta=1)",
        "tmpo(beta=2)",
        "tmpo(beta=4)",
        "grpo(kl_beta=0)",
        "grpo(kl_beta=1)",
    ]
    assert methods("hot", objectives=["hot=tmpo"]) == ["hot(beta=1)", "hot(beta=2)", "hot(beta=4)"]


def test_a_sweep_by_label_takes_the_place_of_one_by_the_name_behind_it() -> None:
    both = ["hot=tmpo", "tmpo"]
    assert methods("tmpo.beta=1", objectives=["hot=tmpo"]) == ["hot(beta=1)"]
    assert methods("hot.beta=3", "tmpo.beta=1,2", objectives=both) == ["hot(beta=3)", "tmpo(beta=1)", "tmpo(beta=2)"]
    assert planned("hot.beta=3", "tmpo.beta=1,2", objectives=both).methods()[0].swept == {"hot.beta": 3}


def test_several_sweeps_of_a_method_multiply() -> None:
    grid = planned("tmpo.beta=1,2", "optimizer.lr=1e-4,0.01", "sampler.group_size=2,4")
    found = grid.methods()
    assert len(found) == 2 * 2 * 2 + 2 * 2
    assert str(found[1]) == "tmpo(beta=1,lr=0.0001) x independent(group_size=4)"
    assert found[1].swept == {"tmpo.beta": 1, "optimizer.lr": 1e-4, "sampler.group_size": 4}
    assert (found[1].config.optimizer.lr, found[1].config.sampler.settings["group_size"]) == (1e-4, 4)
    assert {method.base for method in found} == {"tmpo x independent", "grpo x independent"}


def test_the_estimator_of_likelihoods_is_swept() -> None:
    assert methods("grpo.likelihood=path,elbo") == ["tmpo", "grpo(likelihood=path)", "grpo(likelihood=elbo)"]
    assert methods("likelihood=path,elbo", objectives=["grpo"]) == ["grpo(likelihood=path)", "grpo(likelihood=elbo)"]
    with pytest.raises(UserError, match="sweep likelihood has no effect on nft x independent, which does not ask for log-prob"):
        planned("likelihood=path,elbo", objectives=["nft"])
    with pytest.raises(UserError, match="objective subtb relates the steps of a path to each other"):
        planned("likelihood=path,elbo", objectives=["subtb"])


def test_a_key_behind_a_name_is_swept_for_that_name_alone() -> None:
    assert methods("tmpo.optimizer.lr=1e-4,1e-3") == ["tmpo(lr=0.0001)", "tmpo(lr=0.001)", "grpo"]
    assert str(planned("independent.steps=4").methods()[0]) == "tmpo x independent(steps=4)"


def test_the_weights_of_rewards_are_swept(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("rare_mode 0\nrare_mode 1\n")
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(TWO_REWARDS))
    two = {"tasks": [str(tmp_path / "two.yaml")]}
    assert methods("reward.second=0.25,1", objectives=["grpo"], **two) == ["grpo(second=0.25)", "grpo(second=1)"]
    with pytest.raises(UserError, match=r"sweep reward.secnd=1: .*task 'two' has no such reward; did you mean 'second'"):
        planned("reward.secnd=1", **two)
    with pytest.raises(UserError, match="every reward has weight 0"):
        planned("reward.first=0", "reward.second=0,1", **two)


def test_a_file_and_its_parts_have_sweeps(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    parts = {"first": {"objectives": ["tmpo"]}, "second": {"objectives": ["grpo"], "sweep": {"grpo": {"kl_beta": [0, 1]}}}}
    file.write_text(yaml.safe_dump({**SMALL, "sweep": {"tmpo.beta": [1, 2]}, "parts": parts}))
    grid = plan_grid(read_request(file))
    assert [str(method) for method in grid.methods()] == [
        "first: tmpo(beta=1) x independent",
        "first: tmpo(beta=2) x independent",
        "second: grpo(kl_beta=0) x independent",
        "second: grpo(kl_beta=1) x independent",
    ]


def test_the_command_makes_the_same_grid_again() -> None:
    grid = planned("tmpo", "optimizer.betas=[0.9,0.99],[0.8,0.9]")
    command = command_of(grid)
    assert command.endswith("--sweep tmpo.beta=1.0,2.0,4.0 --sweep 'optimizer.betas=[0.9, 0.99],[0.8, 0.9]'")
    sweep = parse_sweeps(["tmpo.beta=1.0,2.0,4.0", "optimizer.betas=[0.9, 0.99],[0.8, 0.9]"])
    assert Request(**SMALL).with_options(sweep=sweep).sweep == grid.sweep


@pytest.mark.parametrize(
    ("sweeps", "says"),
    [
        (["tmpo.betta=1"], "objective tmpo has no setting 'betta'; did you mean 'beta'"),
        (["lr=1"], "there is no key 'lr' to sweep; did you mean 'optimizer.lr'?"),
        (["tmp.beta=1"], "there is no key 'tmp.beta' to sweep; did you mean 'tmpo.beta'"),
        (["optimizer.lrr=1"], "there is no key 'optimizer.lrr'; did you mean 'lr'?"),
        (["nft.kl_beta=1"], "nft is not compared; add it to the objectives"),
        (["nft"], "nft is not compared; add it to the objectives"),
        (["branch.levels=1"], "branch is not compared; add it to the samplers"),
        (["tmpo.beta="], "sweep tmpo.beta has no values"),
        (["tmpo.beta=1,1.0"], "sweep tmpo.beta has 1 twice"),
        (["tmpo.beta=1", "tmpo.beta=2"], "--sweep tmpo.beta is there twice"),
        (["tmpo", "tmpo.beta=2"], "sweep tmpo.beta is there twice"),
        (["tmpo.beta=1", "tmpo.objective.beta=2"], "sweeps tmpo.beta and tmpo.objective.beta both set objective.beta of tmpo"),
        (["tmpo.beta={a: 1}"], "a value is a number, a text"),
        (["tmpo.beta=1,[2"], "'1,[2' are not YAML values with commas"),
        (
            ["grpo.kl_beta=0,-1"],
            "sweep grpo.kl_beta=-1: objective grpo: kl_beta: input should be greater than or equal to 0, got -1",
        ),
        (["optimizer.lr=0"], "sweep optimizer.lr=0: configuration: optimizer.lr: input should be greater than 0"),
        (["sampler.groupsize=2"], "sweep sampler.groupsize=2: sampler independent: .*did you mean 'group_size'"),
        (["grpo.clip=0.1,0.2"], "clip has no effect on grpo x independent, since with updates_per_rollout=1"),
        (["seed=1,2"], "seed cannot be swept; --seeds takes several"),
        (["objective.label=a"], "objective cannot be swept; --objectives takes several"),
        (["micro_batch=1,2"], "micro_batch cannot be swept, since it does not change what a method is"),
        (["=1"], "--sweep takes KEY=VALUE,VALUE"),
    ],
)
def test_a_wrong_sweep_is_one_sentence_before_anything_runs(sweeps: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says.replace("[", r"\[").replace("?", r"\?")):
        planned(*sweeps)


def test_an_objective_without_a_strength_cannot_be_swept_by_its_name() -> None:
    with pytest.raises(UserError, match="sweep ddpo: ddpo declares no strength"):
        planned("ddpo", objectives=["ddpo"])


def test_a_sweep_in_a_file_takes_lists() -> None:
    with pytest.raises(UserError, match=r"sweep tmpo\.beta takes a list of values, got 2"):
        plan_grid(Request(**SMALL, sweep={"tmpo": {"beta": 2}}))


def test_a_name_that_is_listed_twice_is_refused() -> None:
    with pytest.raises(UserError, match="--objectives has grpo twice; leave one of them out"):
        planned(objectives=["grpo", "grpo"])


def test_a_budget_below_one_iteration_is_refused() -> None:
    # smoke has two prompts in an iteration and groups of 4 chains with 4 steps, 3 of them stochastic: 32 + 24 rows, 8 scores.
    assert planned(budget={"model_rows": 56}).budget.model_rows == 56
    with pytest.raises(
        UserError, match="budget model_rows=55 is too small for one iteration of tmpo x independent, which takes 56"
    ):
        planned(budget={"model_rows": 55})
    with pytest.raises(
        UserError, match="budget reward_calls=7 is too small for one iteration of tmpo x independent, which takes 8"
    ):
        planned(budget={"reward_calls": 7})


def test_values_can_be_added_to_a_folder_but_not_left_out(tmp_path: Path) -> None:
    out, one = tmp_path / "out", {"objectives": ["tmpo"], "budget": {"model_rows": 56}}
    compare(planned("tmpo.beta=1", **one), out)
    first = (out / "runs" / "tmpo-beta=1-independent-rare_mode-s0" / "result.json").read_bytes()
    record = compare(planned("tmpo.beta=4,1", **one), out)
    assert [cell.status for cell in record.cells] == ["complete"] * 2
    assert [(cell.base_method, cell.swept) for cell in record.cells] == [
        ("tmpo x independent", {"tmpo.beta": 4}),
        ("tmpo x independent", {"tmpo.beta": 1}),
    ]
    assert (out / "runs" / "tmpo-beta=1-independent-rare_mode-s0" / "result.json").read_bytes() == first
    with pytest.raises(UserError, match=r"name sweeps tmpo\.beta=1 too, or choose another --out"):
        check_folder(planned("tmpo.beta=4", **one).cells(), out)

    results = read_results(out)
    frame = results.runs_frame.drop_duplicates("cell")
    columns = ["cell", "base_method", "sweep", "strength", "sweep_value"]
    assert frame[columns].values.tolist() == [
        ["tmpo(beta=4) x independent", "tmpo x independent", "tmpo.beta", "beta=4", 4.0],
        ["tmpo(beta=1) x independent", "tmpo x independent", "tmpo.beta", "beta=1", 1.0],
    ]
    base = results.cells_frame.set_index("cell").loc["base model"].iloc[0].to_dict()
    assert [base[column] for column in columns[1:4]] == ["base model", "", ""]
    assert np.isnan(base["sweep_value"])
    assert set(columns) <= set(results.curves_frame)


def test_a_method_without_a_sweep_is_its_own_base(tmp_path: Path) -> None:
    compare(planned(objectives=["tmpo"], budget={"model_rows": 56}), tmp_path / "out")
    (row,) = read_results(tmp_path / "out").runs_frame.drop_duplicates("cell").to_dict("records")
    assert (row["base_method"], row["sweep"], row["strength"]) == ("tmpo x independent", "", "")
    with pytest.raises(UserError, match="name tmpo x independent by itself too"):
        check_folder(planned("tmpo", objectives=["tmpo"], budget={"model_rows": 56}).cells(), tmp_path / "out")


def test_a_dry_run_of_the_command_shows_the_points(tmp_path: Path) -> None:
    words = shlex.split("--objectives tmpo,grpo --samplers independent --backbone gaussian_mixture --preset smoke --seeds 1")
    words += ["--dry-run", "--out", str(tmp_path / "out")]
    done = in_this_process("compare", *words, "--sweep", "tmpo.beta=0.5,1", "--sweep", "grpo")
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    assert all(label in shown for label in ("tmpo(beta=0.5)", "grpo(kl_beta=0.01)", "5 methods"))


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1"), (1, "1"), (1e-4, "0.0001"), (0.123456789, "0.123456789"), (True, "true"), (None, "null"), ([1, 2.5], "1+2.5")],
)
def test_a_value_has_one_text_however_it_was_written(value: Any, text: str) -> None:
    assert value_text(value) == text


def test_keys_that_end_alike_are_written_out() -> None:
    assert point_text({"tmpo.beta": 1, "optimizer.lr": 0.1}) == "beta=1, lr=0.1"
    assert point_text({"sampler.steps": 4, "evaluation.steps": 8}) == "sampler.steps=4, evaluation.steps=8"
