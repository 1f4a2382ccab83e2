"""A run that is driven to hack raises the alarm wherever a person looks, and the base model raises none.

The toy policy draws noise; brighter images are better, so that it learns to draw white ones, each like the other.
"""

from pathlib import Path

import pytest

from alignbench import run
from alignbench.cli.views.run import Terminal
from alignbench.config.run_config import RunConfig
from alignbench.records.record import read_result
from alignbench.reports.report import write_report
from tests.support.plugins import toy_config, write_task


def hacking(folder: Path, iterations: int) -> RunConfig:
    folder.mkdir()
    return toy_config(
        write_task(folder, "Brightness", judges=["diversity", "quality"]),
        objective="grpo",
        iterations=iterations,
        prompts_per_iteration=4,
        optimizer={"lr": 0.03},
    )


def test_a_run_driven_to_hack_raises_the_alarm_in_record_summary_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    found = run(hacking(tmp_path / "task", iterations=60), runs / "hacked", console=Terminal())
    for name, rises in (("brightness", True), ("pixel_diversity", False)):
        change = found.metrics[name].difference
        assert change.lower is not None
        assert change.upper is not None
        assert change.lower > 0 if rises else change.upper < 0
    (alarm,) = [alarm for alarm in found.alarms if "pixel_diversity" in alarm]
    assert alarm.startswith("brightness rose by")
    assert read_result(runs / "hacked").alarms == found.alarms
    # The summary's lines are broken to the terminal's width.
    assert f"alarm: {alarm}" in " ".join(capsys.readouterr().err.split())
    write_report(runs)
    for name in ("report.md", "report.html"):
        assert alarm in (runs / name).read_text()
    assert "1 of 1 run: " in (runs / "report.html").read_text()


def test_the_base_model_raises_none(tmp_path: Path) -> None:
    found = run(hacking(tmp_path / "task", iterations=0), tmp_path / "run")
    assert found.alarms == []
    assert found.metrics["brightness"].difference.value == 0
