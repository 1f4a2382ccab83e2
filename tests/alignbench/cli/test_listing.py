"""The list of runs, and what a finished run says when it is asked to go on."""

import json
from pathlib import Path

import pytest

from alignbench.config.run_config import load_config
from alignbench.figures import plots
from alignbench.figures.plots import plot_run
from alignbench.files.writing import exclusive, is_in_use
from alignbench.files.yaml_files import to_yaml
from alignbench.records.tables import read_metrics
from alignbench.records.unfinished import unfinished_record
from tests.alignbench.record_folders import write_run
from tests.support.command_line import in_this_process


def unfinished(folder: Path) -> Path:
    """A run that has two iterations of its 60 and no record."""
    write_run(folder)
    (folder / "result.json").unlink()
    config = load_config(preset="smoke", options={"objective": "grpo", "sampler": "independent", "iterations": 60})
    (folder / "config.yaml").write_text(to_yaml(config.resolved()))
    return folder


def test_runs_are_listed_with_state_pair_reward_and_time(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "done", reward=(0.5, 0.7), lgmd=(0.1, 0.3))
    unfinished(tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "result.json").write_text("{}")
    rows = {row["run"]: row for row in json.loads(in_this_process("runs", str(tmp_path), "--json").stdout)["runs"]}
    done, going, broken = rows["a/done"], rows["b"], rows["c"]
    assert (done["state"], done["objective"], done["iterations"], done["seconds"]) == ("complete", "tmpo", 2, 2.5)
    assert done["reward"] == {"metric": "ocr", "base": pytest.approx(0.45), "trained": pytest.approx(0.6)}
    assert done["diversity"] == {"metric": "lgmd", "base": pytest.approx(0.45), "trained": pytest.approx(0.2)}
    assert (going["state"], going["iterations"], going["planned"], going["training_reward"]) == ("interrupted", 2, 60, 0.2)
    assert broken["state"] == "unreadable"
    shown = in_this_process("runs", str(tmp_path)).stdout
    assert "2 of 60" in shown
    assert "3 runs, 1 unfinished" in shown


def test_a_run_that_another_process_works_on_is_running(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "r")
    assert not is_in_use(run)
    with exclusive(run):
        assert is_in_use(run)
        (row,) = json.loads(in_this_process("runs", str(tmp_path), "--json").stdout)["runs"]
        assert row["state"] == "running"
    assert not is_in_use(run)


def test_an_unfinished_run_is_plotted_and_marked(tmp_path: Path) -> None:
    written = {file.name for file in plot_run(unfinished(tmp_path / "r"))}
    assert written == {"curves.png", "diagnostics.png"}  # nothing was evaluated
    frame = read_metrics(tmp_path / "r")
    assert frame is not None
    title = plots.curves(frame, unfinished_record(tmp_path / "r")).get_suptitle()
    assert title == "grpo x independent, ocr, seed 0, unfinished: 2 iterations"
    done = in_this_process("plot", str(tmp_path / "r"))
    assert done.stdout.splitlines() == [str(tmp_path / "r" / "plots" / f"{name}.png") for name in ("curves", "diagnostics")]


def test_a_finished_run_says_so_and_is_not_evaluated_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    config = load_config(preset="smoke", options={"objective": "tmpo", "iterations": 2})
    (run / "config.yaml").write_text(to_yaml(config.resolved()))
    before = (run / "result.json").read_bytes()
    done = in_this_process("run", "--resume", str(run))
    assert done.returncode == 0
    assert done.stderr == f"the run in {run} is finished (2 iterations, complete); --iterations N extends it\n"
    assert json.loads(in_this_process("run", "--resume", str(run), "--json").stdout)["run"]["iterations"] == 2
    assert (run / "result.json").read_bytes() == before
