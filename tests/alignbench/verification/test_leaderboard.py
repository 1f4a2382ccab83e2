import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from alignbench import UserError
from alignbench.frontier.front import COLUMNS, Front, FrontRecord, write_front
from alignbench.records.record import read_result
from alignbench.verification.entries import read_entry
from alignbench.verification.leaderboard import Board, make_board, write_leaderboard
from tests.support.command_line import in_this_process
from tests.support.tampering import (
    GRPO,
    TMPO,
    edit_json,
    edit_result,
    edit_table,
    edit_yaml,
    forge_scores,
    raised,
)


@pytest.fixture
def rival(comparison: Path, tmp_path: Path) -> Path:
    """Another entry: the same comparison with tmpo alone and much higher rewards."""
    folder = Path(shutil.copytree(comparison, tmp_path / "rival"))
    for seed in (0, 1):
        shutil.rmtree(folder / "runs" / f"{GRPO}-s{seed}")
        forge_scores(folder / "runs" / f"{TMPO}-s{seed}", raised(0.5 + 0.001 * seed))
    edit_json(folder / "comparison.json", lambda d: d.update(cells=[c for c in d["cells"] if c["objective"] == "tmpo"]))
    (folder / "entry.yaml").write_text(
        "name: Rival <b>one</b>\nauthors: A. N. Other\nurl: https://example.org/rival\nnote: Ours.\n"
    )
    return folder


def rows(board: Board, table: int = 0) -> list[list[str]]:
    return [[cell.text for cell in row] for row in board.tables[table].table.rows]


def test_true_entries_share_a_table_sorted_by_the_reward(comparison: Path, rival: Path) -> None:
    board = make_board([comparison, rival])
    assert board.refused == []
    assert [table.title for table in board.tables] == ["equal_modes on gaussian_mixture"]
    names = [row[0] for row in rows(board)]
    assert names[0] == "Rival <b>one</b>: tmpo x fixed_tree"
    assert sorted(names[1:3]) == ["comparison: grpo x fixed_tree", "comparison: tmpo x fixed_tree"]
    assert names[3] == "base model"
    # The rival is apart from the others, whose rewards nobody raised, and they are not apart from one another.
    assert [row[1] for row in rows(board)] == ["a", "b", "b", ""]
    head = board.tables[0].table.head
    assert head[:2] == ["method", "group"]
    assert head[2] == "scenario reward ↑ (trained on)"
    assert head[3] == "LGMD ↑ (diversity)"
    assert head[-3:] == ["path KL to base (nats)", "model evaluations", "seeds"]
    assert rows(board)[0][-2:] == ["66", "2"]


def test_numbers_of_the_table_are_those_of_the_records(comparison: Path) -> None:
    finals = [read_result(comparison / "runs" / f"{GRPO}-s{s}").metrics["scenario_reward"].final.value for s in (0, 1)]
    row = next(row for row in make_board([comparison]).tables[0].table.rows if "grpo" in row[0].text)
    assert row[2].value == pytest.approx(sum(map(float, map(str, finals))) / 2)
    assert row[2].text.endswith("]")  # the column of seeds has the n
    assert row[-1].text == "2"


