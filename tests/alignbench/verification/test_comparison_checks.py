import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignbench import UserError
from alignbench.files.digests import SUMS
from alignbench.records.digests import write_digests
from alignbench.verification.comparison_checks import check_folder
from tests.support.tampering import GRPO, TMPO, edit_json, edit_result, edit_table, edit_yaml

ALL = [f"{method}-s{seed}" for seed in (0, 1) for method in (TMPO, GRPO)]


def problems(folder: Path, **options: Any) -> list[str]:
    return check_folder(folder, **options).problems


def test_a_true_comparison_has_no_problem_and_nothing_to_note(original: Path) -> None:
    checked = check_folder(original)
    assert (checked.problems, checked.notes, list(checked.runs)) == ([], [], ALL)


def test_a_single_run_is_checked_alone(original: Path) -> None:
    checked = check_folder(original / "runs" / ALL[0])
    assert (checked.problems, list(checked.runs), checked.comparison) == ([], [ALL[0]], None)


def test_a_folder_without_records_is_refused(tmp_path: Path, original: Path) -> None:
    with pytest.raises(UserError, match="is neither the folder of a comparison"):
        check_folder(tmp_path)
    shutil.copy(original / "runs" / ALL[0] / "config.yaml", tmp_path)
    with pytest.raises(UserError, match="has not ended, so there is nothing to verify"):
        check_folder(tmp_path)


def test_every_altered_run_is_told(comparison: Path) -> None:
    for name in ALL[:2]:
        edit_json(comparison / "runs" / name / "result.json", lambda d: d["metrics"]["lgmd"]["final"].update(value=9.0))
    assert [ALL.index(said.split("/runs/")[1].split("/")[0]) for said in problems(comparison)] == [0, 1]


def test_unfinished_cells_are_noted(comparison: Path) -> None:
    shutil.rmtree(comparison / "runs" / ALL[3])
    edit_json(comparison / "comparison.json", lambda d: d["cells"][3].update(status="failed", error="the disk was full"))
    checked = check_folder(comparison)
    assert checked.problems == []
    assert checked.notes == [f"1 of 4 cells are not finished, such as {ALL[3]}: the disk was full"]


def test_a_complete_cell_without_its_record_is_told(comparison: Path) -> None:
    shutil.rmtree(comparison / "runs" / ALL[3])
    assert [f"{ALL[3]}/result.json: No such file" in said for said in problems(comparison)] == [True]


def test_a_run_that_is_no_cell_is_told(comparison: Path) -> None:
    shutil.copytree(comparison / "runs" / ALL[0], comparison / "runs" / "better")
    assert problems(comparison) == [
        f"{comparison}/runs/better holds a run that is not a cell of the comparison in {comparison}"
    ]


def test_the_name_of_a_cell_never_leads_out_of_the_folder(comparison: Path) -> None:
    edit_json(comparison / "comparison.json", lambda d: d["cells"][0].update(id="../../other"))
    assert problems(comparison) == [f"{comparison}/comparison.json has a cell '../../other', which is not the name of a folder"]


def test_a_folder_copied_as_another_seed_is_told(comparison: Path) -> None:
    shutil.rmtree(comparison / "runs" / f"{TMPO}-s1")
    shutil.copytree(comparison / "runs" / f"{TMPO}-s0", comparison / "runs" / f"{TMPO}-s1")
    file = comparison / "runs" / f"{TMPO}-s1" / "result.json"
    assert problems(comparison) == [f"{file} is the record of {TMPO}-s0: the folder was copied or renamed"]


def test_a_copied_seed_is_told_by_its_numbers_where_all_names_were_changed(comparison: Path) -> None:
    copy = comparison / "runs" / f"{TMPO}-s1"
    shutil.rmtree(copy)
    shutil.copytree(comparison / "runs" / f"{TMPO}-s0", copy)
    shutil.rmtree(copy / "checkpoints")
    edit_yaml(copy / "config.yaml", lambda d: d.update(seed=1))
    edit_result(copy, lambda d: (d["run"].update(id=copy.name, seed=1), d["config"].update(seed=1)))
    says = f"{TMPO}-s0 and {TMPO}-s1 have the same training rewards and the same scores of every image"
    assert problems(comparison) == [f"{says}: one is a copy of the other"]


