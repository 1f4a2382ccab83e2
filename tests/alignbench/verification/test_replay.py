from pathlib import Path

import pytest

from alignbench import UserError
from alignbench.records.record import Estimate, read_result
from alignbench.verification import replay as replaying
from alignbench.verification.replay import differing_environment, refuse_unrepeatable, replay_config, within_tolerance
from alignbench.verification.run_checks import check_run
from alignbench.verification.verify import verify
from tests.support.tampering import TMPO, edit_json, edit_result, forge_scores, raised

CELL = f"{TMPO}-s0"


def estimate(value: float | None, half: float | None = None) -> Estimate:
    bounds = (None, None) if value is None or half is None else (value - half, value + half)
    return Estimate(value=value, lower=bounds[0], upper=bounds[1], n=4)


@pytest.mark.parametrize(
    ("then", "now", "equal"),
    [
        (estimate(0.5, 0.2), estimate(0.599), True),  # half of 0.2 is 0.1
        (estimate(0.5, 0.2), estimate(0.601), False),
        (estimate(0.5, 0.2), estimate(0.401), True),
        (estimate(20.0), estimate(20.019), True),  # without an interval, a thousandth
        (estimate(20.0), estimate(20.021), False),
        (estimate(None), estimate(None), True),
        (estimate(0.5, 0.2), estimate(None), False),
    ],
)
def test_a_mean_may_differ_by_half_of_half_its_interval(then: Estimate, now: Estimate, equal: bool) -> None:
    assert within_tolerance(then, now) is equal


def test_the_kernel_is_no_part_of_the_machine_and_local_changes_are_other_code() -> None:
    then = {"torch": "2.9", "git_revision": "a", "platform": "Linux-5.15.0-91-generic-x86_64-with-glibc2.35"}
    now = {"torch": "2.9", "git_revision": "a", "platform": "Linux-6.1.0-x86_64-with-glibc2.35"}
    assert list(differing_environment(then, now)) == []
    assert list(differing_environment(then, {**now, "platform": "Linux-6.1.0-x86_64-with-glibc2.36"})) == ["platform"]
    assert list(differing_environment(then, {**now, "torch": "2.10", "threads": 4})) == ["torch", "threads"]
    dirty = {**now, "git_revision": "a-dirty"}
    assert list(differing_environment(dirty, dirty)) == ["git_revision"]


def test_a_replay_gives_every_number_again_to_the_bit(original: Path, tmp_path: Path) -> None:
    found = verify(original, cells=[CELL], out=tmp_path / "replays")
    assert [(cell.cell, cell.state) for cell in found.replayed] == [(CELL, "equal")]
    assert found.exit_code == 0
    then, now = (read_result(place) for place in (original / "runs" / CELL, tmp_path / "replays" / CELL))
    assert now.metrics == then.metrics


def test_forged_scores_that_all_files_agree_with_are_found_by_a_replay(comparison: Path) -> None:
    forge_scores(comparison / "runs" / CELL, raised(0.4))
    assert check_run(comparison / "runs" / CELL).problem is None
    found = verify(comparison, cells=[CELL])
    assert [(cell.cell, cell.state) for cell in found.replayed] == [(CELL, "not equal")]
    assert found.exit_code == 1


def test_on_the_same_software_a_last_digit_counts(comparison: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaying, "differing_environment", lambda then, now: iter(()))
    forge_scores(comparison / "runs" / CELL, raised(1e-12))
    found = verify(comparison, cells=[CELL]).replayed[0]
    assert found.state == "not equal"
    assert "evals.parquet: value at phase final, metric scenario_reward, prompt_index 0, image 0 is" in found.detail


def test_on_other_software_it_is_within_tolerance(comparison: Path) -> None:
    for run in (comparison / "runs").iterdir():
        edit_result(run, lambda data: data["environment"].update(torch="1.0"))
    forge_scores(comparison / "runs" / CELL, raised(1e-12))
    found = verify(comparison, cells=[CELL])
    assert (found.replayed[0].state, found.exit_code) == ("equal within tolerance", 0)
    assert "torch" in found.replayed[0].detail


def test_other_counts_are_beyond_every_tolerance(original: Path) -> None:
    checked = check_run(original / "runs" / CELL)
    result = read_result(original / "runs" / CELL)
    other = result.model_copy(update={"budget": result.budget.model_copy(update={"model_rows_train": 17})})
    said = list(replaying.beyond_tolerance(checked, other, original / "runs" / CELL))
    assert said == ["model_rows_train 18, and 17 in the replay"]


def test_a_replay_has_the_device_and_the_threads_of_the_run(comparison: Path) -> None:
    run = comparison / "runs" / CELL
    edit_json(run / "result.json", lambda data: data["environment"].update(device="cpu", threads=3))
    config = replay_config(run, read_result(run))
    assert (config.device, config.threads, config.save_images) == ("cpu", 3, False)


def test_a_run_that_ended_by_seconds_is_not_replayed(comparison: Path) -> None:
    run = comparison / "runs" / CELL
    edit_json(run / "result.json", lambda data: data["config"]["budget"].update(seconds=3.0))
    with pytest.raises(UserError, match="has a budget in seconds, so how far it came depends on the machine"):
        refuse_unrepeatable(CELL, read_result(run))


def test_a_service_that_a_record_names_is_never_asked(comparison: Path) -> None:
    run = comparison / "runs" / CELL
    edit_json(run / "result.json", lambda data: data["config"].update(scorer_url="http://127.0.0.1:9"))
    with pytest.raises(UserError, match="came from the scorer at its scorer_url, which is not asked"):
        refuse_unrepeatable(CELL, read_result(run))


def test_a_run_whose_task_has_another_content_here_is_not_replayed(comparison: Path) -> None:
    for run in (comparison / "runs").iterdir():
        edit_result(run, lambda data: data["task"].update(reward="0"))
        for checkpoint in (run / "checkpoints").iterdir():
            assert checkpoint.is_dir()
    with pytest.raises(UserError, match="the reward of task equal_modes changed since"):
        verify(comparison, cells=[CELL])
