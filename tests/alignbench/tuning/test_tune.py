"""Tunings of toy objectives, from the command line to a comparison of what was tuned."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignbench import UserError
from alignbench.comparison.grid import read_grid
from alignbench.comparison.planning import Request, plan_grid, read_request
from alignbench.comparison.tuned import FIRST_TUNING_SEED
from alignbench.records.record import read_result
from alignbench.records.tables import read_evals
from alignbench.tasks import load_task
from alignbench.tuning.planning import TuningRequest, plan_tuning
from alignbench.tuning.record import RECORD, TuningRecord, best_first
from alignbench.tuning.tune import read_request as read_tuning_request
from alignbench.tuning.tune import run_tuning
from tests.support.command_line import in_this_process
from tests.support.plugins import write_task

TOYS = "misaimed=tests.support.plugins:Misaimed,wavering=tests.support.plugins:Wavering"
SMALL = {"prompts_per_iteration": 2, "evaluation": {"prompts": 6, "images_per_prompt": 2, "steps": 4}}


def request(folder: Path, **changes: Any) -> TuningRequest:
    """The toy `wavering` with two trials of two iterations; half a second."""
    options = {
        "objectives": ["wavering=tests.support.plugins:Wavering"],
        "samplers": ["independent"],
        "task": str(write_task(folder)),
        "backbone": "tests.support.plugins:ToyPolicy",
        "preset": "smoke",
        "budget": {"model_rows": 130},
        "settings": SMALL,
        "threads": 1,
        "trials": 2,
        **changes,
    }
    return TuningRequest(**options)


def tune_in(folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """The command on the folder `t`; a call without options resumes it."""
    return in_this_process("tune", "--out", "t", *options, cwd=folder)


def results(folder: Path) -> dict[Path, int]:
    """When the record of each trial's run was written."""
    return {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/result.json")}


def ids(folder: Path) -> list[str]:
    return [cell.id for cell in read_grid(folder).cells()]


@pytest.mark.usefixtures("without_plots")
def test_a_planted_pair_changes_places_when_it_is_tuned(tmp_path: Path) -> None:
    write_task(tmp_path)
    evaluation = ["--set", "evaluation.prompts=6", "--set", "evaluation.images_per_prompt=8"]
    settings = ["--set", "optimizer.lr=0.003", "--set", "prompts_per_iteration=4", *evaluation, "--set", "threads=1"]
    basics = ["--objectives", TOYS, "--samplers", "independent", "--backbone", "tests.support.plugins:ToyPolicy"]
    limits = ["--task", "toy.yaml", "--preset", "smoke", "--budget", "model_rows=1500", "--lr-factor", "3"]
    done = tune_in(tmp_path, *basics, *limits, *settings, "--trials", "3")
    assert done.returncode == 0, done.stderr
    record = TuningRecord.read(tmp_path / "t" / RECORD)
    assert [method.objective for method in best_first(record.methods, trial=0)] == ["wavering", "misaimed"]
    assert [method.objective for method in best_first(record.methods)] == ["misaimed", "wavering"]
    assert {len(method.scored) for method in record.methods} == {3}
    assert "presets' settings: wavering x independent > misaimed x independent; tuned: misaimed x" in done.stdout

    first = results(tmp_path / "t")
    more = tune_in(tmp_path, "--trials", "4")
    assert more.returncode == 0, more.stderr
    second = results(tmp_path / "t")
    assert (len(first), len(second)) == (6, 8)
    assert {file: second[file] for file in first} == first
    longer = TuningRecord.read(tmp_path / "t" / RECORD)
    assert [method.trials[:3] for method in longer.methods] == [method.trials for method in record.methods]

    again = tune_in(tmp_path)
    assert results(tmp_path / "t") == second
    assert again.stdout == more.stdout

    file = tmp_path / "t" / "tuned.yaml"
    grid = plan_grid(read_request(file))
    best = longer.methods[0].best
    assert best is not None
    config = grid.methods()[0].config
    assert config.optimizer.lr == best.settings["optimizer.lr"]
    assert config.updates_per_rollout == best.settings["updates_per_rollout"]
    assert config.objective.settings == {"aim": best.settings["objective.aim"]}
    assert (config.task, config.evaluation.prompts, config.save_images) == (str(tmp_path / "toy.yaml"), 6, True)
    compared = in_this_process("compare", "--config", "t/tuned.yaml", "--seeds", "1", "--out", "c", cwd=tmp_path)
    assert compared.returncode == 0, compared.stderr
    finals = {
        cell: read_result(tmp_path / "c" / "runs" / cell).metrics["brightness"].final.value for cell in ids(tmp_path / "c")
    }
    assert (finals["misaimed-independent-toy-s0"] or 0) > (finals["wavering-independent-toy-s0"] or 1)


def test_trials_see_validation_prompts_alone_and_seeds_of_their_own(tmp_path: Path) -> None:
    tuning = run_tuning(plan_tuning(request(tmp_path, seeds=2)), tmp_path / "t")
    assert tuning.tuned is not None
    runs = sorted((tmp_path / "t" / "runs").iterdir())
    assert len(runs) == 4
    for run in runs:
        evals = read_evals(run)
        assert evals is not None
        assert set(evals["prompt"]) == set(load_task(str(tmp_path / "toy.yaml")).validation_prompts)
    assert {cell.seed for cell in read_grid(tmp_path / "t").cells()} == {FIRST_TUNING_SEED, FIRST_TUNING_SEED + 1}
    assert tuning.record.prompts == 4


def test_with_several_samplers_the_file_has_a_part_for_each(tmp_path: Path) -> None:
    tuning = run_tuning(plan_tuning(request(tmp_path, samplers=["independent", "fixed_tree"])), tmp_path / "t")
    assert tuning.tuned is not None
    grid = plan_grid(read_request(tuning.tuned))
    found = {(method.objective, method.sampler): method.config.optimizer.lr for method in grid.methods()}
    best = {(m.objective, m.sampler): m.best.settings["optimizer.lr"] for m in tuning.record.methods if m.best}
    assert found == best
    assert set(found) == {("wavering", "independent"), ("wavering", "fixed_tree")}


def test_the_first_trial_has_the_settings_that_compare_would_take(tmp_path: Path) -> None:
    asked = request(tmp_path, settings={**SMALL, "objectives": {"wavering": {"optimizer": {"lr": 0.02}}}})
    plan = plan_tuning(asked)
    compared = plan.base.methods()[0].config
    trial = plan.trial_grid.methods()[0].config
    assert plan.trials["wavering"][0].settings == {"optimizer.lr": 0.02, "updates_per_rollout": 1}
    assert trial.optimizer == compared.optimizer
    assert trial.budget == compared.budget
    assert plan.spaces["wavering"][0].values == pytest.approx((0.002, 0.2))


def test_a_strength_that_is_given_is_kept(tmp_path: Path) -> None:
    plan = plan_tuning(request(tmp_path, keep_strength=True))
    for objective, space in plan.spaces.items():
        assert [dimension.key for dimension in space] == ["optimizer.lr", "updates_per_rollout"]
        assert all(set(trial.settings) == {"optimizer.lr", "updates_per_rollout"} for trial in plan.trials[objective])
    assert plan_tuning(plan.request).spaces == plan.spaces


def test_a_resolved_request_gives_the_same_plan_again(tmp_path: Path) -> None:
    asked = request(tmp_path, budget={}, settings={**SMALL, "iterations": 3}, threads=None)
    plan = plan_tuning(asked, at_once=2)
    again = plan_tuning(plan.request, at_once=1)
    assert (again.request, again.trial_grid, again.trials) == (plan.request, plan.trial_grid, plan.trials)
    twice = plan_tuning(request(tmp_path, budget={}, settings={**SMALL, "iterations": 6}))
    assert twice.base.budget.model_rows == 2 * (plan.base.budget.model_rows or 0)


def test_failed_trials_are_told_and_not_chosen(tmp_path: Path) -> None:
    write_task(tmp_path)
    options = ["--objectives", "wavering=tests.support.plugins:Wavering,failing=tests.support.plugins:Failing"]
    options += ["--samplers", "independent", "--backbone", "tests.support.plugins:ToyPolicy", "--task", "toy.yaml"]
    options += ["--preset", "smoke", "--budget", "model_rows=130", "--set", "threads=1", "--trials", "2"]
    done = tune_in(tmp_path, *options)
    assert done.returncode == 1
    assert "2 of 4 trials failed and cannot be chosen, such as trial 0 of failing x independent" in done.stderr
    assert "a fault of the plug-in" in done.stderr
    assert "failing x independent" in done.stdout
    assert not (tmp_path / "t" / "tuned.yaml").exists()


def test_a_task_without_validation_prompts_cannot_tune(tmp_path: Path) -> None:
    file = write_task(tmp_path)
    content = {key: value for key, value in yaml.safe_load(file.read_text()).items() if key != "validation_prompts"}
    asked = request(tmp_path)
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="task 'toy' has no validation prompts, and test prompts must not choose settings"):
        plan_tuning(asked)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objectives": ["grop"]}, "there is no objective 'grop'; did you mean 'grpo'"),
        ({"objectives": ["none"]}, "objective none trains nothing, so there is nothing to tune"),
        ({"objectives": []}, "tune needs --objectives and --samplers"),
        ({"updates": [0, 1]}, "--updates takes whole numbers from 1 on, got 0"),
        ({"settings": {"optimizer": {"lrr": 1}}}, "there is no key 'optimizer.lrr'; did you mean 'lr'"),
    ],
)
def test_a_wrong_request_is_refused_in_one_sentence(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        plan_tuning(request(tmp_path, **changes))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trials", "0"], "Invalid value for '--trials'"),
        (["--trials", "2", "--updates", "1,two"], "--updates takes whole numbers above 0, separated by commas; got '1,two'"),
        (["--lr-factor", "1"], "lr_factor: input should be greater than 1, got 1.0"),
        (["--objectives", "grpo"], "tune needs --objectives and --samplers"),
        (["--objectives", "grpo", "--samplers", "independent", "--task", "ocrr"], "there is no task 'ocrr'"),
    ],
)
def test_a_slip_on_the_command_line_leaves_nothing_behind(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = in_this_process("tune", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_trials_and_seeds_are_only_raised_and_a_comparison_is_no_tuning(tmp_path: Path) -> None:
    run_tuning(plan_tuning(request(tmp_path, seeds=2)), tmp_path / "t")
    fewer = in_this_process("tune", "--out", "t", "--seeds", "1", cwd=tmp_path)
    assert (fewer.returncode, "the folder already has 2 seeds, which can only be raised" in fewer.stderr) == (2, True)
    other = in_this_process("tune", "--out", "t", "--lr-factor", "2", cwd=tmp_path)
    assert (other.returncode, "was run with other settings: optimizer.lr" in other.stderr) == (2, True)
    former = read_tuning_request(tmp_path / "t")
    assert former is not None
    assert former.lr_factor == 10
    more = in_this_process("tune", "--out", "t", "--trials", "3", "--engine", "lokal", cwd=tmp_path)
    assert (more.returncode, "there is no engine 'lokal'" in more.stderr) == (2, True)
    assert read_tuning_request(tmp_path / "t") == former
    (tmp_path / "c").mkdir()
    grid = plan_grid(Request(objectives=["grpo"], samplers=["independent"], backbone="gaussian_mixture"))
    (tmp_path / "c" / "comparison.yaml").write_text(yaml.safe_dump(grid.model_dump(mode="json")))
    other = in_this_process("tune", "--out", "c", cwd=tmp_path)
    assert (other.returncode, "c holds a comparison, not a tuning" in other.stderr) == (2, True)


def test_rewards_count_by_the_weights_that_the_trials_train_with() -> None:
    mixed: dict[str, Any] = {"objectives": ["grpo"], "samplers": ["independent"], "task": "mixed", "trials": 2}
    assert plan_tuning(TuningRequest(**mixed)).weights == load_task("mixed").weights
    with pytest.raises(UserError, match="--select hypervolume needs a task with one reward, and the trials train on"):
        plan_tuning(TuningRequest(**mixed, select="hypervolume"))
    (first, *others) = load_task("mixed").weights
    one = TuningRequest(**mixed, select="hypervolume", settings={"reward": {first: 0.5, **dict.fromkeys(others, 0.0)}})
    assert plan_tuning(one).weights == {first: 0.5}
    service = TuningRequest(**mixed, select="hypervolume", settings={"scorer_url": "http://127.0.0.1:9"})
    assert plan_tuning(service).weights == {"remote": 1.0}