def test_the_page_shows_entries_and_escapes_what_they_say(comparison: Path, rival: Path, tmp_path: Path) -> None:
    write_leaderboard([comparison, rival], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<b>one</b>" not in page
    assert "Rival <b>one</b>" in unescape(page)
    assert '<a href="https://example.org/rival"' in page
    assert "alignbench compare --objectives tmpo,grpo" in unescape(page)
    assert "A. N. Other" in page
    write_leaderboard([comparison], tmp_path / "page.html")  # a leaderboard is replaced
    assert "A. N. Other" not in (tmp_path / "page.html").read_text()


def replace_folder(folder: Path, by: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(by, folder)


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "score": (
        lambda run: edit_json(run / "result.json", lambda d: d["metrics"]["scenario_reward"]["final"].update(value=0.99)),
        "says scenario_reward final value 0.99, but the scores in evals.parquet give",
    ),
    "row": (
        lambda run: edit_table(run / "evals.parquet", lambda t: t.drop(t.index[t["metric"] == "scenario_reward"][-1])),
        "evals.parquet has 7 of the 8 rows of scenario_reward (final)",
    ),
    "config": (
        lambda run: edit_yaml(run / "config.yaml", lambda d: d["optimizer"].update(lr=0.01)),
        "config.yaml has optimizer.lr 0.01 where result.json has 0.005",
    ),
    "seed": (
        lambda run: replace_folder(run, run.with_name(f"{TMPO}-s1")),
        f"is the record of {TMPO}-s1: the folder was copied or renamed",
    ),
    "checkpoint": (
        lambda run: replace_folder(run / "checkpoints", run.with_name(f"{TMPO}-s1") / "checkpoints"),
        "is a checkpoint of another run: its seed is 1, and that of result.json is 0",
    ),
    "truncated": (
        lambda run: (run / "metrics.parquet").write_bytes((run / "metrics.parquet").read_bytes()[:-64]),
        "cannot read",
    ),
    "protocol": (
        lambda run: edit_result(run, lambda d: d["protocol"].update(noise_seed=1)),
        "were evaluated differently: noise_seed is 1 and 12345",
    ),
}


@pytest.mark.parametrize("change", TAMPERED)
def test_a_tampered_entry_is_refused_with_its_own_reason(original: Path, comparison: Path, tmp_path: Path, change: str) -> None:
    alter, says = TAMPERED[change]
    alter(comparison / "runs" / f"{TMPO}-s0")
    page = tmp_path / "page.html"
    done = in_this_process("leaderboard", str(original), str(comparison.rename(tmp_path / "tampered")), "--out", str(page))
    assert (done.returncode, done.stdout.splitlines()[0]) == (1, "comparison: taken, 4 runs")
    assert "alignbench: tampered is refused: " in done.stderr
    assert says in done.stderr
    refused = unescape(page.read_text()).partition('<h2 id="refused">')[2]
    assert says in refused


def test_an_entry_with_the_runs_of_another_is_refused(original: Path, comparison: Path) -> None:
    board = make_board([original, comparison])
    assert [refusal.reason for refusal in board.refused] == [
        f"{comparison} holds runs of the entry comparison: the same training and the same scores"
    ]


def test_an_entry_without_its_command_is_refused(comparison: Path) -> None:
    edit_json(comparison / "comparison.json", lambda d: d.update(command=""))
    with pytest.raises(UserError, match="names the command that makes it again"):
        read_entry(comparison)


@pytest.mark.parametrize(
    ("text", "says"), [("url: javascript:alert(1)", "a url begins with http"), ("nam: x", "there is no key 'nam'")]
)
def test_what_an_entry_says_of_itself_is_read_strictly(comparison: Path, text: str, says: str) -> None:
    (comparison / "entry.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        read_entry(comparison)


def test_another_protocol_or_base_model_has_a_table_of_its_own(comparison: Path, rival: Path) -> None:
    for run in (rival / "runs").iterdir():
        forge_scores(run, lambda t: t.assign(value=t["value"] + 10.0 * (t["metric"] == "scenario_reward")))
    board = make_board([comparison, rival])
    assert [table.title for table in board.tables] == ["equal_modes on gaussian_mixture", "equal_modes on gaussian_mixture (2)"]
    assert [len(table.table.rows) for table in board.tables] == [3, 2]


def test_where_a_front_is_there_the_least_avoidable_loss_comes_first(comparison: Path, rival: Path) -> None:
    result = read_result(comparison / "runs" / f"{TMPO}-s0")
    prompts = range(4)
    table = [
        ("tilt", strength, p, f"prompt {p}", metric, value)
        for strength, values in ((0.0, (0.0, 2.0, 0.0)), (1.0, (1.0, 0.0, 3.0)))
        for metric, value in zip(("reward", "lgmd", "kl_base"), values, strict=True)
        for p in prompts
    ]
    record = FrontRecord(
        key="made by hand", task="equal_modes", backbone="gaussian_mixture", prompts=4, images=8, set_size=2, steps=4,
        guidance=1.0, noise_seed=12345, rewards={"scenario_reward": 1.0}, normalised=False, reward_deviation=1.0,
        config=result.config, fingerprint=result.task,
    )  # fmt: skip
    write_front(Front(record, pd.DataFrame(table, columns=COLUMNS)), comparison / "fronts" / "front")
    board = make_board([comparison, rival])
    assert board.tables[0].table.head[2] == "avoidable loss of LGMD ↓"
    assert board.tables[0].table.note.startswith("Sorted by avoidable loss of LGMD, the least first.")
    assert rows(board)[0][0] == "Rival <b>one</b>: tmpo x fixed_tree"
    # On this front a mean reward of r has an LGMD of 2 - 2 r.
    for row in board.tables[0].table.rows[:-1]:
        texts = dict(zip(board.tables[0].table.head, row, strict=True))
        reward, lgmd = (float(texts[name].value) for name in ("scenario reward ↑ (trained on)", "LGMD ↑ (diversity)"))
        assert float(row[2].value) == pytest.approx(2 - 2 * reward - lgmd)
    losses = np.array([float(row[2].value) for row in board.tables[0].table.rows[:-1]])
    assert (np.diff(losses) >= 0).all()


def test_a_page_of_others_is_never_overwritten(original: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("mine")
    done = in_this_process("leaderboard", str(original), "--out", str(tmp_path / "page.html"))
    assert (done.returncode, (tmp_path / "page.html").read_text()) == (2, "mine")
    assert "was not written by alignbench" in done.stderr
    done = in_this_process("leaderboard", str(tmp_path / "nowhere"), "--out", str(tmp_path / "new.html"))
    assert (done.returncode, "there is no folder" in done.stderr) == (2, True)
