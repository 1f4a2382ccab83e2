import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignbench.files.digests import SUMS
from alignbench.verification.run_checks import check_run
from tests.support.tampering import GRPO, TMPO, edit_json, edit_table, edit_yaml


@pytest.fixture
def run(comparison: Path) -> Path:
    return comparison / "runs" / f"{TMPO}-s0"


def test_the_files_of_a_run_agree(run: Path) -> None:
    checked = check_run(run)
    assert (checked.problem, checked.notes) == (None, [])
    assert checked.result is not None
    assert checked.result.run.iterations == 3


def test_a_record_without_digests_is_told_and_not_refused(run: Path) -> None:
    (run / SUMS).unlink()
    checked = check_run(run)
    assert checked.problem is None
    assert checked.notes == [f"{run} has no SHA256SUMS: its run ended before runs left the digests of their files"]


def test_the_numbers_of_a_sentence_are_those_of_the_files(run: Path) -> None:
    edit_json(run / "result.json", lambda data: data["metrics"]["scenario_reward"]["final"].update(value=0.875))
    said = check_run(run).problem
    assert said is not None
    assert said.startswith(f"{run}/result.json says scenario_reward final value 0.875, but the scores in evals.parquet give 0.")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "interval": (
        lambda run: edit_json(run / "result.json", lambda d: d["metrics"]["lgmd"]["difference"].update(lower=0.0)),
        "says lgmd difference lower 0, but the scores in evals.parquet give",
    ),
    "p": (
        lambda run: edit_json(run / "result.json", lambda d: d["metrics"]["lgmd"].update(p_rise=1e-9)),
        "says lgmd p_rise 1e-09, but the scores in evals.parquet give",
    ),
    "metric": (
        lambda run: edit_json(run / "result.json", lambda d: d["metrics"].update(best=d["metrics"]["lgmd"])),
        "has no row of best, which is in result.json",
    ),
    "image": (
        lambda run: edit_table(run / "evals.parquet", lambda t: t.drop(t.index[t["metric"] == "scenario_reward"][-1])),
        "has 7 of the 8 rows of scenario_reward (final) that 4 prompts with 2 images give",
    ),
    "prompt": (
        lambda run: edit_table(run / "evals.parquet", lambda t: t[(t["metric"] != "lgmd") | (t["prompt_index"] < 3)]),
        "has 3 of the 4 rows of lgmd (base) that 4 prompts give",
    ),
    "score": (
        lambda run: edit_table(run / "evals.parquet", lambda t: t.assign(value=t["value"] + 1e-6)),
        "says scenario_reward base value",
    ),
    "config": (
        lambda run: edit_yaml(run / "config.yaml", lambda d: d["optimizer"].update(lr=0.01)),
        "has optimizer.lr 0.01 where",
    ),
    "no config": (lambda run: (run / "config.yaml").unlink(), "config.yaml is missing"),
    "seed": (
        lambda run: edit_json(run / "result.json", lambda d: d["run"].update(seed=7)),
        "says that seed was 7, and its configuration says 0",
    ),
    "iterations": (
        lambda run: edit_json(run / "result.json", lambda d: d["run"].update(iterations=2)),
        "does not have the 2 iterations of result.json",
    ),
    "rows": (
        lambda run: edit_json(run / "result.json", lambda d: d["budget"].update(model_rows_train=9)),
        "metrics.parquet ends with model_rows 66 where result.json has 57",
    ),
    "no evals": (lambda run: (run / "evals.parquet").unlink(), "evals.parquet is missing"),
    "no metrics": (lambda run: (run / "metrics.parquet").unlink(), "metrics.parquet is missing"),
    "no curve": (lambda run: (run / "curve.parquet").unlink(), "curve.parquet is missing, and evaluation.every is 1"),
    "curve": (lambda run: edit_table(run / "curve.parquet", lambda t: t[t["iteration"] < 3]), "curve.parquet lacks rows"),
    "curve's rows": (
        lambda run: edit_table(run / "curve.parquet", lambda t: t.assign(model_rows=t["model_rows"] // 2)),
        "has 11 model rows at iteration 1 where metrics.parquet has 22",
    ),
    "distribution": (
        lambda run: edit_table(run / "distributions.parquet", lambda t: t.assign(x=t["x"] + 1)),
        "distributions.parquet was changed after the run had ended",
    ),
    "truncated table": (
        lambda run: (run / "evals.parquet").write_bytes((run / "evals.parquet").read_bytes()[:-100]),
        "cannot read",
    ),
    "truncated record": (
        lambda run: (run / "result.json").write_text((run / "result.json").read_text()[:-100]),
        "it is not valid JSON",
    ),
    "weights": (
        lambda run: (run / "checkpoints" / "iteration-3" / "weights.safetensors").write_bytes(b"0"),
        "iteration-3 is damaged: weights.safetensors is not what was written",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_altered_file_is_told_with_its_own_reason(run: Path, change: str) -> None:
    alter, says = CHANGES[change]
    alter(run)
    assert says in (check_run(run).problem or "nothing is wrong")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (f"{TMPO}-s1", "iteration-3 is a checkpoint of another run: its seed is 1, and that of result.json is 0"),
        (
            f"{GRPO}-s0",
            "iteration-3 is a checkpoint of another run: its objective.name is grpo, and that of result.json is tmpo",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_told(run: Path, other: str, says: str) -> None:
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(run.with_name(other) / "checkpoints", run / "checkpoints")
    assert says in (check_run(run).problem or "nothing is wrong")


def test_checkpoints_may_be_left_out(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    assert check_run(run).problem is None
