"""What the command line says where the cause of an error is not in the place in which it shows."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from alignbench import NonFiniteError, RunError, UserError
from alignbench.cli.console import progress_numbers
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.tasks import load_task
from alignbench.tasks.prompts import read_prompts
from alignbench.training.pairs import write_pairs
from alignbench.training.run import run
from tests.support.command_line import in_this_process
from tests.support.plugins import ToyPolicy, toy_config, write_task

TOY_TASK = ["run", "--backbone", "gaussian_mixture", "--task", "rare_mode", "--preset", "smoke", "--set", "save_images=false"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "lr=1"], "configuration: there is no key 'lr'; did you mean 'optimizer.lr'?"),
        (["--set", "objective.lr=1"], "objective tmpo: there is no key 'lr'; did you mean 'optimizer.lr'?"),
        (["--set", "sampler.lr=1"], "sampler dynamic_tree: there is no key 'lr'; did you mean 'optimizer.lr'?"),
        (["--set", "objective.iterations=1"], "there is no key 'iterations'; did you mean 'iterations'?"),
        (["--set", "group_size=4", "--sampler", "independent"], "no key 'group_size'; did you mean 'sampler.group_size'?"),
        (["--set", "group_size=4"], "no key 'group_size'; sampler.group_size is a setting of flash, independent"),
        (["--set", "beta=2"], "there is no key 'beta'; did you mean 'objective.beta'?"),
        (["--set", "dimension=3", "--backbone", "gaussian_mixture"], "did you mean 'backbone.dimension'?"),
        (["--set", "evals.ocrr.reader=rapidocr"], "evals.ocrr: task 'ocr' has no such metric; did you mean 'ocr'"),
        (["--task", "rare_mode"], "task 'rare_mode' is only for the backbone gaussian_mixture, and the backbone is tiny; add"),
        (["--backbone", "gaussian_mixture", "--task", "ocr"], "gaussian_mixture cannot draw the prompts of task 'ocr'"),
        (["--backbone", "gaussian_mixture", "--task", "ocr"], "choose another --task, such as equal_modes, many_modes,"),
    ],
)
def test_a_misplaced_choice_is_named_with_its_place(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = in_this_process("run", "--preset", "smoke", *arguments, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    (sentence,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert says in sentence
    assert not (tmp_path / "out").exists()


def test_a_comparison_refuses_a_task_that_its_backbone_cannot_draw(tmp_path: Path) -> None:
    pair = ["--objectives", "grpo", "--samplers", "independent", "--task", "rare_mode"]
    done = in_this_process("compare", *pair, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "add --backbone gaussian_mixture" in done.stderr


def test_a_diverged_training_is_one_sentence_that_names_the_learning_rate(tmp_path: Path) -> None:
    options = {"--set": "optimizer.lr=1e9", "--iterations": "2", "--out": str(tmp_path / "out")}
    done = in_this_process(*TOY_TASK, *[word for option in options.items() for word in option])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "1 optimizer step with optimizer.lr=1e+09 the training has probably diverged: lower it" in done.stderr


def test_a_density_that_is_not_finite_is_named(tmp_path: Path) -> None:
    """Infinite weights would make the root finder behind `best_reward_at_kl` fail with a traceback."""
    import torch

    from alignbench import load_backbone

    policy = load_backbone("gaussian_mixture", quadrature=16)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.fill_(1e30)
    with pytest.raises(NonFiniteError, match="the model's density for the prompt 'rare_mode 0' is not finite"):
        policy.measure(["rare_mode 0"])  # type: ignore[attr-defined]


def test_a_budget_below_one_iteration_is_told(tmp_path: Path) -> None:
    done = in_this_process(*TOY_TASK, "--set", "budget.model_rows=1", "--out", str(tmp_path / "out"))
    assert done.returncode == 0
    text = " ".join(done.stderr.split())
    assert "budget.model_rows=1 is too small for one iteration, which took 18 model evaluations; the run ends after it" in text


def test_settings_of_metrics_reach_a_run_and_its_record(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    result = run(toy_config(task, evals={"diversity": {"pixels": False}}), tmp_path / "run")
    assert "pixel_diversity" not in result.metrics
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["evals"] == {"diversity": {"pixels": False}}


def test_an_evaluation_of_a_run_uses_its_settings_of_metrics(tmp_path: Path) -> None:
    run(toy_config(write_task(tmp_path), evals={"diversity": {"pixels": False}}), tmp_path / "run")
    done = in_this_process("eval", "--checkpoint", str(tmp_path / "run"), "--json")
    assert done.returncode == 0
    assert set(json.loads(done.stdout)["metrics"]) == {"brightness", "lgmd"}


def test_rewards_that_are_all_equal_have_two_possible_causes(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is 0\.5 for all 18 images of the base model.*random weights.*or its scorer is broken"):
        run(toy_config(write_task(tmp_path, "Constant")), tmp_path / "run")


def test_no_pair_at_all_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    suite = MetricSuite(load_task(str(write_task(tmp_path, "Constant"))))
    with pytest.raises(RunError, match="for each of the 2 prompts, all 3 images have equal rewards; draw more images"):
        write_pairs(ToyPolicy(ToyPolicy.Settings()), suite, ["train 0", "train 1"], 3, 0, tmp_path / "pairs")
    assert not (tmp_path / "pairs").exists()


def test_types_of_prompts_that_are_excluded_are_told(tmp_path: Path) -> None:
    every, rest = (str(tmp_path / name) for name in ("every.jsonl", "rest.jsonl"))
    assert in_this_process("prompts", "--objects", "drawn", "--each", "20", "--out", every).returncode == 0
    done = in_this_process("prompts", "--objects", "drawn", "--each", "1", "--exclude", every, "--out", rest)
    assert "fewer prompts than asked for beside those of --exclude: 0 of 1 single_object" in done.stderr
    assert len(read_prompts(Path(rest))) == 5


def test_prompts_are_refused_where_all_are_excluded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignbench.tasks.geneval_prompts.OFFICIAL_COUNTS", {"single_object": 80})
    every = tmp_path / "every.jsonl"
    in_this_process("prompts", "--objects", "drawn", "--out", str(every))
    done = in_this_process("prompts", "--objects", "drawn", "--exclude", str(every), "--out", str(tmp_path / "none.jsonl"))
    assert done.returncode == 2
    assert "no prompt about 'drawn' is left, since --exclude has them all" in done.stderr
    assert not (tmp_path / "none.jsonl").exists()


def test_a_task_for_one_backbone_accepts_what_derives_from_it(tmp_path: Path) -> None:
    from alignbench.tasks import check_backbone

    check_backbone(load_task("rare_mode"), "tests.alignbench.cli.test_errors:DerivedMixture")
    with pytest.raises(UserError, match="only for the backbone gaussian_mixture"):
        check_backbone(load_task("rare_mode"), "tests.support.plugins:ToyPolicy")


@pytest.mark.parametrize(("deviation", "shown"), [(0.0, ""), (3e-7, ""), (0.031, "  max |ratio - 1| 3e-02")])
def test_a_progress_line_has_the_ratio_only_where_it_is_off(deviation: float, shown: str) -> None:
    row = {"iteration": 4, "reward": 0.5, "seconds": 1.25, "ratio_abs_dev_max": deviation}
    assert progress_numbers(row, 10) == f"iteration 5/10  reward 0.500{shown}  1.2 s/it"


def test_missing_values_of_an_evaluation_are_told_with_their_metrics(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("0.png", "1.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / name)
    (tmp_path / "prompts.txt").write_text("a photo of a dog\na red circle\n")
    given = ["--images", str(tmp_path / "images"), "--prompts", str(tmp_path / "prompts.txt")]
    done = in_this_process(
        "eval", *given, "--evals", "quality,best_of", "--set", "evals.best_of.eval=tests.support.plugins:Sometimes"
    )
    assert done.returncode == 0, done.stderr
    assert "4 values are missing (pass_at_1, best_of_1): the scorer returned NaN, or the metric does not apply" in done.stdout


def __getattr__(name: str) -> object:
    if name == "DerivedMixture":
        from alignbench.backbones.gaussian_mixture import GaussianMixture

        return GaussianMixture
    raise AttributeError(name)
