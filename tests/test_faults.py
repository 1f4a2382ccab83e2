"""What a run does when the world fails: it goes on to the same numbers, or ends with one clear sentence.

Each test states what it proves. Ways to fail are in `tests.support.faults`, plug-ins that fail in `tests.support.plugins`.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from alignbench import RunError, UserError, run
from alignbench.config.run_config import RunConfig, load_config
from alignbench.errors import DiskError, NonFiniteError, ScorerError
from alignbench.files import writing as files
from alignbench.files.digests import SUMS
from alignbench.load import load_configured_backbone
from alignbench.records import record
from alignbench.training import checkpoint
from alignbench.training import run as training
from alignbench.training.checkpoint import STATE, VERSION, policy_weights
from alignbench.training.progress import Silent
from alignbench.training.run_evaluation import RunEvaluator
from tests.support.command_line import in_this_process
from tests.support.faults import calls_of, command, full_disk, killed_at, killed_while_writing, read_only, small_files
from tests.support.plugins import Cramped, toy_config, write_task

KILLS = int(os.environ.get("TEST_KILLS", "10"))
"""Processes that are killed; TEST_KILLS=50 for a thorough test."""


def points(**changes: Any) -> RunConfig:
    """Five iterations on gaussian_mixture with a checkpoint after each, in a quarter of a second."""
    options: dict[str, Any] = {
        "backbone": {"name": "gaussian_mixture", "hidden": 8, "layers": 1, "quadrature": 12},
        "task": "equal_modes",
        "sampler": "fixed_tree",
        "iterations": 5,
        "checkpoint_every": 1,
        "ema": {"decay": 0.9, "every": 1},
        "evaluation": {"prompts": 1, "images_per_prompt": 2, "steps": 2},
        "threads": 1,
    }
    return load_config(preset="smoke", options={**options, **changes})


def measured(out: Path) -> dict[str, Any]:
    """All that a run found, but for how long it took."""
    tables = {name: pd.read_parquet(out / f"{name}.parquet") for name in ("metrics", "evals")}
    newest = max((out / "checkpoints").iterdir(), key=lambda p: int(p.name.rpartition("-")[2]))
    result = json.loads((out / "result.json").read_text())
    return {
        "tables": {name: t[[c for c in t.columns if not c.startswith("seconds")]].to_csv() for name, t in tables.items()},
        "weights": {file.name: file.read_bytes() for file in newest.glob("*.safetensors")},
        "iteration": newest.name,
        "metrics": result["metrics"],
        "budget": {k: v for k, v in result["budget"].items() if "seconds" not in k and k != "peak_memory_bytes"},
    }


def leftovers(out: Path) -> list[str]:
    return [f.name for f in out.rglob(".*") if f.name != ".lock"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `points()`, undisturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(points(), out)
    return out


@pytest.fixture(scope="module")
def whole(finished: Path) -> dict[str, Any]:
    return measured(finished)


@pytest.fixture(scope="module")
def whole_toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a toy run finds undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run(toy_config(write_task(folder)), folder / "run")
    return measured(folder / "run")


class Listening(Silent):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, text: str) -> None:
        self.warned.append(text)


# ---------------------------------------------------------------------------------------------------- kills


def test_killed_at_random_moments_and_resumed_it_finds_the_same(tmp_path: Path, whole: dict[str, Any]) -> None:
    """A SIGKILL between any two calls of functions, in loading, judging, training, saving or writing the record, loses nothing.

    A run is killed and resumed until it is done, and then the next one.
    """
    rng = np.random.default_rng(0)
    moments = calls_of(points(), tmp_path / "counted")
    assert measured(tmp_path / "counted") == whole
    kills = runs = 0
    while kills < KILLS:
        runs += 1
        out = tmp_path / f"run-{runs}"
        while not (out / "result.json").is_file():
            code = killed_at(int(rng.integers(moments)) if kills < KILLS else None, points(), out)
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
        assert measured(out) == whole
        run(points(), out, resume=True)
        assert leftovers(out) == []
    assert kills == KILLS


@pytest.mark.parametrize("file", ["optimizer.safetensors", "state.json", "SHA256SUMS", "metrics.parquet", "result.json"])
def test_killed_while_a_file_is_half_written_it_never_takes_the_half_for_a_whole(
    tmp_path: Path, whole: dict[str, Any], file: str
) -> None:
    """What is cut short on the disk by a kill is a hidden folder or file, which the resumed run writes anew."""
    killed_while_writing(file, points(), tmp_path / "run")
    assert leftovers(tmp_path / "run")
    run(points(), tmp_path / "run", resume=True)
    assert measured(tmp_path / "run") == whole
    assert leftovers(tmp_path / "run") == []


def test_killed_before_its_config_is_there_it_can_be_begun_again(tmp_path: Path, whole: dict[str, Any]) -> None:
    """Nothing has been lost, so the same folder is still free; there is nothing to resume, which is said."""
    out = tmp_path / "run"
    killed_while_writing("config.yaml", points(), out)
    assert not (out / "config.yaml").exists()
    again = in_this_process("run", "--resume", str(out))
    assert again.returncode == 2
    assert f"ended before it wrote anything; start it again with --out {out}" in again.stderr
    run(points(), out)
    assert measured(out) == whole
    assert leftovers(out) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_with_a_checkpoint_one_sentence_and_130(
    tmp_path: Path, whole_toy: dict[str, Any], number: signal.Signals
) -> None:
    """Ctrl-C, a scheduler's request and a closed terminal all leave every finished iteration."""
    file = tmp_path / "toy-config.yaml"
    file.write_text(yaml.safe_dump(toy_config(write_task(tmp_path, "Hanging")).resolved()))
    out = tmp_path / "run"
    with command(["run", "--config", str(file), "--out", str(out), "--json"], tmp_path / "said") as process:
        wait_until(lambda: (out / "evals.parquet").is_file() and process.is_alive())
        time.sleep(0.3)  # two iterations take hundredths of a second; the third hangs in its scorer
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == 130
    assert (tmp_path / "said").read_text() == f"alignbench: interrupted; resume with: alignbench run --resume {out}\n"
    run(toy_config(write_task(tmp_path)), out, resume=True)
    assert measured(out) == whole_toy


