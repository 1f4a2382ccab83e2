"""The leaderboard: a static page that ranks the methods of several entries, from their records alone.

Entries share a table if they have the same task content, protocol, metrics and base model. The base model is recognised by its
settings and by its own evaluation, which is on the same prompts and noise for everybody.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from alignbench.analysis.against_front import avoidable_frame, front_note, judge_metrics
from alignbench.comparison.fronts import Fronts
from alignbench.comparison.results import BASE, RecordedRun, Results
from alignbench.config.run_config import with_present_names
from alignbench.errors import UserError
from alignbench.figures.metric_names import axis_name
from alignbench.files.writing import refuse_foreign, write_atomically
from alignbench.frontier.front import Front
from alignbench.load import complete_settings
from alignbench.records.record import Result
from alignbench.reports.formatting import ARROWS, estimate, spent
from alignbench.reports.report import render
from alignbench.reports.tables import method_row
from alignbench.reports.text_table import Cell, TextTable, bounded, count, name
from alignbench.verification.comparison_checks import protocol_of_run
from alignbench.verification.entries import Entry, Refusal, read_entries
from alignbench.verification.ranking import Ranking, ranking
from alignbench.verification.replay import within_tolerance

MARK = b"<title>alignbench: leaderboard</title>"
"""What marks a page as a leaderboard, which may be overwritten."""
PATH_KL = "path_kl"
MOST_JUDGES = 3
"""Independent metrics that a table shows, at most."""
TASK_PARTS = ("evaluation prompts", "reward", "judges")
"""The parts of a task that must be the same within a table. Training prompts are a method's own."""


@dataclass(frozen=True)
class BoardTable:
    """The methods of one protocol.

    Attributes:
        title: the task and the base model.
        table: a row for each method.
        protocol: how all of them were evaluated.
    """

    title: str
    table: TextTable
    protocol: dict[str, Any]


@dataclass
class Board:
    """What the page shows.

    Attributes:
        entries: the entries that are taken.
        refused: those that are not, with the reason.
        tables: one for each protocol.
    """

    entries: list[Entry]
    refused: list[Refusal]
    tables: list[BoardTable] = field(default_factory=list)


def write_leaderboard(folders: Sequence[Path], out: Path) -> Board:
    """Reads and checks the entries and writes the page.

    Args:
        folders: the entries' folders.
        out: the page; a leaderboard that is there is replaced.

    Raises:
        UserError: a folder is not there, or `out` is a file that is not a leaderboard.
        DiskError: the page cannot be written.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder; --out takes the name of a page, such as {out / 'leaderboard.html'}")
    refuse_foreign(out, MARK)
    board = make_board(folders)
    values = {"board": board, "counted": sum(len(entry.runs) for entry in board.entries)}
    text = render("leaderboard.html.jinja", values)
    write_atomically(out, partial(Path.write_text, data=text, encoding="utf-8"))
    return board


def make_board(folders: Sequence[Path]) -> Board:
    """Reads and checks the entries and ranks their methods.

    Raises:
        UserError: a folder is not there, or is given twice.
    """
    entries, refused = read_entries(folders)
    results = Results(Path(), _in_tables(entries))
    fronts = Fronts([front for entry in entries for front in entry.fronts.kept])
    return Board(entries, refused, [_board_table(results, setup, fronts) for setup in results.setups])


def _in_tables(entries: Sequence[Entry]) -> list[RecordedRun]:
    """All runs, with the table that they belong to as their setup, and with the entry in the name of their method."""
    tables: list[tuple[dict[str, Any], Result, str]] = []
    runs = []
    for entry in entries:
        for run in entry.runs:
            key = _same_protocol(run.result)
            title = next((t for k, first, t in tables if k == key and _same_base(first, run.result)), None)
            if title is None:
                wanted = f"{run.result.run.task} on {key['backbone name']}"
                alike = sum(t == wanted or t.startswith(f"{wanted} (") for _, _, t in tables)
                title = f"{wanted} ({alike + 1})" if alike else wanted
                tables.append((key, run.result, title))
            runs.append(replace(run, setup=title, cell=f"{entry.name}: {run.cell}", base_method="", swept={}))
    return runs


def _same_protocol(result: Result) -> dict[str, Any]:
    """What must be equal for two runs to be in one table."""
    config = with_present_names(result.config)
    backbone = complete_settings("backbone", config["backbone"]) if isinstance(config.get("backbone"), dict) else {}
    place = str(backbone.pop("name", result.run.backbone))
    digests = {part: result.task.get(part) for part in TASK_PARTS}
    return {
        "task": digests if result.task else result.run.task,
        "protocol": protocol_of_run(result),
        "backbone name": place.rstrip("/").rpartition("/")[2],  # a folder of another machine is known by its name
        "backbone": backbone,
    }


def _same_base(first: Result, second: Result) -> bool:
    """Whether the base models' means agree as far as another machine may round them."""
    return all(within_tolerance(first.metrics[m].base, second.metrics[m].base) for m in first.metrics)


