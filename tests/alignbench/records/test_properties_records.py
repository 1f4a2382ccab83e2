"""Records hold what was put into them; damaged ones are named, and no name in them is a path or markup."""

import json
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from alignbench import UserError, statistics
from alignbench.cli.options import results_folder
from alignbench.comparison.grid import Cell, Grid
from alignbench.comparison.reading import read_results
from alignbench.comparison.results import BASE
from alignbench.config.run_config import BudgetConfig
from alignbench.files.escaping import slug
from alignbench.files.reading import read_table
from alignbench.records.record import (
    Budget,
    Estimate,
    MetricRecord,
    Protocol,
    Result,
    RunInfo,
    read_result,
    write_result,
)
from alignbench.reports import report
from alignbench.reports.plots import comparison_plots
from tests.alignbench.record_folders import write_run
from tests.support.properties import HOSTILE, nested, one_sentence_at_most

WHOLE = st.integers(0, 2**63 - 1)
NUMBERS = st.floats()  # NaN and infinities among them
PLAIN = nested(st.none() | st.booleans() | WHOLE | st.floats(allow_nan=False, allow_infinity=False) | HOSTILE, HOSTILE)
SETTINGS = st.dictionaries(HOSTILE, PLAIN, max_size=2)
ESTIMATES = st.builds(Estimate, value=NUMBERS, lower=NUMBERS, upper=NUMBERS, n=st.integers(0, 9))
METRICS = st.builds(
    MetricRecord,
    **dict.fromkeys(("base", "final", "difference"), ESTIMATES),
    higher_is_better=st.none() | st.booleans(),
    role=st.sampled_from(["reward", "judge", "part"]),
)
RESULTS = st.builds(
    Result,
    run=st.builds(
        RunInfo,
        **dict.fromkeys(("id", "objective", "sampler", "backbone", "task", "preset", "started", "status"), HOSTILE),
        seed=WHOLE,
        iterations=WHOLE,
    ),
    budget=st.builds(Budget, model_rows_rollout=WHOLE, seconds=st.floats(0, 1e9), micro_batch=st.none() | WHOLE),
    metrics=st.dictionaries(HOSTILE, METRICS, max_size=2),
    alarms=st.lists(HOSTILE, max_size=2),
    checks=st.dictionaries(HOSTILE, NUMBERS, max_size=2),
    protocol=st.builds(
        Protocol,
        **dict.fromkeys(("prompts", "steps", "noise_seed"), WHOLE),
        images_per_prompt=st.integers(1, 2**63 - 1),
        guidance=st.floats(1, 9),
        weights=st.sampled_from(["raw", "ema"]),
        evals=st.dictionaries(HOSTILE, SETTINGS, max_size=2),
    ),
    environment=SETTINGS,
    config=SETTINGS,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@given(RESULTS)
def test_a_record_comes_back_as_it_was(folder: Path, result: Result) -> None:
    write_result(result, folder)
    assert read_result(folder) == result

    def refused(constant: str) -> None:
        raise ValueError(constant)

    json.loads((folder / "result.json").read_text(), parse_constant=refused)  # JSON as others read it knows no NaN


@given(st.integers(0, 10**6), st.integers(0, 255), st.sampled_from(["cut", "flip", "insert", "delete"]))
@example(0, ord("["), "insert")
def test_a_damaged_record_is_refused_in_one_sentence_or_still_one(folder: Path, at: int, byte: int, how: str) -> None:
    run = folder / "damaged"
    if not run.exists():
        write_run(run)
        shutil.copy(run / "result.json", run / "whole.json")
    data = bytearray((run / "whole.json").read_bytes())
    at %= len(data)
    match how:
        case "cut":
            del data[at:]
        case "flip":
            data[at] ^= byte
        case "insert":
            data[at:at] = bytes([byte])
        case "delete":
            del data[at]
    (run / "result.json").write_bytes(data)
    with one_sentence_at_most():
        assert read_result(run)
    with one_sentence_at_most():
        assert len(read_results(run).runs) == 1


@given(st.binary(max_size=20) | PLAIN.map(lambda data: json.dumps(data).encode()))
@example(b"[" * 100_000)
@example(b'{"schema_version": ' + b"9" * 5000 + b"}")
@example(b'{"schema_version": [1]}')
@example(b"\xff\xfe")
def test_no_other_content_is_a_record(folder: Path, content: bytes) -> None:
    (folder / "result.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_result(folder)
    assert len(str(caught.value).splitlines()) == 1


@given(st.sampled_from(["metrics", "evals"]), st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_a_damaged_table_is_read_or_named_and_the_record_used(folder: Path, name: str, at: int, flip: int, cut: bool) -> None:
    run = folder / "tables"
    if not run.exists():
        write_run(run)
        for file in run.glob("*.parquet"):
            shutil.copy(file, file.with_suffix(".whole"))
    file = run / f"{name}.parquet"
    data = bytearray(file.with_suffix(".whole").read_bytes())
    data[at % len(data)] ^= flip
    file.write_bytes(data[: at % len(data)] if cut else data)
    with one_sentence_at_most():
        assert isinstance(read_table(file), pd.DataFrame)
    results = read_results(run)
    table = getattr(results.runs[0], name)
    assert (table is None) == (len(results.unreadable) == 1)
    file.write_bytes(file.with_suffix(".whole").read_bytes())


MEANS = st.tuples(*[st.floats(-9, 9, allow_nan=False) | st.just(float("nan"))] * 2)


@pytest.fixture(scope="module")
def few_resamples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 20)
        yield


@pytest.mark.usefixtures("few_resamples")
@given(st.lists(st.tuples(st.sampled_from(["tmpo", "grpo"]), st.integers(0, 3), MEANS, MEANS), min_size=1, max_size=4))
def test_frames_of_any_runs_hold_their_numbers(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[str, int, tuple[float, float], tuple[float, float]]]
) -> None:
    made = tmp_path_factory.mktemp("runs")
    for i, (objective, seed, reward, lgmd) in enumerate(runs):
        write_run(made / str(i), objective=objective, seed=seed, reward=reward, lgmd=lgmd)
    results = read_results(made)
    distinct = {run[:2]: run for run in reversed(runs)}
    assert {(r.result.run.objective, r.result.run.seed) for r in results.runs} == set(distinct)
    frame: Any = results.runs_frame.set_index(["objective", "seed", "metric"])
    assert len(frame) == 2 * len(distinct)
    for (objective, seed), (_, _, reward, lgmd) in distinct.items():
        for metric, values in (("ocr", reward), ("lgmd", lgmd)):
            row = frame.loc[(objective, seed, metric)]
            known = [v for v in values if v == v]
            assert row["final"] == pytest.approx(np.mean(known) if known else float("nan"), nan_ok=True, abs=1e-9)
            assert row["final_n"] == len(known)
    cells = results.cells_frame
    assert set(cells["cell"]) == {BASE, *(f"{objective} x independent" for objective, _ in distinct)}
    pairs = results.pairs_frame
    assert ((pairs["p_holm"] >= pairs["p"] - 1e-12) | pairs["p"].isna()).all()
    assert not cells[["mean_lower", "mean", "mean_upper"]].apply(lambda r: r["mean_lower"] > r["mean"] + 1e-9, axis=1).any()
    assert results.prompts_frame.groupby(["cell", "seed", "metric"]).size().le(2).all()


# ------------------------------------------------------------------------------------------------------------- names


@given(HOSTILE, HOSTILE)
def test_no_name_leaves_its_folder(one: str, other: str) -> None:
    assume("\0" not in one + other)
    inside = results_folder(one, other)
    assert inside.parent == Path("results")
    assert inside.name not in ("", ".", "..")
    assert not set("/\\:\n\0") & set(slug(one))
    assert slug(one) not in (".", "..")


@given(st.lists(st.from_regex(r"[\w.+:/-]{1,9}", fullmatch=True), min_size=1, max_size=4, unique=True))
def test_cells_of_tasks_of_any_names_have_folders_of_their_own_below_runs(tasks: list[str]) -> None:
    grid = Grid(
        objectives=["tmpo", "grpo"], samplers=["fixed_tree"], tasks=tasks, seeds=[0, 10], backbone="tiny", preset="smoke",
        budget=BudgetConfig(model_rows=1), threads=1,
    )  # fmt: skip
    cells: list[Cell] = grid.cells()
    assert all(Path("runs", cell.id).parent == Path("runs") and cell.id not in ("", ".", "..") for cell in cells)
    assert len(cells) == 4 * len(tasks)


class Reader(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.acts: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.acts += [f"{name}={value}" for name, value in attributes if name.startswith("on") or name in ("src", "href")]


Render = Callable[[str], tuple[str, str]]


@pytest.fixture(scope="module")
def render(tmp_path_factory: pytest.TempPathFactory, few_resamples: None) -> Iterator[Render]:
    """HTML and Markdown of the report of a run all of whose names are the given one; without figures, which take long."""
    made = tmp_path_factory.mktemp("pages")
    whole = json.loads((write_run(made / "r") / "result.json").read_text())

    def rendered(name: str) -> tuple[str, str]:
        data = json.loads(json.dumps(whole))
        data["run"] |= dict.fromkeys(("objective", "sampler", "task", "backbone", "id", "preset"), name)
        data |= {"alarms": [name], "environment": {"python": name, "command": name}}
        data["protocol"]["evals"] = {name: {"settings": name}}
        data["metrics"][name] = data["metrics"]["ocr"]
        (made / "r" / "result.json").write_text(json.dumps(data))
        results = read_results(made)
        setups = [report.setup_values(results, setup, made, report.Plots()) for setup in results.setups]
        values = {"setups": setups, "families": [], "results": results, "published": [], "base": BASE, "refresh": None}
        return report.render("report.html.jinja", values), report.render("report.md.jinja", values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison_plots, "comparison_figures", lambda results, setup: {})
        yield rendered


@pytest.fixture(scope="module")
def plain(render: Render) -> tuple[str, str]:
    return render("plain")


def columns(markdown: str) -> list[int]:
    """Bars that part columns, of each row of a table."""
    return [re.sub(r"\\.", "", line).count("|") for line in markdown.splitlines() if line.startswith("|")]


@given(name=HOSTILE.filter(str.strip))
def test_no_name_is_markup_in_a_report(render: Render, plain: tuple[str, str], name: str) -> None:
    harmless, hostile = Reader(), Reader()
    page, markdown = render(name)
    harmless.feed(plain[0])
    hostile.feed(page)
    assert hostile.tags == harmless.tags
    assert hostile.acts == harmless.acts
    assert columns(markdown) == columns(plain[1])
    for text in (page, markdown):
        assert not {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs")} - set("\n\u200c\u200d")