def _in_config(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a run's configuration wherever it is written."""
    shutil.rmtree(run / "checkpoints")
    edit_yaml(run / "config.yaml", change)
    edit_result(run, lambda d: change(d["config"]))


MIXED: dict[str, tuple[Callable[[Path], object], str]] = {
    "budget": (
        lambda run: _in_config(run, lambda c: c["budget"].update(model_rows=660)),
        "has budget {'model_rows': 660}, and the comparison has {'model_rows': 66} for this cell",
    ),
    "settings": (
        lambda run: _in_config(run, lambda c: c["optimizer"].update(lr=0.01)),
        "are seeds of one method with different settings: optimizer.lr is 0.005 and 0.01",
    ),
    "noise": (
        lambda run: edit_result(run, lambda d: d["protocol"].update(noise_seed=1)),
        "were evaluated differently: noise_seed is 12345 and 1",
    ),
    "evals": (
        lambda run: edit_result(run, lambda d: d["protocol"]["evals"]["diversity"]["settings"].update(batch=1)),
        "were evaluated differently: evals.diversity.settings.batch is 64 and 1",
    ),
    "prompts": (
        lambda run: edit_result(run, lambda d: d["task"].update({"evaluation prompts": "0"})),
        "have different contents of their task: evaluation prompts is",
    ),
    "pairs": (
        lambda run: edit_result(run, lambda d: d["task"].update(pairs="0")),
        "trained on different images: pairs is None and 0",
    ),
    "version": (
        lambda run: edit_result(run, lambda d: d["environment"].update(torch="1.0")),
        "were run by different versions: torch is",
    ),
    "revision": (
        lambda run: edit_result(run, lambda d: d["environment"].update(git_revision="0123456789abcdef")),
        "at 0123456789ab: the code of a comparison must be one; --allow-revisions",
    ),
}


@pytest.mark.parametrize("change", MIXED)
def test_cells_of_several_protocols_are_told(comparison: Path, change: str) -> None:
    alter, says = MIXED[change]
    alter(comparison / "runs" / f"{TMPO}-s1")
    assert [says in said for said in problems(comparison)] == [True]


def test_several_revisions_can_be_allowed(comparison: Path) -> None:
    MIXED["revision"][0](comparison / "runs" / ALL[3])
    checked = check_folder(comparison, allow_revisions=True)
    assert (checked.problems, checked.revisions["0123456789abcdef"]) == ([], [ALL[3]])
    assert "a replay of a cell of each shows whether both compute the same" in checked.notes[0]


def test_a_comparison_file_of_another_comparison_is_told(comparison: Path) -> None:
    edit_yaml(comparison / "comparison.yaml", lambda d: d.update(seeds=[0, 1, 2]))
    assert problems(comparison) == [f"{comparison}/comparison.yaml and comparison.json describe different comparisons"]


def test_a_setting_that_an_older_run_did_not_record_has_its_default(comparison: Path) -> None:
    run = comparison / "runs" / f"{GRPO}-s1"
    _in_config(run, lambda c: c["objective"].pop("kl_beta"))
    assert problems(comparison) == []


def test_runs_that_did_not_train_may_have_equal_scores(comparison: Path) -> None:
    for seed in (0, 1):
        run = comparison / "runs" / f"{TMPO}-s{seed}"
        shutil.rmtree(run / "checkpoints")
        for name in ("metrics.parquet", "curve.parquet", SUMS):
            (run / name).unlink()
        edit_json(run / "result.json", lambda d: (d["run"].update(iterations=0), d.update(onsets=[])))
    source = comparison / "runs" / f"{TMPO}-s0" / "evals.parquet"
    edit_table(source, lambda t: t)
    shutil.copy(source, comparison / "runs" / f"{TMPO}-s1" / "evals.parquet")
    metrics = comparison / "runs" / f"{TMPO}-s0" / "result.json"
    data: dict[str, Any] = {}
    edit_json(metrics, lambda d: data.update(d["metrics"]))
    edit_json(comparison / "runs" / f"{TMPO}-s1" / "result.json", lambda d: d.update(metrics=data))
    for seed in (0, 1):
        write_digests(comparison / "runs" / f"{TMPO}-s{seed}")
    assert problems(comparison) == []
