"""The command line as a user meets it: in a process of its own where that matters, else in this one."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from tests.support.command_line import ROOT, alignbench, in_a_process, in_this_process
from tests.support.plugins import toy_config, write_task


def toy_file(folder: Path) -> Path:
    """A config file of a toy run."""
    import yaml

    file = folder / "toy-config.yaml"
    file.write_text(yaml.safe_dump(toy_config(write_task(folder)).resolved()))
    return file


def test_list_names_everything_without_importing_torch() -> None:
    code = "import sys; sys.argv = ['alignbench', 'list']; from alignbench.cli.app import app; app(standalone_mode=False)"
    done = in_a_process([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules, 'torch was imported'"], ROOT)
    assert done.returncode == 0, done.stderr
    for name in ("tmpo", "grpo", "dynamic_tree", "independent", "fixed_tree", "ocr", "diversity", "tiny"):
        assert f"  {name} " in done.stdout


def test_list_as_json_is_one_document() -> None:
    found = json.loads(in_this_process("list", "objectives", "--json").stdout)
    assert set(found) == {"objectives", "strengths"}
    assert found["strengths"]["grpo"] == {"setting": "kl_beta", "values": [0.1, 0.01, 0.0]}
    assert found["objectives"]["tmpo"].startswith("Softmax Trajectory Balance")


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["run"],
        ["compare"],
        ["tune"],
        ["list"],
        ["check"],
        ["diagnose"],
        ["new"],
        ["pairs"],
        ["plot"],
        ["runs"],
        ["report"],
        ["verify"],
        ["leaderboard"],
        ["eval"],
        ["export"],
        ["train-tiny"],
        ["train-pickscore"],
        ["serve-scorer"],
    ],
)
def test_every_command_has_a_help_text(command: list[str]) -> None:
    done = in_this_process(*command, "--help")
    assert done.returncode == 0
    assert "Usage:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--objective", "tmpoo"], "there is no objective 'tmpoo'; did you mean 'tmpo'"),
        (["run", "--sampler", "dynamictree"], "did you mean 'dynamic_tree'?"),
        (["run", "--backbone", "tyni"], "there is no backbone 'tyni'; did you mean 'tiny'?"),
        (["run", "--task", "ocrr"], "there is no task 'ocrr'; did you mean 'ocr'?"),
        (["run", "--preset", "quik"], "did you mean 'quick'?"),
        (["run", "--set", "objective.betta=3"], "objective tmpo: there is no key 'betta'; did you mean 'beta'"),
        (["run", "--set", "optimiser.lr=3"], "there is no key 'optimiser'; did you mean 'optimizer'?"),
        (["run", "--set", "optimizer.lr=-1"], "optimizer.lr: input should be greater than 0, got -1"),
        (["run", "--set", "iterations"], "--set takes dotted.key=value"),
        (["run", "--sampler", "independent", "--set", "sampler.group_size=1"], "group_size: input should be greater than"),
        (["run", "--set", "sampler.levels=9"], "do not fit into steps"),
        (["run", "--set", "sampler.children=10"], "leaves exceed max_leaves=81"),
        (["run", "--set", "evaluation.prompts=1000"], "evaluation prompts"),
        (["run", "--config", "nowhere.yaml"], "cannot read the config file nowhere.yaml"),
        (["run", "--resume", "nowhere"], "nowhere is not a run folder"),
        (["diagnose", "--sampler", "dynamictree"], "did you mean 'dynamic_tree'?"),
        (["diagnose", "--rules", "sde"], "--objective, --rules and --leaves belong to --gradients"),
        (["diagnose", "--gradients", "--leaves", "9,x"], "--leaves takes whole numbers above 0"),
        (["diagnose", "--checkpoint", "nowhere"], "nowhere is not a run folder (no config.yaml)"),
        (["diagnose", "--backbone", "gaussian_mixture", "--prompts", "5"], "--prompts 5 is too many: task 'equal_modes'"),
        (["list", "objektives"], "did you mean 'objectives'?"),
        (["run", "--resume", "x", "--set", "seed=3", "--set", "micro_batch=2"], "with its own settings; leave out --set seed"),
        (["export", "nowhere"], "nowhere is not a run folder"),
        (["plot", "nowhere"], "nowhere is not a run folder (no config.yaml)"),
        (["compare", "--config", "nowhere.yaml"], "cannot read the config file nowhere.yaml"),
        (["report", "nowhere"], "there is no folder nowhere"),
        (["train-tiny", "--out", "x", "--set", "batc=3"], "train-tiny: there is no key 'batc'; did you mean 'batch'"),
    ],
)  # fmt: skip
def test_wrong_input_gets_one_sentence_and_exit_code_2(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = in_this_process(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("alignbench: error: ")]
    assert len(message) == 1
    assert says in message[0]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_in_a_process_of_its_own_the_sentence_stands_alone(tmp_path: Path) -> None:
    done = in_a_process([sys.executable, "-m", "alignbench", "run", "--set", "sampler.levels=9"], tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("alignbench: error: ")
    assert done.stderr.count("\n") == 1


def test_unreadable_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1, 2")
    done = in_this_process("run", "--config", str(tmp_path / "bad.yaml"), cwd=tmp_path)
    assert done.returncode == 2
    assert "is not valid YAML" in done.stderr


def test_a_run_as_json_prints_one_document_and_nothing_else(tmp_path: Path) -> None:
    done = alignbench("run", "--config", str(toy_file(tmp_path)), "--out", str(tmp_path / "run"), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"schema_version", "run", "budget", "metrics", "alarms", "environment", "config"} <= set(record)
    typed = shlex.join(["run", "--config", str(toy_file(tmp_path)), "--out", str(tmp_path / "run"), "--json"])
    assert record["environment"]["command"] == f"alignbench {typed}"
    again = in_this_process("run", "--config", str(toy_file(tmp_path)), "--out", str(tmp_path / "run"), cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_a_run_tells_a_person_what_happened(tmp_path: Path) -> None:
    done = in_this_process("run", "--config", str(toy_file(tmp_path)), "--out", str(tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    for part in ("brightness (reward)", "difference (95 % interval)", "model evaluations", "peak memory", "written to"):
        assert part in done.stderr
    for folder in ("samples", "plots", "checkpoints"):  # those that were written are named, and no others
        assert (f"{folder}/" in done.stderr) == (tmp_path / "run" / folder).is_dir()


def test_ctrl_c_leaves_a_run_that_can_go_on(tmp_path: Path) -> None:
    import yaml

    file = toy_file(tmp_path)
    data = yaml.safe_load(file.read_text())
    write_task(tmp_path, "Interrupting")
    done = alignbench("run", "--config", str(file), "--out", str(tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 130
    assert "--resume" in done.stderr
    assert (tmp_path / "run" / "metrics.parquet").is_file()
    write_task(tmp_path)
    assert data["iterations"] == 3
    resumed = in_this_process("run", "--resume", str(tmp_path / "run"), cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "run" / "result.json").is_file()


def test_plots_are_drawn_again_from_the_record(tmp_path: Path) -> None:
    in_this_process("run", "--config", str(toy_file(tmp_path)), "--out", str(tmp_path / "run"), cwd=tmp_path)
    assert not (tmp_path / "run" / "plots").exists()
    done = in_this_process("plot", str(tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "plots" / "curves.png").is_file()


def test_a_diagnosis_shows_tables_or_one_json_document(tmp_path: Path) -> None:
    arguments = ["diagnose", "--sampler", "fixed_tree", "--backbone", "gaussian_mixture", "--groups", "8", "--prompts", "2"]
    done = in_this_process(*arguments, "--out", str(tmp_path / "one"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in (
        "split 2",
        "entropy of the mass over prefixes",
        "total variation",
        "log Z_hat",
        "deviation of independent is proportional to K^a",
        "model evaluations",
    ):
        assert part in done.stdout
    again = in_this_process(*arguments, "--out", str(tmp_path / "one"), cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    as_json = in_this_process(*arguments, "--out", str(tmp_path / "two"), "--json", cwd=tmp_path)
    assert json.loads(as_json.stdout) == json.loads((tmp_path / "two" / "diagnosis.json").read_text())
    assert (tmp_path / "two" / "diagnosis.png").stat().st_size > 10_000


def test_gradients_are_a_table_or_one_json_document(tmp_path: Path) -> None:
    chosen = ["--objective", "vargrad,grpo", "--sampler", "independent,fixed_tree", "--rules", "memoryless", "--leaves", "27"]
    toy = ["--backbone", "gaussian_mixture", "--task", "equal_modes", "--groups", "8", "--prompts", "1"]
    arguments = ["diagnose", "--gradients", *chosen, *toy, "--set", "sampler.steps=5", "--set", "threads=1"]
    done = in_this_process(*arguments, "--out", str(tmp_path / "one"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("8 estimates of each", "reverse KL", "expected reward", "fixed_tree", "memoryless", "gradients"):
        assert part in done.stdout
    as_json = in_this_process(*arguments, "--out", str(tmp_path / "two"), "--json", cwd=tmp_path)
    found = json.loads(as_json.stdout)
    assert found == json.loads((tmp_path / "two" / "gradients.json").read_text())
    pairs = [(t["objective"], t["sampler"]) for t in found["trials"]]
    assert pairs == [(o, s) for o in ("vargrad", "grpo") for s in ("independent", "fixed_tree")]
    assert (tmp_path / "two" / "gradients.png").stat().st_size > 10_000


def test_the_installed_command_finds_plug_ins_in_the_current_folder_too(tmp_path: Path) -> None:
    (tmp_path / "deaf.py").write_text("from tests.alignbench.authoring.test_checking import Deaf\n")
    # -P keeps the current folder out of the path, as it is for a script in a bin folder.
    entry = [sys.executable, "-P", "-c", "from alignbench.__main__ import main; main()"]
    options = ["check", "--objective", "deaf:Deaf", "--backbone", "tests.support.plugins:ToyPolicy", "--iterations", "0"]
    done = in_a_process([*entry, *options], tmp_path)
    assert done.returncode == 1, done.stderr
    assert "the gradient is zero" in done.stdout
