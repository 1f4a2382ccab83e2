import html
import json
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from alignbench import UserError
from alignbench.cli.app import app
from alignbench.comparison import ray_engine, runner
from alignbench.comparison.estimates import expected_costs
from alignbench.comparison.grid import Grid, read_grid, with_seeds
from alignbench.comparison.planning import Request, command_of, plan_grid, planned_rows, read_request
from alignbench.comparison.reading import read_results
from alignbench.comparison.record import CellRecord
from alignbench.comparison.runner import compare, done
from alignbench.config.run_config import load_config
from alignbench.files.writing import exclusive
from alignbench.files.yaml_files import to_yaml
from alignbench.records.record import read_result
from alignbench.reports import report
from tests.support.command_line import in_a_process, in_this_process
from tests.support.faults import CONTEXT, quick_workers
from tests.support.plugins import write_task
from tests.support.same_runs import CALM, assert_same_but_for_rounding, table
from tests.support.together import listening

ROWS = 22
"""Of an iteration of two groups: a tree of 2 x 2 leaves over 4 steps with splits at 1 and 2 has 8 rows and 3 parents."""


COARSE = {"name": "gaussian_mixture", "quadrature": 10}
"""The toy with its densities on so coarse a grid that evaluating it takes no time."""


def grid(folder: Path, scorer: str = "Brightness", scorer_settings: Mapping[str, Any] = {}, **changes: Any) -> Grid:
    """One tree, tmpo and grpo, one seed, three iterations' worth of rows; well under a second a cell."""
    settings = {
        "sampler": None,
        "samplers": {"fixed_tree": {"sampler": {"steps": 4, "levels": 2, "children": 2, "splits": [1, 2]}}},
        "prompts_per_iteration": 2,
        "evaluation": {"prompts": 4, "images_per_prompt": 2, "steps": 4},
        "save_images": False,
        "threads": 1,
        **changes.pop("settings", {}),
    }
    settings.pop("sampler")
    options: dict[str, Any] = {
        "objectives": ["tmpo", "grpo"],
        "samplers": ["fixed_tree"],
        "tasks": [str(write_task(folder, scorer, **scorer_settings))],
        "seeds": [0],
        "backbone": "tests.support.plugins:ToyPolicy",
        "preset": "smoke",
        "budget": {"model_rows": 3 * ROWS},
    }
    return plan_grid(Request(settings=settings, **{**options, **changes}))


class Log:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.progress: dict[str, list[float]] = {}

    def began(self, cell: str) -> None:
        self.lines.append(("began", cell))

    def moved(self, cell: str, row: Mapping[str, Any], progress: float) -> None:
        self.progress.setdefault(cell, []).append(progress)

    def ended(self, record: CellRecord) -> None:
        self.lines.append((record.status, record.id))