def _board_table(results: Results, setup: str, fronts: Fronts) -> BoardTable:
    front = fronts.of_setup(results, setup)
    diversity = results.diversity(setup)
    ranked = ranking(results, setup, front, diversity)
    losses = avoidable_frame(results, setup, front, [diversity]) if front is not None and diversity else pd.DataFrame()
    shown = _shown_metrics(results, setup, front)
    recorded = results.of(setup)[0].result.metrics
    head = ["method", "group", *([f"avoidable loss of {axis_name(str(diversity))} ↓"] if len(losses) else [])]
    head += [" ".join(filter(None, [axis_name(m), ARROWS[recorded[m].higher_is_better], why])) for m, why in shown.items()]
    cells = results.cells_frame[results.cells_frame["setup"] == setup]
    rows = []
    for cell in (*ranked.cells, BASE):
        values = method_row(cells, cell)
        row = [name(cell), name(ranked.groups.get(cell, ""))]
        if len(losses):
            loss = losses[losses["cell"] == cell].to_dict("records")
            row.append(bounded(loss[0]) if loss else Cell("-", float("nan")))
        for metric in shown:
            estimated = values["metrics"].get(metric)
            row.append(
                Cell(estimate(estimated, usual=values["n"]), estimated["mean"]) if estimated else Cell("-", float("nan"))
            )
        row += [Cell(spent(values, "model_rows"), values["model_rows"]), count(values["seeds"])]
        rows.append(row)
    first = results.of(setup)[0].result
    note = _note(ranked, results.reward(setup), diversity, front)
    protocol = first.protocol.model_dump(mode="json", exclude={"guidance", "weights"})
    return BoardTable(setup, TextTable(setup, note, [*head, "model evaluations", "seeds"], rows), protocol)


def _shown_metrics(results: Results, setup: str, front: Front | None) -> dict[str, str]:
    """The metrics of a table -> what they are to it: the reward, diversity, independent judges, and the KL of the paths."""
    recorded = results.of(setup)[0].result.metrics
    reward, diversity = results.reward(setup), results.diversity(setup)
    judges = judge_metrics(results, setup, front)[:MOST_JUDGES]
    shown = (
        {reward: "(trained on)"} | ({diversity: "(diversity)"} if diversity else {}) | dict.fromkeys(judges, "(independent)")
    )
    return shown | ({PATH_KL: ""} if PATH_KL in recorded else {})


def _note(ranked: Ranking, reward: str, diversity: str | None, front: Front | None) -> str:
    """What the rows are sorted by, and what the letters mean."""
    by = (
        f"avoidable loss of {axis_name(str(diversity))}, the least first"
        if ranked.by_loss
        else f"{axis_name(reward)}, the highest first"
    )
    letters = "Methods that share a letter are not apart in it beyond chance (Welch's t test over seeds, Holm-corrected, 5 %)."
    about = f" {front_note(front)}" if front is not None and ranked.by_loss else ""
    means = "Means have 95 % intervals over seeds; over prompts with one seed and for the base model."
    return f"Sorted by {by}. {letters} {means}{about}"
