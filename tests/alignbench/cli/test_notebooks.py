"""The functions for notebooks, against what the commands write."""

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

import alignbench
from alignbench import RunError, UserError
from tests.alignbench.record_folders import write_run
from tests.support.command_line import ROOT, in_a_process, in_this_process

TOY: dict[str, Any] = {
    "backbone": "gaussian_mixture",
    "tasks": ["rare_mode"],
    "preset": "smoke",
    "front": False,
    "progress": False,
}
SMALL: dict[str, Any] = {"save_images": False, "evaluation": {"prompts": 2}, "backbone": {"quadrature": 16}}


def test_importing_alignbench_loads_nothing_heavy() -> None:
    heavy = "[m for m in ('torch', 'pandas', 'matplotlib', 'typer') if m in sys.modules]"
    code = f"import sys, alignbench; assert 'compare' in alignbench.__all__; assert not {heavy}, {heavy}"
    done = in_a_process([sys.executable, "-c", code], ROOT)
    assert done.returncode == 0, done.stderr


def test_compare_trains_a_grid_and_returns_its_methods(tmp_path: Path) -> None:
    settings = {**SMALL, "objectives": {"grpo": {"optimizer": {"lr": 0.002}}}}
    frame = alignbench.compare(["grpo", "vargrad"], ["independent"], seeds=[4, 7], settings=settings, out=tmp_path / "c", **TOY)
    assert set(frame["cell"]) == {"base model", "grpo x independent", "vargrad x independent"}
    assert frame.attrs["folder"] == str(tmp_path / "c")
    records = [json.loads(file.read_text()) for file in (tmp_path / "c").rglob("result.json")]
    assert sorted(record["run"]["seed"] for record in records) == [4, 4, 7, 7]
    rates = {(r["run"]["objective"], r["config"]["optimizer"]["lr"]) for r in records}
    assert ("grpo", 0.002) in rates
    assert len(rates) == 2
    rewards = [r["metrics"]["exact_reward"]["final"]["value"] for r in records if r["run"]["objective"] == "grpo"]
    row = frame[(frame["cell"] == "grpo x independent") & (frame["metric"] == "exact_reward")]
    assert row["mean"].item() == pytest.approx(sum(rewards) / 2)


def test_cells_that_all_fail_are_an_error_with_the_first_cause(tmp_path: Path) -> None:
    settings = {**SMALL, "optimizer": {"lr": 1e30}}
    with pytest.raises(RunError, match=r"all 1 cells failed; the first: .*optimizer\.lr=1e\+30 .*: lower it"):
        alignbench.compare(["grpo"], ["independent"], seeds=1, settings=settings, out=tmp_path / "c", **TOY)


def test_evaluate_returns_what_the_command_prints(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "task": "rare_mode",
        "settings": {"evaluation": {"prompts": 2, "images_per_prompt": 3}},
        "progress": False,
    }
    frame = alignbench.evaluate("gaussian_mixture", **options)
    sets = ["--set", "evaluation.prompts=2", "--set", "evaluation.images_per_prompt=3"]
    done = in_this_process("eval", "--pipeline", "gaussian_mixture", "--task", "rare_mode", *sets, "--json")
    printed = json.loads(done.stdout)["metrics"]
    assert list(frame["metric"]) == list(printed)
    assert frame["value"].tolist() == pytest.approx([metric["value"] for metric in printed.values()], nan_ok=True)
    assert frame.attrs["protocol"]["images"] == 6


def test_evaluate_reads_images_that_exist(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name, level in (("0.png", 0), ("1.png", 255)):
        Image.new("RGB", (8, 8), (level, level, level)).save(tmp_path / "images" / name)
    (tmp_path / "prompts.txt").write_text("a black square\na white square\n")
    frame = alignbench.evaluate(
        images=tmp_path / "images", prompts=tmp_path / "prompts.txt", evals=["quality"], progress=False
    ).set_index("metric")
    assert frame.loc["brightness", "value"] == 0.5  # one image of 0, one of 1
    assert frame.loc["black_or_white", "value"] == 1.0


def test_evaluate_wants_a_model_or_images() -> None:
    with pytest.raises(UserError, match="a model, or images with prompts"):
        alignbench.evaluate()


def test_report_writes_the_page_and_returns_its_figures(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", objective="grpo", seed=1, reward=(0.3, 0.4))
    before = plt.get_fignums()
    figures = alignbench.report(tmp_path)
    assert (tmp_path / "report.html").is_file()
    assert {"trade_off", "hypervolume"} <= set(figures) == {file.stem for file in (tmp_path / "plots").glob("*.png")}
    assert all(isinstance(figure, Figure) for figure in figures.values())
    assert plt.get_fignums() == before


@pytest.mark.parametrize("rows", ["runs", "methods", "pairs", "prompts", "images", "curves"])
def test_load_results_has_a_frame_of_each_kind(rows: str, tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", objective="grpo")
    frame = alignbench.load_results(tmp_path, rows=rows)  # type: ignore[arg-type]
    assert isinstance(frame, pd.DataFrame)
    assert len(frame) > 0


def test_load_results_gives_differences_of_runs_and_notes(tmp_path: Path) -> None:
    write_run(tmp_path / "a", reward=(0.5, 0.7))
    write_run(tmp_path / "copy", reward=(0.5, 0.7))
    frame = alignbench.load_results(tmp_path)
    row = frame[frame["metric"] == "ocr"]
    assert row["difference"].item() == pytest.approx(0.15)  # 0.6 - 0.45
    assert "repeats cell and seed" in frame.attrs["notes"][0]
    with pytest.raises(UserError, match="there are no rows 'cells'; known: runs, methods"):
        alignbench.load_results(tmp_path, rows="cells")  # type: ignore[arg-type]


def test_the_page_on_notebooks_names_every_function() -> None:
    page = (ROOT / "docs" / "notebooks.md").read_text()
    for name in ("run", "compare", "evaluate", "report", "load_results"):
        assert f"`{name}(" in page