def test_a_request_to_end_waits_for_the_checkpoint_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_toy: dict[str, Any]
) -> None:
    """An impatient second Ctrl-C does not cost the checkpoint that the first one asked for."""
    out, write = tmp_path / "run", files.write_folder

    def pressed_again(path: Path, content: Callable[[Path], Any]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        write(path, content)

    monkeypatch.setattr(checkpoint, "write_folder", pressed_again)
    with pytest.raises(KeyboardInterrupt):
        run(toy_config(write_task(tmp_path, "Interrupting")), out)
    monkeypatch.undo()
    assert [f.name for f in (out / "checkpoints").iterdir()] == ["iteration-2"]
    run(toy_config(write_task(tmp_path)), out, resume=True)
    assert measured(out) == whole_toy


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------- disks


def test_on_a_disk_that_takes_no_checkpoint_the_run_ends_and_goes_on_later(tmp_path: Path) -> None:
    """What the system answers to safetensors, which raises no OSError, is one sentence, and nothing half-written stays."""
    config = points(backbone={"name": "gaussian_mixture", "hidden": 256, "layers": 1, "quadrature": 12})
    run(config, tmp_path / "whole")
    out = tmp_path / "run"
    with small_files(150_000), pytest.raises(DiskError, match=r"cannot write .*iteration-1: .*; once it works, go on with"):
        run(config, out)
    assert not [*(out / "checkpoints").iterdir(), *leftovers(out)]
    run(config, out, resume=True)
    assert measured(out) == measured(tmp_path / "whole")


@pytest.mark.parametrize(
    ("file", "after"),
    [("config.yaml", 0), ("evals", 0), ("weights", 2), ("state.json", 3), ("metrics", 2), ("evals", 1), ("result.json", 0)],
)
def test_on_a_full_disk_the_run_ends_with_one_sentence_and_goes_on_later(
    tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, file: str, after: int
) -> None:
    """Whichever file is the first that does not fit, no checkpoint is lost and no record is wrong."""
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(files, "_flush", full_disk(file, after))
        with pytest.raises(DiskError, match="No space left on device"):
            run(points(), out)
    assert not (out / "result.json").exists()
    assert leftovers(out) == []
    run(points(), out, resume=(out / "config.yaml").is_file())
    assert measured(out) == whole


def test_a_read_only_folder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """Nothing is trained for a folder that cannot be written."""
    (tmp_path / "results").mkdir()
    with read_only(tmp_path / "results"), pytest.raises(DiskError, match=r"cannot write .*results/run: Permission denied$"):
        run(points(), tmp_path / "results" / "run")
    assert list((tmp_path / "results").iterdir()) == []


def test_a_folder_that_becomes_read_only_keeps_what_it_has(
    tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trained weights are safe before the record is written, and a resume writes the same record."""
    out = tmp_path / "run"
    evaluate_final = RunEvaluator.final

    def withdrawn(self: RunEvaluator, budget: record.Budget) -> Any:
        evaluation = evaluate_final(self, budget)
        out.chmod(0o555)
        return evaluation

    monkeypatch.setattr(RunEvaluator, "final", withdrawn)
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints").rmdir()
    with read_only(tmp_path), pytest.raises(DiskError, match="Permission denied; once it works, go on with"):
        run(points(), out)
    out.chmod(0o755)
    monkeypatch.undo()
    assert not (out / "result.json").exists()
    run(points(), out, resume=True)
    assert measured(out) == whole


def test_results_that_cannot_be_written_do_not_cost_the_training(tmp_path: Path, whole: dict[str, Any]) -> None:
    """Something in the record's place ends the run with a sentence; once it is away, the record comes without training."""
    out = tmp_path / "run"
    (out / "result.json").mkdir(parents=True)
    with pytest.raises(UserError, match="exists already"):
        run(points(), out)
    (out / "config.yaml").write_text("")
    with pytest.raises(DiskError, match=r"cannot write .*result\.json: Is a directory"):
        run(points(), out, resume=True)
    (out / "result.json").rmdir()
    began = time.perf_counter()
    result = run(points(), out, resume=True)
    assert result.budget.seconds < time.perf_counter() - began + 60  # that of the first time, not twice
    assert measured(out) == whole


# ---------------------------------------------------------------------------------------------------- checkpoints


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def alter(file: Path) -> None:
    """Flips the lowest bit in the middle of it."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, alter, Path.unlink])
@pytest.mark.parametrize("file", ["weights.safetensors", "ema.safetensors", "optimizer.safetensors", STATE, "SHA256SUMS"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, finished: Path, whole: dict[str, Any], file: str, damage: Callable[[Path], None]
) -> None:
    """One wrong bit in any file of the newest is found; from the one before, the run comes to the same numbers."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    damage(out / "checkpoints" / "iteration-5" / file)
    console = Listening()
    run(points(), out, resume=True, console=console)
    (warning,) = (text for text in console.warned if "iteration-5 is damaged" in text)
    assert warning.endswith("going on from iteration 4")
    assert measured(out) == whole


def test_where_all_checkpoints_are_damaged_the_run_says_so(tmp_path: Path) -> None:
    """It neither starts from the beginning unasked nor goes on from what it cannot trust; judging refuses likewise."""
    from alignbench.scoring.score import score_model

    config = toy_config(write_task(tmp_path), checkpoint_every=1, checkpoints_kept=2)
    run(config, tmp_path / "run")
    for saved in (tmp_path / "run" / "checkpoints").iterdir():
        alter(saved / "weights.safetensors")
    with pytest.raises(UserError, match=r"iteration-3 is damaged: weights.safetensors is not.*; .*iteration-2 is damaged"):
        run(config, tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="iteration-3 is damaged"):
        score_model(config, None, run=tmp_path / "run")


def test_a_checkpoint_of_another_version_is_refused_as_such(tmp_path: Path) -> None:
    """It is not taken for a damaged one, which would be passed over; a file that was altered so far is."""
    config = toy_config(write_task(tmp_path), checkpoint_every=1)
    run(config, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "iteration-3" / STATE
    written = sha256(file.read_bytes()).hexdigest()
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 2}))
    with pytest.raises(UserError, match=r"iteration-3 is damaged: state.json is not what was written"):
        policy_weights(file.parents[1])
    sums = file.with_name(SUMS)
    sums.write_text(sums.read_text().replace(written, sha256(file.read_bytes()).hexdigest()))
    with pytest.raises(UserError, match=f"iteration-3 has checkpoint version 2; this alignbench reads {VERSION}"):
        run(config, tmp_path / "run", resume=True)