class Listening(Log):
    """An observer that looks at the sockets of all that was started."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[str] = set()

    def moved(self, cell: str, row: Mapping[str, Any], progress: float) -> None:
        self.addresses |= listening()

    def ended(self, record: CellRecord) -> None:
        self.addresses |= listening()


@pytest.fixture(scope="module")
def ray_stays() -> Iterator[None]:
    """One local Ray for all tests that ask for it, which is started by the first of them; to start one takes seconds.

    Skips where Ray is not installed. It is not imported here: the comparison says before how it is to listen.
    """
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    start = ray_engine._start
    with pytest.MonkeyPatch.context() as patch:

        def start_and_keep(ray: Any) -> None:
            start(ray)
            patch.setattr(ray, "shutdown", lambda: None)

        patch.setattr(ray_engine, "_start", start_and_keep)
        yield
    import_module("ray").shutdown()


def test_cells_are_ordered_by_seed_and_named_by_what_they_are(tmp_path: Path) -> None:
    made = grid(tmp_path, seeds=[0, 3])
    assert [cell.id for cell in made.cells()] == [f"{o}-fixed_tree-toy-s{s}" for s in (0, 3) for o in ("tmpo", "grpo")]
    config = made.cells()[3].config
    assert (config.objective.name, config.sampler.name, config.seed) == ("grpo", "fixed_tree", 3)
    assert (config.iterations, config.budget.model_rows, config.threads) == (None, 66, 1)


def test_the_rows_of_a_run_by_hand(tmp_path: Path) -> None:
    tree = {"name": "fixed_tree", "steps": 4, "levels": 2, "children": 2, "splits": [1, 2]}
    options = {"sampler": tree, "iterations": 5, "prompts_per_iteration": 2, "updates_per_rollout": 3}
    config = load_config(preset="smoke", options=options)
    assert planned_rows(config) == 5 * (16 + 3 * 6)


def test_the_budget_is_by_default_what_the_cheapest_pair_plans(tmp_path: Path) -> None:
    made = grid(tmp_path, samplers=["fixed_tree", "independent"], budget={}, settings={"iterations": 4})
    # smoke's independent: 4 chains of 4 steps are 16 rows, 12 of them stochastic; the tree's 8 and 3 are fewer.
    assert made.budget.model_rows == 4 * ROWS


def test_a_comparison_trains_every_cell_to_the_same_budget(tmp_path: Path) -> None:
    log, scored = Log(), tmp_path / "scored"
    made = grid(tmp_path, "Counted", {"file": str(scored)}, seeds=[0, 1])
    record = compare(made, tmp_path / "out", command="alignbench compare", observer=log)
    assert [cell.status for cell in record.cells] == ["complete"] * 4
    results = [read_result(tmp_path / "out" / "runs" / cell.id) for cell in record.cells]
    assert [r.budget.model_rows_rollout + r.budget.model_rows_train for r in results] == [66] * 4
    assert [r.run.status for r in results] == ["budget spent"] * 4
    assert [r.run.seed for r in results] == [0, 0, 1, 1]
    # The base model is evaluated once, and is the same row everywhere; the trained models differ.
    assert len({r.metrics["brightness"].base.value for r in results}) == 1
    # Evaluations of 4 prompts with 2 images each, of the base model and four trained ones; 4 x 3 iterations of 8.
    assert Counter(scored.read_text().split()) == {"eval": (1 + 4) * 8, "train": 4 * 3 * 8}
    assert all(r.budget.seconds_evaluation > 0 for r in results)
    assert len({r.metrics["brightness"].final.value for r in results}) == 4
    assert log.lines == [(what, cell.id) for cell in record.cells for what in ("began", "complete")]
    assert log.progress[record.cells[0].id] == pytest.approx([1 / 3, 2 / 3, 1])
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == record.model_dump(mode="json")
    assert read_grid(tmp_path / "out") == record.grid


def test_what_is_finished_is_kept_and_more_can_be_added(tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(grid(tmp_path), out)
    before = {f: f.stat().st_mtime_ns for f in out.glob("runs/*/result.json")}
    log = Log()
    record = compare(grid(tmp_path, objectives=["tmpo", "grpo", "vargrad"], seeds=[0, 1]), out, observer=log)
    assert [cell for what, cell in log.lines if what == "began"] == [
        f"{o}-fixed_tree-toy-s{s}" for o, s in (("vargrad", 0), ("tmpo", 1), ("grpo", 1), ("vargrad", 1))
    ]
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert {cell.status for cell in record.cells} == {"complete"}


def test_methods_with_metrics_of_their_own_settings_go_on(tmp_path: Path) -> None:
    settings = {"objectives": {"grpo": {"evals": {"diversity": {"pixels": False}}}}}
    for _ in range(2):
        record = compare(grid(tmp_path, settings=settings), tmp_path / "out")
        assert {cell.status for cell in record.cells} == {"complete"}


def test_a_failed_cell_is_told_and_does_not_sink_the_others(tmp_path: Path) -> None:
    objectives = ["tests.support.plugins:Failing", "grpo"]
    record = compare(grid(tmp_path, objectives=objectives), tmp_path / "out")
    assert [cell.status for cell in record.cells] == ["failed", "complete"]
    assert record.cells[0].error == "ZeroDivisionError: a fault of the plug-in"
    assert record.cells[0].id == "tests.support.plugins_Failing-fixed_tree-toy-s0"
    log = Log()
    compare(grid(tmp_path, objectives=objectives), tmp_path / "out", observer=log)
    assert [what for what, _ in log.lines] == ["began", "failed"]


def test_an_interrupted_cell_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    made = grid(tmp_path, "Interrupting", objectives=["grpo"])
    with pytest.raises(KeyboardInterrupt):
        compare(made, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [cell["status"] for cell in kept["cells"]] == ["pending"]
    assert done(made.cells(), tmp_path / "out") == []
    record = compare(made, tmp_path / "out")
    assert record.cells[0].status == "complete"
    compare(grid(tmp_path, objectives=["grpo"]), tmp_path / "whole")
    whole, resumed = (table(tmp_path / name / "runs" / record.cells[0].id) for name in ("whole", "out"))
    pd.testing.assert_frame_equal(whole, resumed, check_exact=True)


@pytest.mark.parametrize("options", [{"workers": 2}, {"engine": "ray"}], ids=["two processes", "ray"])
def test_other_engines_give_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, options: Any
) -> None:
    quick_workers(monkeypatch)
    if "engine" in options:
        request.getfixturevalue("ray_stays")
    settings = {
        "evaluation": {"prompts": 2, "images_per_prompt": 4, "steps": 4},
        "threads": 1,
        "samplers": {},
        "backbone": COARSE,
    }
    choice: dict[str, Any] = {"backbone": "gaussian_mixture", "tasks": ["equal_modes"], "settings": settings, "budget": {}}
    objectives = ["grpo"] if "engine" in options else ["tmpo", "grpo"]  # a cell for each worker, which Ray starts anew
    made = grid(tmp_path, objectives=objectives, **choice)
    here, there = compare(made, tmp_path / "here"), compare(made, tmp_path / "there", **options)
    assert {cell.status for cell in (*there.cells, *here.cells)} == {"complete"}
    assert len(there.cells) == len(objectives)
    for cell in here.cells:
        one, other = (tmp_path / name / "runs" / cell.id for name in ("here", "there"))
        pd.testing.assert_frame_equal(table(one), table(other), check_exact=True)
        assert read_result(one).metrics == read_result(other).metrics


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_processes_that_share_a_cell_give_the_same_and_listen_on_loopback_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, engine: str
) -> None:
    quick_workers(monkeypatch)
    if engine == "ray":
        request.getfixturevalue("ray_stays")
    calm = {"prompts_per_iteration": 4, "optimizer": CALM}
    made = grid(tmp_path, objectives=["grpo"], settings=calm, budget={"model_rows": 3 * 2 * ROWS})
    here = compare(made, tmp_path / "here")
    sockets = Listening()
    there = compare(made, tmp_path / "there", engine=engine, processes=2, observer=sockets)
    assert sockets.addresses == {"127.0.0.1"}
    assert [cell.status for cell in there.cells] == ["complete"] == [cell.status for cell in here.cells]
    for cell in here.cells:
        one, other = (tmp_path / name / "runs" / cell.id for name in ("here", "there"))
        assert_same_but_for_rounding(one, other)
        assert read_result(other).environment["processes"] == 2
    with pytest.raises(UserError, match="prompts_per_iteration=4 cannot be divided equally between 3 processes"):
        compare(made, tmp_path / "three", processes=3)
    assert not (tmp_path / "three").exists()


def test_a_fault_in_one_of_the_processes_that_share_a_cell_is_one_failed_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_workers(monkeypatch)
    made = grid(tmp_path, "DyingInSecondProcess", objectives=["grpo"])
    (cell,) = compare(made, tmp_path / "out", processes=2).cells
    assert cell.status == "failed"
    assert "rank 1: scorer 'brightness' failed in iteration 2: ConnectionError: the server is gone" in (cell.error or "")


def test_a_process_that_dies_is_one_failed_cell_and_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_workers(monkeypatch)
    log = Log()
    made = grid(tmp_path, objectives=["tests.support.plugins:Killing", "grpo"])
    dead, alive = compare(made, tmp_path / "out", workers=2, observer=log).cells
    assert (dead.status, dead.error) == (
        "failed",
        "its process died (exit code -9); systems do this where memory runs out, so lower --workers or set micro_batch",
    )
    assert alive.status == "complete"
    assert log.progress == {alive.id: pytest.approx([1 / 3, 2 / 3, 1])}


def test_a_comparison_that_is_killed_goes_on(tmp_path: Path) -> None:
    iterations = 5  # a process waits in the third
    made = grid(tmp_path, "Hanging", budget={"model_rows": iterations * ROWS}, settings={"checkpoint_every": 1000})
    out = tmp_path / "out"
    parent = CONTEXT.Process(target=compare, args=(made, out), kwargs={"workers": 2})
    parent.start()
    runs = [out / "runs" / cell.id for cell in made.cells()]
    until(lambda: all((run / "evals.parquet").exists() for run in runs))  # both are training now
    parent.kill()
    until(lambda: all(unlocked(run) for run in runs))
    assert not any((run / "result.json").exists() for run in runs)
    tables = [run / "metrics.parquet" for run in runs]
    assert all(len(pd.read_parquet(file)) < iterations for file in tables if file.exists())  # not before an iteration
    write_task(tmp_path)  # does not wait
    assert {cell.status for cell in compare(made, out).cells} == {"complete"}
    compare(made, tmp_path / "whole")
    for run in runs:
        pd.testing.assert_frame_equal(table(tmp_path / "whole" / "runs" / run.name), table(run), check_exact=True)


def until(holds: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def unlocked(folder: Path) -> bool:
    try:
        with exclusive(folder):
            return True
    except UserError:
        return False


SOFT = {"objectives": {"soft": {"objective": {"clip": 0.2}}}}


def test_a_label_compares_an_objective_under_several_settings(tmp_path: Path) -> None:
    tuned = {"objectives": {"grpo": {"optimizer": {"lr": 0.5}}, **SOFT["objectives"]}}
    made = grid(tmp_path, objectives=["grpo", "soft=grpo"], settings=tuned)
    plain, soft = made.cells()
    assert [cell.id for cell in made.cells()] == ["grpo-fixed_tree-toy-s0", "soft-fixed_tree-toy-s0"]
    assert (soft.config.objective.name, soft.config.objective.title) == ("grpo", "soft")
    assert (plain.config.objective.title, plain.config.resolved()["objective"]) == ("grpo", {"name": "grpo"})
    # The label has the settings of its name, and its own.
    assert (soft.config.optimizer.lr, soft.config.objective.settings) == (0.5, {"clip": 0.2})
    # As a file says it:
    in_file = {"soft": {"objective": {"name": "grpo", "clip": 0.2}}, "grpo": tuned["objectives"]["grpo"]}
    assert grid(tmp_path, objectives=["grpo", "soft"], settings={"objectives": in_file}) == made
    record = compare(made, tmp_path / "out")
    assert [(cell.objective, cell.status) for cell in record.cells] == [("grpo", "complete"), ("soft", "complete")]
    results = read_results(tmp_path / "out")
    assert [run.cell for run in results.runs] == ["grpo x fixed_tree", "soft x fixed_tree"]
    assert set(results.runs_frame["objective"]) == {"grpo", "soft"}
    assert results.notes == []


def test_a_label_takes_what_the_preset_has_for_its_name(tmp_path: Path) -> None:
    made = grid(
        tmp_path, objectives=["tmpo", "hot=tmpo"], preset="quick", settings={"objectives": {"hot": {"objective": {"beta": 9}}}}
    )
    plain, hot = (cell.config.objective.settings for cell in made.cells())
    assert hot == {**plain, "beta": 9}
    assert "advantage" in plain


def test_samplers_have_labels_too(tmp_path: Path) -> None:
    samplers = {
        "fixed_tree": {"sampler": {"steps": 4, "levels": 1, "children": 2, "splits": [1]}},
        "wide": {"sampler": {"children": 3}},
    }
    made = grid(tmp_path, objectives=["grpo"], samplers=["fixed_tree", "wide=fixed_tree"], settings={"samplers": samplers})
    assert [cell.id for cell in made.cells()] == ["grpo-fixed_tree-toy-s0", "grpo-wide-toy-s0"]
    assert made.cells()[1].config.sampler.settings == {"steps": 4, "levels": 1, "children": 3, "splits": [1]}


def test_the_command_of_a_comparison_makes_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "objectives": {"soft": {"objective": {"clip": 1e-5}, "ema": None}},
        "optimizer": {"betas": [0.8, 1e-3]},
        "scorer_url": "http://a:1/b c",
    }
    first = grid(tmp_path, objectives=["grpo", "soft=grpo"], seeds=[3], settings=settings)
    dotted = grid(
        tmp_path,
        objectives=["tests.support.plugins:Failing"],
        settings={"objectives": {"tests.support.plugins:Failing": {"optimizer": {"lr": 0.5}}}},
    )
    found = []

    def stopped(grid: Grid, *_: Any, **__: Any) -> None:
        found.append(grid)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "compare", stopped)
    for made in (first, dotted):
        done = CliRunner().invoke(app, [*shlex.split(command_of(made))[1:], "--out", str(tmp_path / "new")])
        assert done.exit_code == 130, done.output
    assert found == [first, dotted]


@pytest.mark.usefixtures("without_plots")
def test_the_command_that_a_report_prints_gives_the_same_numbers_in_a_fresh_folder(tmp_path: Path) -> None:
    choice: dict[str, Any] = {
        "backbone": "gaussian_mixture",
        "tasks": ["rare_mode"],
        "seeds": [3],
        "budget": {"model_rows": 2000},
    }
    few = {"prompts": 2, "images_per_prompt": 100, "steps": 4}  # points: with fewer a front takes more sets of them
    settings = {"evaluation": few, "optimizer": {"betas": [0.8, 1e-3]}, "backbone": COARSE}
    soft = {"objectives": {"soft": {"objective": {"clip": 1e-5}, "ema": None}}}
    first = tmp_path / "first"
    compare(grid(tmp_path, objectives=["grpo"], settings=settings, **choice), first)
    compare(grid(tmp_path, objectives=["grpo", "soft=grpo"], settings=settings | soft, **choice), first)  # added later
    report.write_report(first)
    (printed,) = re.findall("<pre>(.*?)</pre>", (first / "report.html").read_text(), re.DOTALL)
    pasted = f"{html.unescape(printed).strip()} --out again"
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shell = in_a_process(["sh", "-c", f"alignbench() {{ printf '%s\\0' \"$@\"; }}; {pasted}"], fresh)
    found = in_this_process(*shell.stdout.removesuffix("\0").split("\0"), cwd=fresh)
    assert found.returncode == 0, found.stderr
    runs = sorted(run.name for run in (first / "runs").iterdir())
    assert runs == sorted(run.name for run in (fresh / "again" / "runs").iterdir())
    for run in runs:
        assert_same_numbers(first / "runs" / run, fresh / "again" / "runs" / run)


def assert_same_numbers(one: Path, other: Path) -> None:
    """To the last bit, in all that a run leaves; what it took, when, and who called it aside."""
    pd.testing.assert_frame_equal(table(one), table(other), check_exact=True)
    for name in ("evals", "distributions"):
        left, right = (pd.read_parquet(folder / f"{name}.parquet") for folder in (one, other))
        pd.testing.assert_frame_equal(left, right, check_exact=True)
    found = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for record in found:
        del record["run"]["started"], record["environment"]["command"]
        del record["budget"]["peak_memory_bytes"], record["budget"]["seconds_by_phase"]
        del record["budget"]["seconds"], record["budget"]["seconds_evaluation"]
    assert found[0] == found[1]


def test_settings_of_one_name_reach_its_cells_alone(tmp_path: Path) -> None:
    made = grid(tmp_path, settings={"objectives": {"grpo": {"objective": {"clip": 0.2}, "optimizer": {"lr": 0.5}}}})
    tmpo, grpo = (cell.config for cell in made.cells())
    assert grpo.objective.settings["clip"] == 0.2
    assert "clip" not in tmpo.objective.settings
    assert (tmpo.optimizer.lr, grpo.optimizer.lr) == (1e-4, 0.5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"settings": {"objectives": {"gpro": {}}}}, r"objectives\.gpro has settings but is not compared; did you mean 'grpo'"),
        ({"settings": {"objective": {"beta": 1}}}, r"objectives from --objectives, and settings from objectives\.NAME"),
        ({"settings": {"seed": 3}}, "seeds from --seeds"),
        ({"settings": {"iterations": 3}}, "by its budget; leave out iterations"),
        ({"settings": {"prompts_per_iterations": 3}}, "did you mean 'prompts_per_iteration'"),
        ({"budget": {"model_row": 3}}, "did you mean .*'model_rows'"),
        ({"objectives": ["tmpo", "gpro"]}, "did you mean 'grpo'"),
        ({"samplers": ["fixed_tree", "fixed_three"]}, "did you mean 'fixed_tree'"),
        ({"tasks": ["orc"]}, "did you mean 'ocr'"),
        ({"objectives": ["grpo", "soft=gpro"]}, "did you mean 'grpo'"),
        ({"objectives": ["grpo", "=grpo"]}, "takes names, or label=name, with commas; got '=grpo'"),
        ({"objectives": ["a=grpo", "a=tmpo"]}, "has a twice; choose another label"),
        (
            {"objectives": ["ppo=grpo"]},
            r"objectives\.ppo names grpo, but ppo is already one of the objectives; choose another",
        ),
        ({"objectives": ["a b=grpo"]}, r"objective\.label: string should match pattern"),
        ({"objectives": ["grpo", "soft=grpo"]}, "grpo x fixed_tree and soft x fixed_tree have identical settings; say how"),
        ({"settings": {"samplers": {"fixed_tree": 3}}}, r"samplers holds settings by name, such as samplers\.fixed_tree\.opt"),
        ({"settings": {"trackers": "tensorbord"}}, "should be 'tensorboard' or 'wandb'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(tmp_path: Path, changes: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        grid(tmp_path, **changes)


def test_cells_of_other_settings_and_folders_of_other_things_are_refused(tmp_path: Path) -> None:
    compare(grid(tmp_path), tmp_path / "out")
    with pytest.raises(
        UserError, match=r"tmpo-fixed_tree-toy-s0 was run with other settings: budget\.model_rows 66 \(now 88\)"
    ):
        compare(grid(tmp_path, budget={"model_rows": 88}), tmp_path / "out")
    (tmp_path / "eval.txt").write_text((tmp_path / "eval.txt").read_text().replace("eval 5", "other 5"))
    with pytest.raises(UserError, match=r"the evaluation prompts changed since .*tmpo-fixed_tree-toy-s0 was made; restore"):
        compare(read_grid(tmp_path / "out"), tmp_path / "out")
    with pytest.raises(
        UserError, match="out also compares tmpo-fixed_tree-toy-s0: name objectives tmpo too, or choose another"
    ):
        compare(grid(tmp_path, objectives=["grpo", "vargrad"]), tmp_path / "out")
    everything = "toy-s0, grpo-fixed_tree-toy-s0: name tasks .*toy.yaml and seeds 0 too, or choose another --out"
    with pytest.raises(UserError, match=everything):
        compare(grid(tmp_path, backbone="gaussian_mixture", tasks=["rare_mode"], seeds=[1]), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="mine exists and holds no comparison"):
        compare(grid(tmp_path), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_two_comparisons_do_not_work_in_one_folder(tmp_path: Path) -> None:
    compare(grid(tmp_path), tmp_path / "out")
    with exclusive(tmp_path / "out"), pytest.raises(UserError, match="another process is using"):
        compare(grid(tmp_path), tmp_path / "out")


def test_the_estimate_divides_the_budget_by_the_rows(tmp_path: Path) -> None:
    costs = expected_costs(grid(tmp_path, objectives=["tmpo", "grpo", "none"]), tmp_path / "out").methods
    assert [(c.method.objective, c.rows, c.iterations) for c in costs] == [
        ("tmpo", ROWS, 3),
        ("grpo", ROWS, 3),
        ("none", ROWS, 0),
    ]
    assert all(np.isfinite(c.seconds) and c.seconds > 0 for c in costs)


@pytest.mark.usefixtures("without_plots")
def test_the_command_plans_runs_and_goes_on(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"evaluation": {"prompts": 4, "images_per_prompt": 2}, "save_images": False, "threads": 1})
    )
    words = [
        "compare", "--objectives", "grpo", "--samplers", "independent", "--tasks", str(task), "--seeds", "4,2",
        "--preset", "smoke", "--backbone", "tests.support.plugins:ToyPolicy", "--config", "config.yaml", "--out", "out",
    ]  # fmt: skip
    planned = in_this_process(*words, "--dry-run", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    # 2 iterations of two prompts: 4 chains of 4 steps, 3 of them stochastic.
    assert "model_rows 112" in planned.stdout
    assert "1 method x 1 task x 2 seeds = 2 cells, of which 0 are done" in planned.stdout
    assert not (tmp_path / "out").exists()
    ran = in_this_process(*words, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "2/2  grpo-independent-toy-s2  done" in ran.stderr
    again = in_this_process("compare", "--out", "out", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "s2  done" not in again.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--objectives", "grpo"], "compare needs --objectives and --samplers"),
        (["--objectives", "grpo", "--samplers", "independent", "--seeds", "many"], "--seeds takes a number of seeds"),
        (["--objectives", "grpo", "--samplers", "independent", "--out", "out", "--engine", "rai"], "did you mean 'ray'"),
        (["--out", "nowhere"], "cannot read the comparison nowhere/comparison.yaml"),
    ],
)
def test_slips_on_the_command_line_are_one_sentence(tmp_path: Path, words: list[str], sentence: str) -> None:
    found = in_this_process("compare", *words, cwd=tmp_path)
    assert found.returncode == 2
    assert sentence in found.stderr
    assert found.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_seeds_are_added_to_a_comparison_and_its_cells_stay(tmp_path: Path) -> None:
    compare(grid(tmp_path, objectives=["grpo"]), tmp_path / "out")
    more = with_seeds(read_grid(tmp_path / "out"), [0, 1])
    before = (tmp_path / "out" / "runs" / grid(tmp_path, objectives=["grpo"]).cells()[0].id / "result.json").read_bytes()
    record = compare(more, tmp_path / "out")
    assert [(cell.seed, cell.status) for cell in record.cells] == [(0, "complete"), (1, "complete")]
    assert (tmp_path / "out" / "runs" / record.cells[0].id / "result.json").read_bytes() == before


def test_the_configuration_of_a_run_is_compared_with_its_settings(tmp_path: Path) -> None:
    options = {"objective": {"name": "grpo", "clip": 0.3}, "sampler": {"name": "independent", "steps": 4}, "seed": 7}
    config = load_config(preset="smoke", options={**options, "backbone": "gaussian_mixture", "iterations": 4})
    (tmp_path / "config.yaml").write_text(to_yaml(config.resolved()))
    planned = plan_grid(read_request(tmp_path / "config.yaml").with_options(seeds=[3]))
    (cell,) = planned.cells()
    same = {key for key, value in config.resolved().items() if cell.config.resolved()[key] == value}
    assert {*config.resolved()} - same == {"seed", "iterations", "budget", "threads"}
    assert planned.budget.model_rows is not None
