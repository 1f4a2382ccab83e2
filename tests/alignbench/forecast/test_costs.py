"""What is told before a run: rows by hand, memory against what the profiler sees, and the words of the dry run."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from alignbench import UserError, load_backbone, load_objective, run
from alignbench.backbone import BackboneSettings
from alignbench.cli.app import app
from alignbench.config.run_config import RunConfig
from alignbench.errors import RunError
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.forecast.costs import forecast
from alignbench.forecast.expected_rows import ExpectedRows, model_rows, rows_per_iteration, trains_guided
from alignbench.forecast.memory import estimate_memory
from alignbench.forecast.pace import Pace, measure_pace, seconds_of_evaluations, seconds_per_iteration
from alignbench.load import load_configured_objective
from alignbench.tasks import load_task
from alignbench.training.pairs import write_pairs
from alignbench.training.trainer import Trainer
from tests.support.allocation import most_allocated
from tests.support.pipelines import FAMILIES, SIDE, save_pipeline
from tests.support.plugins import ToyPolicy, toy_config, write_task


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_pipeline(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def real_config(folder: Path, task: Path, **changes: Any) -> RunConfig:
    return toy_config(task, backbone={"name": str(folder), "resolution": SIDE}, device="cpu", **changes)


# --- rows and time


def test_rows_are_those_of_the_plan(tmp_path: Path) -> None:
    # A tree of 2 x 2 leaves over 4 steps with splits at 1 and 2: 1 + 1 + 2 + 4 rows, 1 + 2 distinct parents; two groups.
    assert rows_per_iteration(toy_config(write_task(tmp_path))) == ExpectedRows(
        rollout=16, scored=6, replay=6, asked=6, widest=8, images=8
    )


@pytest.mark.parametrize(
    ("objective", "changes", "rows"),
    [
        ({"name": "grpo"}, {}, 16 + 6),
        ({"name": "grpo"}, {"updates_per_rollout": 3}, 16 + 18),
        ({"name": "grpo"}, {"micro_batch": 4}, 16 + 6),
        # The first update is known from the rollout, the second is evaluated twice.
        ({"name": "tmpo"}, {"micro_batch": 4, "updates_per_rollout": 2}, 16 + 6 + 2 * 6),
        ({"name": "grpo", "parts": 2}, {"updates_per_rollout": 2}, 16 + 6),
        # The base model is asked about all rows in both updates.
        ({"name": "grpo", "parts": 2, "kl_beta": 0.1}, {"updates_per_rollout": 2}, 16 + 6 + 2 * 6),
        ({"name": "grpo", "kl_beta": 0.1}, {"micro_batch": 4, "updates_per_rollout": 2}, 16 + 2 * 2 * 6),
        # Eight images, and the policy of the rollout in the second update; two images of each group, and the base model.
        ({"name": "nft", "kl_beta": 0.0, "decay_rate": 0.0}, {"updates_per_rollout": 2}, 16 + 2 * 8 + 8),
        # An behaviour policy that lags is asked in the first update too.
        ({"name": "nft", "kl_beta": 0.0}, {"updates_per_rollout": 2}, 16 + 2 * 8 + 2 * 8),
        ({"name": "dpo"}, {}, 16 + 2 * 4),
        # Four pairs of a sigma and noise for each of eight images; from the second update on the behaviour policy as well.
        ({"name": "grpo"}, {"likelihood": "elbo"}, 16 + 32),
        ({"name": "grpo"}, {"likelihood": "elbo", "updates_per_rollout": 2}, 16 + 2 * 32 + 32),
        ({"name": "grpo"}, {"likelihood": "elbo", "updates_per_rollout": 2, "micro_batch": 4}, 16 + 2 * 2 * 32 + 32),
        ({"name": "grpo", "parts": 2}, {"likelihood": "elbo", "updates_per_rollout": 2}, 16 + 2 * 16 + 32),
        ({"name": "grpo", "kl_beta": 0.1}, {"likelihood": "elbo"}, 16 + 2 * 32),
    ],
)
def test_rows_of_caching_reference_and_old_policy_are_counted(
    tmp_path: Path, objective: dict[str, Any], changes: dict[str, Any], rows: int
) -> None:
    config = toy_config(write_task(tmp_path), objective=objective, **changes)
    made = load_configured_objective(config)
    assert model_rows(config, rows_per_iteration(config, made), made.needs) == rows


@pytest.mark.parametrize("objective", ["grpo", "dpo", "nft", "raft", "awm", "dgpo", "ram", "crd"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batch": 2, "updates_per_rollout": 2},
        {"likelihood": "elbo", "elbo": {"draws": 2}, "micro_batch": 2, "updates_per_rollout": 2},
    ],
)
def test_a_run_spends_the_rows_that_were_told(tmp_path: Path, objective: str, changes: dict[str, Any]) -> None:
    config = toy_config(write_task(tmp_path), objective=objective, **changes)
    spent = run(config, tmp_path / "run").budget
    assert forecast(config).rows * 3 == spent.model_rows_rollout + spent.model_rows_train


def test_seconds_are_rows_and_pictures_at_their_pace(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path), objective={"name": "grpo", "kl_beta": 0.1}, updates_per_rollout=2)
    pace = Pace(forward_row=1.0, train_row=10.0, unscored_row=0.5, image=100.0, rewards=1, evaluated_image=1000.0)
    needs = load_objective("grpo", kl_beta=0.1).needs
    # 16 rows of the rollout, 6 of them scored; twice 6 with their way back and 6 of the reference; 8 images.
    found = seconds_per_iteration(config, rows_per_iteration(config), pace, needs)
    assert found == 6 + 10 * 0.5 + 2 * (6 * 10 + 6) + 800


def test_data_of_keepers_take_rows_and_seconds(tmp_path: Path) -> None:
    keepers = {"data": 0.1, "data_images": 5, "data_from": "base"}
    config = toy_config(write_task(tmp_path), objective="grpo", keepers=keepers, updates_per_rollout=2, micro_batch=4)
    without = config.model_copy(update={"keepers": type(config.keepers)()})
    made = load_objective("grpo")
    pace = Pace(forward_row=1.0, train_row=10.0, unscored_row=1.0, image=100.0, rewards=1, evaluated_image=1000.0)
    seconds = [seconds_per_iteration(c, rows_per_iteration(c, made), pace, made.needs) for c in (config, without)]
    # Five images of four steps are drawn; in both updates two microbatches need each row twice.
    assert seconds[0] - seconds[1] == 5 * 4 + 2 * 5 * (10 + 1)
    assert forecast(config).data_rows == 5 * 4 + 2 * 2 * 5


def test_rows_without_guidance_have_a_pace_of_their_own(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path), objective={"name": "dpo"}, updates_per_rollout=2)
    made = load_objective("dpo")
    pace = Pace(
        forward_row=1.0, train_row=10.0, unscored_row=1.0, image=100.0, rewards=1, evaluated_image=1000.0, unguided=(0.5, 4.0)
    )
    rows = rows_per_iteration(config, made)
    # 16 rows of the rollout; twice 4 images of two pairs with their way back and for the reference; 8 images.
    assert seconds_per_iteration(config, rows, pace, made.needs, guided=trains_guided(made)) == 16 + 2 * (4 * 4 + 4 * 0.5) + 800
    assert seconds_per_iteration(config, rows, pace, made.needs) == 16 + 2 * (4 * 10 + 4) + 800


def test_seconds_of_evaluations_count_those_along_the_training(tmp_path: Path) -> None:
    e = {"prompts": 6, "images_per_prompt": 4, "validation_images": 3}
    pace = Pace(forward_row=1.0, train_row=10.0, unscored_row=1.0, image=100.0, rewards=1, evaluated_image=1000.0)
    # Base and trained model with 6 x 4 images each, and 64 paths of 8 steps whose 7 noisy ones the base model sees as well.
    end = 2 * 24 * 1000 + 64 * (8 + 7)
    config = toy_config(write_task(tmp_path), evaluation=e)
    assert seconds_of_evaluations(config, pace, 10, bases=1) == end
    assert seconds_of_evaluations(config, pace, 10, bases=0) == end - 24 * 1000
    # The task's four validation prompts: at iterations 0, 4, 8 and the end, with 24 paths each.
    config = toy_config(write_task(tmp_path), evaluation={**e, "every": 4})
    assert seconds_of_evaluations(config, pace, 10, bases=1) == end + 4 * (4 * 3 * 1000 + 24 * 15)
    assert seconds_of_evaluations(config, pace, None, bases=1) == end


def test_seconds_of_evaluations_count_each_candidate(tmp_path: Path) -> None:
    e = {"prompts": 6, "images_per_prompt": 4}
    pace = Pace(forward_row=1.0, train_row=10.0, unscored_row=1.0, image=100.0, rewards=1, evaluated_image=1000.0)
    plain = toy_config(write_task(tmp_path), objective="none", evaluation=e)
    best = toy_config(write_task(tmp_path), objective="none", evaluation=e, inference={"method": "best_of_n", "n": 8})
    # Images of the base model serve as those of the trained one; the best of 8 are drawn beside them.
    assert seconds_of_evaluations(plain, pace, 0, bases=1) == 24 * 1000
    assert seconds_of_evaluations(best, pace, 0, bases=1) == (1 + 8) * 24 * 1000


def test_a_short_iteration_is_run_and_corrects_the_sum_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config(write_task(tmp_path), iterations=2)
    made = load_configured_objective(config)
    rows = rows_per_iteration(config, made)
    spent: list[float] = []

    def iterate(trainer: Trainer) -> dict[str, Any]:
        began = time.perf_counter()
        row = original(trainer)
        spent.append(time.perf_counter() - began)
        return row

    original = Trainer.iterate
    monkeypatch.setattr(Trainer, "iterate", iterate)
    pace = measure_pace(config, ToyPolicy(BackboneSettings()))
    assert len(spent) == 2
    # The time of the second one; the clock inside it starts a moment later and ends a moment earlier.
    assert seconds_per_iteration(config, rows, pace, made.needs) == pytest.approx(spent[1], rel=0.2)
    monkeypatch.setattr("alignbench.forecast.pace.SHORT_ITERATION", 0.0)
    assert measure_pace(config, ToyPolicy(BackboneSettings())).correction == 1.0
    assert len(spent) == 2


class Mixing(ToyPolicy):
    """Guidance is what is told with the prompts."""

    def without_guidance(self, conditioning: torch.Tensor) -> torch.Tensor:
        return conditioning.clone()


@pytest.mark.parametrize(("model", "mixes"), [(ToyPolicy, False), (Mixing, True)])
def test_only_a_mixture_of_two_velocities_is_timed_without_guidance(
    tmp_path: Path, model: type[ToyPolicy], mixes: bool
) -> None:
    pace = measure_pace(toy_config(write_task(tmp_path)), model(BackboneSettings()))
    assert (pace.unguided is not None) == mixes


def test_objectives_on_final_images_train_without_guidance() -> None:
    guided = {name: trains_guided(load_objective(name)) for name in ("grpo", "tmpo", "dpo", "raft", "nft")}
    assert guided == {"grpo": True, "tmpo": True, "dpo": False, "raft": False, "nft": False}


def test_a_scorer_is_given_as_long_as_in_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"did not answer within 0.02 s while it was timed; .* raise scorer_timeout"):
        forecast(toy_config(write_task(tmp_path, "Slow"), scorer_timeout=0.02))


# --- memory


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"train": "full"}, {"precision": "bf16"}],
    ids=["lora", "checkpointed", "full", "bf16"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_memory_of_a_micro_batch_is_what_the_allocator_gives(
    folders: dict[str, Path], tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    settings = {"resolution": SIDE, "guidance": 2.0, **settings}
    real, on_meta = (load_backbone(str(folders[family]), device=device, **settings) for device in ("cpu", "meta"))
    config = toy_config(write_task(tmp_path))
    told = estimate_memory(config, on_meta, "a", ExpectedRows(4, 3, 3, 3, 4, 4)).training
    seen = most_allocated(real, "a", 3)
    # Kernels have work space of their own, and some write in place what is told as two tensors.
    assert told == pytest.approx(seen, rel=0.05)
    assert told > 100_000


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_what_training_adds_are_counted_to_the_byte(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    config = toy_config(write_task(tmp_path), ema={"decay": 0.9, "every": 1})
    policy = load_backbone(str(folders[family]), device="meta", precision="bf16", resolution=SIDE)
    found = estimate_memory(config, policy, "a", rows_per_iteration(config))
    files = {f: f.stat().st_size for f in folders[family].rglob("*.safetensors")}
    trained = sum(p.numel() for p in policy.parameters())
    # On disk in float32, here in bfloat16 but for the LoRA; a file has some kilobytes of names and shapes besides.
    frozen = sum(size for f, size in files.items() if "text_encoder" not in f.parent.name)
    assert found.weights - 4 * trained == pytest.approx(frozen / 2, abs=20_000)
    assert found.text_encoders == pytest.approx(sum(files.values()) / 2 - frozen / 2, abs=20_000)
    assert (found.gradients, found.optimizer, found.ema) == (4 * trained, 8 * trained, 4 * trained)
    resident = found.weights + found.gradients + found.optimizer + found.ema
    assert found.peak == resident + max(found.rollout, found.training, found.decoding)


def test_memory_of_training_without_guidance_is_that_of_a_model_without_it(folders: dict[str, Path], tmp_path: Path) -> None:
    config, rows = toy_config(write_task(tmp_path)), ExpectedRows(4, 3, 3, 3, 4, 4)
    guided, plain = (load_backbone(str(folders["sd3"]), device="meta", resolution=SIDE, guidance=g) for g in (2.0, 1.0))
    found, expected = estimate_memory(config, guided, "a", rows, guided=False), estimate_memory(config, plain, "a", rows)
    assert found.training == expected.training
    assert found.rollout > 1.5 * expected.rollout
    assert estimate_memory(config, guided, "a", rows).training > 1.5 * found.training


def test_a_micro_batch_bounds_what_a_call_needs(folders: dict[str, Path], tmp_path: Path) -> None:
    policy = load_backbone(str(folders["flux"]), device="meta", resolution=SIDE)
    task, rows = write_task(tmp_path), ExpectedRows(64, 32, 32, 32, 16, 16)
    whole, halves, quarters = (estimate_memory(toy_config(task, micro_batch=n), policy, "a", rows) for n in (None, 16, 8))
    assert whole.training / halves.training == pytest.approx(2, rel=0.05)
    assert whole.rollout == halves.rollout  # no step of a rollout has more than 16 rows
    assert halves.rollout / quarters.rollout == pytest.approx(2, rel=0.05)


# --- the forecast


def test_a_folder_of_config_files_is_weighed_and_not_timed(folders: dict[str, Path], tmp_path: Path) -> None:
    bare = shutil.copytree(folders["flux"], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    task = write_task(tmp_path)
    with_weights, without = (forecast(real_config(folder, task)) for folder in (folders["flux"], bare))
    assert without.memory == with_weights.memory
    assert without.parameters == with_weights.parameters
    assert without.seconds_iteration is None
    assert without.not_measured is not None
    assert "transformer lacks weights" in without.not_measured
    assert with_weights.not_measured is None
    assert with_weights.seconds_iteration is not None
    assert with_weights.seconds_iteration > 0


def test_a_model_too_large_for_a_cpu_is_weighed_and_not_timed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignbench.forecast.costs.CPU_LIMIT", 1000)
    found = forecast(real_config(folders["sd3"], write_task(tmp_path)))
    assert (found.seconds_iteration, found.seconds_evaluation) == (None, None)
    assert found.not_measured == "no GPU here, and the model is too large for a CPU"


def test_an_objective_that_trains_nothing_has_no_iterations(tmp_path: Path) -> None:
    assert forecast(toy_config(write_task(tmp_path), objective="none")).iterations == 0


def test_what_a_run_would_refuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 6 evaluation prompts"):
        forecast(toy_config(write_task(tmp_path), evaluation={"prompts": 7}))
    with pytest.raises(UserError, match="is not a diffusers folder"):
        forecast(real_config(tmp_path, write_task(tmp_path)))


def test_the_command_tells_what_a_run_would_do_and_leaves_nothing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignbench.forecast.pace.SHORT_ITERATION", 0.0)  # none is timed, which takes longer than all else
    (tmp_path / "tasks").mkdir()
    words = ["run", "--backbone", str(folders["flux"]), "--preset", "paper", "--objective", "grpo", "--dry-run"]
    words += ["--task", str(write_task(tmp_path / "tasks")), "--out", str(tmp_path / "run")]
    for set_ in (
        f"backbone.resolution={SIDE}",
        "backbone.precision=fp32",
        "evaluation.prompts=6",
        "evaluation.images_per_prompt=2",
        "evaluation.steps=4",
        "prompts_per_iteration=2",
        "threads=1",
    ):
        words += ["--set", set_]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    text = " ".join(told.stdout.split())
    assert "grpo x independent on" in text
    # 2 prompts x 27 images; 6 steps in the rollout, 5 of them replayed, in one pass of several micro-batches.
    assert "250 iterations of 2 prompts, 54 images and 594 model evaluations each" in text
    assert "gradient caching" not in text
    assert "from model evaluations and images timed just now" in text
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert (found["rollout_rows"], found["replay_rows"], found["rows"]) == (324, 270, 594)
    assert found["memory"]["peak"] > found["memory"]["weights"]
    assert [f.name for f in tmp_path.iterdir()] == ["tasks"]


def test_a_folder_that_is_taken_and_a_run_to_resume_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    taken = CliRunner().invoke(app, ["run", "--dry-run", "--out", str(tmp_path)])
    assert isinstance(taken.exception, UserError)
    assert "exists already" in str(taken.exception)
    resumed = CliRunner().invoke(app, ["run", "--dry-run", "--resume", str(tmp_path)])
    assert isinstance(resumed.exception, UserError)
    assert "leave out --dry-run" in str(resumed.exception)


def test_fixed_pairs_take_neither_rollouts_nor_rewards(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    made = write_pairs(
        ToyPolicy(ToyPolicy.Settings()), MetricSuite(load_task(str(task))), ["train 0"], 4, 0, tmp_path / "pairs"
    )
    assert made == 1
    pairs = str(tmp_path / "pairs" / "pairs.jsonl")
    config = toy_config(task, objective={"name": "dpo", "draws": 4}, pairs=pairs, updates_per_rollout=2)
    spent = run(config, tmp_path / "run").budget
    told = forecast(config)
    assert (told.rollout_rows, told.images) == (0, 0)
    assert told.rows * 3 == spent.model_rows_rollout + spent.model_rows_train
    with pytest.raises(UserError, match="reward_calls never ends the run"):
        toy_config(task, objective="dpo", pairs=pairs, iterations=None, budget={"reward_calls": 100})