def test_a_checkpoint_of_other_settings_is_refused_and_untouched(tmp_path: Path) -> None:
    """A mixture of two runs is never made."""
    task = write_task(tmp_path)
    run(toy_config(task), tmp_path / "run")
    before = {f: f.read_bytes() for f in (tmp_path / "run" / "checkpoints").rglob("*") if f.is_file()}
    with pytest.raises(UserError, match=r"other settings \(objective, seed\); resume with the same ones"):
        run(toy_config(task, seed=1, objective="grpo"), tmp_path / "run", resume=True)
    assert {f: f.read_bytes() for f in (tmp_path / "run" / "checkpoints").rglob("*") if f.is_file()} == before


def test_of_two_runs_into_one_folder_the_later_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the other one came and went between the first look at the folder and the first file."""
    config, out = points(), tmp_path / "run"
    load = load_configured_backbone

    def while_another_runs(config: RunConfig) -> Any:
        monkeypatch.undo()
        run(config, out)
        return load(config)

    monkeypatch.setattr(training, "load_configured_backbone", while_another_runs)
    with pytest.raises(UserError, match="exists already"):
        run(points(seed=1), out)
    assert json.loads((out / "result.json").read_text())["run"]["seed"] == 1  # of the inner one, which was given it
    assert record.read_result(out).run.iterations == config.iterations


# ---------------------------------------------------------------------------------------------------- scorers


@pytest.mark.parametrize(
    ("scorer", "says"),
    [
        ("Dying", "scorer 'brightness' failed in iteration 2: ConnectionError: the server is gone"),
        (
            "Hanging",
            "scorer 'brightness' did not answer within 1 s in iteration 2; if it only needs longer, raise scorer_timeout",
        ),
        ("Knowing", "no image of iteration 2 could be scored"),
        ("Boundless", "scorer 'brightness' returned an infinite score for image 0"),
        ("Shortened", r"scorer 'brightness' returned scores of shape \[7\] for 8 images"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_scorer_that_fails_stops_the_run_which_goes_on_once_it_works(
    tmp_path: Path, whole_toy: dict[str, Any], scorer: str, says: str
) -> None:
    """Its failure becomes no score and touches no weight: the run goes on as if it had not been."""
    out = tmp_path / "run"
    with pytest.raises(ScorerError, match=f"{says}; once it works, go on with: alignbench run --resume {out}$"):
        run(toy_config(write_task(tmp_path, scorer), scorer_timeout=1.0), out)
    assert [f.name for f in (out / "checkpoints").iterdir()] == ["iteration-2"]
    run(toy_config(write_task(tmp_path)), out, resume=True)
    assert measured(out) == whole_toy


@pytest.mark.parametrize(("objective", "error", "done"), [("Bursting", NonFiniteError, 2), ("Failing", ZeroDivisionError, 0)])
def test_a_fault_of_a_plugin_costs_no_finished_iteration(
    tmp_path: Path, objective: str, error: type[Exception], done: int
) -> None:
    """A loss that is not finite, or fails, does so before any weight has changed, and what was done until then is saved."""
    config = toy_config(write_task(tmp_path), objective=f"tests.support.plugins:{objective}", iterations=5)
    with pytest.raises(error):
        run(config, tmp_path / "run")
    assert [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()] == [f"iteration-{done}"]


# ---------------------------------------------------------------------------------------------------- numbers


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_toy: dict[str, Any]
) -> None:
    """One NaN in them ends the run with the reason, and the newest checkpoint is from before it."""
    config, out, step = toy_config(write_task(tmp_path), checkpoint_every=1), tmp_path / "run", torch.optim.AdamW.step
    updates = 0

    def spoiling(self: torch.optim.AdamW, closure: None = None) -> None:
        nonlocal updates
        updates += 1
        step(self)
        if updates == 3:
            self.param_groups[0]["params"][1].data[0] = torch.nan

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", spoiling)
        with pytest.raises(NonFiniteError, match=r"weights are not finite after the update of iteration 2; lower optimizer.lr"):
            run(config, out)
    assert sorted(f.name for f in (out / "checkpoints").iterdir()) == ["iteration-1", "iteration-2"]
    run(config, out, resume=True)
    assert measured(out) == whole_toy


@pytest.mark.parametrize("objective", ["tmpo", "dpo"])
def test_where_memory_runs_out_the_micro_batch_halves_and_the_result_is_the_same(tmp_path: Path, objective: str) -> None:
    """In rollout, training and judging alike, and the record says so."""
    changes: Any = {"objective": objective, "ema": {"decay": 0.9, "every": 1}}
    roomy = run(toy_config(write_task(tmp_path), **changes), tmp_path / "roomy")
    cramped = run(toy_config(write_task(tmp_path), backbone="tests.support.plugins:Cramped", **changes), tmp_path / "cramped")
    assert (cramped.budget.micro_batch, roomy.budget.micro_batch, roomy.budget.micro_batch_halvings) == (4, None, 0)
    assert cramped.budget.micro_batch_halvings > 0
    assert cramped.budget.reward_calls == roomy.budget.reward_calls
    frames = [pd.read_parquet(tmp_path / name / "metrics.parquet") for name in ("roomy", "cramped")]
    numbers = [f[[c for c in f.columns if not c.startswith(("seconds", "model_rows"))]] for f in frames]
    # AdamW divides by the root of the gradient's square: it magnifies the rounding of small gradients.
    pd.testing.assert_frame_equal(numbers[0], numbers[1], rtol=1e-3, atol=1e-5)
    assert cramped.metrics["brightness"].final.value == pytest.approx(roomy.metrics["brightness"].final.value, abs=1e-4)


def test_a_run_that_ran_out_of_memory_resumes_with_what_fitted(tmp_path: Path) -> None:
    """Bit for bit, since it does not try again what had failed; other microbatches round in another way."""
    changes: Any = {"backbone": "tests.support.plugins:Cramped"}
    whole = run(toy_config(write_task(tmp_path), **changes), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(toy_config(write_task(tmp_path, "Interrupting"), **changes), tmp_path / "broken")
    resumed = run(toy_config(write_task(tmp_path), **changes), tmp_path / "broken", resume=True)
    assert resumed.budget.micro_batch_halvings == whole.budget.micro_batch_halvings
    assert measured(tmp_path / "broken") == measured(tmp_path / "whole")


def test_where_not_one_row_fits_the_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, and not by halving for ever."""
    monkeypatch.setattr(Cramped, "room", 0)
    with pytest.raises(RunError, match=r"^out of memory with one row in a model call: CUDA out of memory\. Tried .* GiB\.$"):
        run(toy_config(write_task(tmp_path), backbone="tests.support.plugins:Cramped", micro_batch=2), tmp_path / "run")


def test_a_clock_that_jumps_changes_no_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]) -> None:
    """Seconds are those of a monotonic clock: the wall clock may go back a year or forward with each look at it."""
    now, jumps = time.time(), 0

    def jumping() -> float:
        nonlocal jumps
        jumps += 1
        return now + (-1) ** jumps * jumps * 3e7

    monkeypatch.setattr(time, "time", jumping)
    result = run(points(budget={"seconds": 3600.0}), tmp_path / "run")
    assert result.run.status == "complete"
    assert 0 < result.budget.seconds < 3600
    assert all(seconds >= 0 for seconds in result.budget.seconds_by_phase.values())
    assert measured(tmp_path / "run")["weights"] == whole["weights"]
