"""Reports of runs that have not ended, and reports that follow a comparison."""

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from alignbench import UserError
from alignbench.files.writing import exclusive
from alignbench.reports import live
from alignbench.reports.plots.comparison_plots import learning_curves
from alignbench.training.run import run
from tests.alignbench.record_folders import write_comparison, write_run
from tests.support.command_line import in_this_process
from tests.support.plugins import toy_config, write_task

REFRESH = '<meta http-equiv="refresh"'


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A folder with two runs that have trained and have no record."""
    (tmp_path / "task").mkdir()
    task = write_task(tmp_path / "task")
    for seed in (1, 2):
        run(toy_config(task, seed=seed), tmp_path / "results" / f"s{seed}")
        (tmp_path / "results" / f"s{seed}" / "result.json").unlink()
    return tmp_path / "results"


def test_a_report_of_unfinished_runs_alone_says_so_and_shows_their_training(unfinished: Path) -> None:
    (page,) = live.write_report_so_far(unfinished)
    text = page.read_text()
    assert "2 unfinished runs" in text
    assert "No run has finished yet, so nothing can be compared" in text
    assert text.count("<td>interrupted</td>") == 2
    assert text.count("<td>3 of 3</td>") == 2
    assert "training so far" in text
    assert '<dialog class="large">' in text  # the script of the page needs it
    assert '<figure class="wide"><img class="enlarge"' in text
    assert REFRESH not in text


def test_unfinished_runs_of_one_pair_and_seed_are_not_one_curve(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(unfinished / "s1", unfinished / "s1_again")
    shown: list[pd.DataFrame] = []

    def noted(table: pd.DataFrame, x: str) -> Any:
        shown.append(table)
        return learning_curves(table, x)

    monkeypatch.setattr("alignbench.reports.live.learning_curves", noted)
    live.write_report_so_far(unfinished)
    (table,) = shown
    assert sorted(set(zip(table["cell"], table["seed"], strict=True))) == [
        ("tmpo x fixed_tree", 1),
        ("tmpo x fixed_tree", 2),
        ("tmpo x fixed_tree (2)", 1),
    ]


def test_the_commands_accept_a_folder_of_unfinished_runs(unfinished: Path) -> None:
    done = in_this_process("report", str(unfinished))
    assert done.returncode == 0
    assert done.stdout.split() == [str(unfinished / "report.html")]
    for words, says in (
        (["--reward", "brightness"], "no run below"),
        (["--animate", "--diversity", "lgmd"], "an animation has"),
    ):
        refused = in_this_process("plot", str(unfinished), *words)
        assert (refused.returncode, says in refused.stderr) == (2, True)
    done = in_this_process("plot", str(unfinished))
    assert done.returncode == 0
    assert "has finished: these are plots of the runs so far" in done.stderr
    assert str(unfinished / "s1" / "plots" / "curves.png") in done.stdout.split()


def test_a_damaged_table_of_an_unfinished_run_is_shown_as_unreadable(unfinished: Path) -> None:
    (unfinished / "s1" / "metrics.parquet").write_bytes(b"damaged")
    text = live.write_report_so_far(unfinished)[0].read_text()
    assert "<td>unreadable</td>" in text
    assert "<td>interrupted</td>" in text


@pytest.mark.usefixtures("without_plots")
def test_a_finished_run_replaces_the_page_of_unfinished_ones(unfinished: Path) -> None:
    live.write_report_so_far(unfinished)
    write_run(unfinished / "done")
    written = live.write_report_so_far(unfinished)
    assert unfinished / "report.md" in written
    assert "Comparison of 1 run<" in (unfinished / "report.html").read_text()


@pytest.mark.usefixtures("without_plots")
def test_a_report_follows_a_comparison_until_it_has_ended(tmp_path: Path) -> None:
    """It shows nothing before the first run, refreshes while the comparison is at work, and stays at its end."""
    pages: list[str] = []
    with ExitStack() as at_work:
        at_work.enter_context(exclusive(tmp_path))

        def wait(seconds: float) -> None:
            assert seconds == 7
            page = tmp_path / "report.html"
            pages.append(page.read_text() if page.exists() else "")
            write_run(tmp_path / "runs" / f"r{len(pages)}", seed=len(pages))
            status = ["complete"] * len(pages) + ["pending"] * (2 - len(pages))
            write_comparison(tmp_path, [{"id": f"r{i}", "seed": i, "status": s} for i, s in enumerate(status, start=1)])
            if len(pages) == 2:
                at_work.close()

        live.follow(tmp_path, every=7, wait=wait)
    assert pages[0] == ""
    assert f'{REFRESH} content="7">' in pages[1]
    assert "Not finished: runs are at work, and this page is renewed every 7 s" in pages[1]
    assert "Comparison of 1 run<" in pages[1]
    last = (tmp_path / "report.html").read_text()
    assert "Comparison of 2 runs<" in last
    assert REFRESH not in last


def test_ctrl_c_leaves_a_page_that_stays(unfinished: Path) -> None:
    def interrupt(seconds: float) -> None:
        assert REFRESH in (unfinished / "report.html").read_text()
        raise KeyboardInterrupt

    with exclusive(unfinished / "s1"), pytest.raises(KeyboardInterrupt):
        live.follow(unfinished, every=7, wait=interrupt)
    text = (unfinished / "report.html").read_text()
    assert REFRESH not in text
    assert "2 unfinished runs" in text


@pytest.mark.usefixtures("without_plots")
def test_the_command_ends_at_once_where_nothing_is_at_work(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    done = in_this_process("report", str(tmp_path), "--live", "--every", "1000")
    assert done.returncode == 0
    assert str(tmp_path / "report.html") in done.stdout.split()


def test_the_command_ends_on_ctrl_c_with_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "follow", interrupted)
    done = in_this_process("report", str(tmp_path), "--live")
    assert done.returncode == 130
    assert "interrupted; " in done.stderr
    assert "Traceback" not in done.stderr


def test_following_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        live.follow(tmp_path / "nowhere")
