"""Comparisons with parts: several grids over the same records."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from alignbench import UserError
from alignbench.comparison.grid import Grid, read_grid
from alignbench.comparison.planning import command_of, plan_grid, read_request
from alignbench.comparison.reading import read_results
from alignbench.comparison.results import BASE
from alignbench.comparison.runner import check_folder, compare
from alignbench.reports.report import write_report

SMALL: dict[str, Any] = {
    "description": "a few cells",
    "objectives": ["grpo"],
    "samplers": ["independent", "fixed_tree"],
    "tasks": ["rare_mode"],
    "seeds": [0, 1],
    "backbone": "gaussian_mixture",
    "preset": "smoke",
    "budget": {"model_rows": 60},
    "threads": 1,
    "settings": {
        "backbone": {"name": "gaussian_mixture", "quadrature": 10},
        "evaluation": {"prompts": 2, "images_per_prompt": 4, "steps": 4},
        "snapshots": 1,
        "objectives": {"tmpo": {"objective": {"beta_warmup": 0}}},
    },
    "parts": {
        "all": {},
        "frozen": {
            "objectives": ["tmpo"],
            "samplers": ["independent"],
            "settings": {"objectives": {"tmpo": {"objective": {"reference": "frozen"}}}},
        },
    },
    "metrics": ["js_target", "exact_reward", "kl_base"],
    "kl_levels": [0.001],
}
CELLS = ["all-grpo-independent-rare_mode", "all-grpo-fixed_tree-rare_mode", "frozen-tmpo-independent-rare_mode"]


def planned(folder: Path, **changes: Any) -> Grid:
    """The grid of a file that holds `SMALL` with these keys changed; settings of tmpo go with the part that compares it."""
    file, content = folder / "mine.yaml", {**SMALL, **changes}
    if "frozen" not in content["parts"]:
        content["settings"] = {key: value for key, value in content["settings"].items() if key != "objectives"}
    file.write_text(yaml.safe_dump(content))
    return plan_grid(read_request(file))


def test_a_part_is_the_grid_with_its_own_keys(tmp_path: Path) -> None:
    grid = planned(tmp_path)
    frozen = grid.part("frozen")
    assert (frozen.objectives, frozen.samplers, frozen.tasks) == (["tmpo"], ["independent"], ["rare_mode"])
    (cell, *_) = frozen.cells()
    assert cell.config.objective.settings["reference"] == "frozen"
    assert cell.config.backbone.settings["quadrature"] == 10
    assert cell.config.objective.settings["beta_warmup"] == 0
    # What one part changes must not reach into the grid of the others.
    assert grid.part("all").settings["objectives"] == {"tmpo": {"objective": {"beta_warmup": 0}}}


def test_cells_go_seed_by_seed_and_begin_with_their_part(tmp_path: Path) -> None:
    grid = planned(tmp_path)
    assert [cell.id for cell in grid.cells()] == [f"{cell}-s{seed}" for seed in (0, 1) for cell in CELLS]
    assert [str(method) for method in grid.methods()][-1] == "frozen: tmpo x independent"


def test_parts_have_labels_seeds_and_tasks_of_their_own(tmp_path: Path) -> None:
    soft = {"objectives": ["soft=grpo"], "settings": {"objectives": {"soft": {"objective": {"clip": 0.2}}}}, "seeds": [7]}
    grid = planned(tmp_path, parts={"soft": {**soft, "tasks": ["equal_modes"], "samplers": ["independent"]}, "all": {}})
    last = grid.cells()[-1]
    assert last.id == "soft-soft-independent-equal_modes-s7"
    assert (last.config.objective.name, last.config.objective.settings["clip"], last.config.task) == (
        "grpo",
        0.2,
        "equal_modes",
    )
    assert len(grid.cells()) == 1 + 2 * 2


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ("tmpo", "grpo x fixed_tree", ("tmpo x independent", "grpo x fixed_tree")),
        ("all: grpo x independent", "frozen: tmpo", ("grpo x independent", "tmpo x independent")),
    ],
)
def test_planned_contrasts_get_the_names_that_the_report_has(
    tmp_path: Path, first: str, second: str, names: tuple[str, str]
) -> None:
    (found,) = planned(tmp_path, contrasts=[{"first": first, "second": second, "matters": 0.2}]).contrasts
    assert (found.first, found.second, found.metric, found.matters) == (*names, None, 0.2)


def test_a_pair_that_an_earlier_part_has_too_is_named_with_its_part(tmp_path: Path) -> None:
    clipped = {"samplers": ["independent"], "settings": {"objectives": {"grpo": {"objective": {"clip": 0.2}}}}}
    parts = {"all": {"samplers": ["independent"]}, "clipped": clipped}
    for second in ("all: grpo", "grpo x independent"):
        (found,) = planned(tmp_path, parts=parts, contrasts=[{"first": "clipped: grpo", "second": second}]).contrasts
        assert (found.first, found.second) == ("clipped: grpo x independent", "grpo x independent")
    with pytest.raises(UserError, match="'grpo' may be 'grpo x independent' or 'clipped: grpo x independent'"):
        planned(tmp_path, parts=parts, contrasts=[{"first": "clipped: grpo", "second": "grpo"}])


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        ("tmpoo", "grpo x fixed_tree", "contrasts: nothing that is compared is called 'tmpoo'; did you mean 'tmpo'"),
        ("tmpo", "grpo", "contrasts: 'grpo' may be 'grpo x independent' or 'grpo x fixed_tree'; name one of them"),
        ("tmpo", "tmpo x independent", "contrasts: 'tmpo' and 'tmpo x independent' are one method; name two"),
    ],
)
def test_a_planned_contrast_needs_two_methods_that_are_compared(tmp_path: Path, first: str, second: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        planned(tmp_path, contrasts=[{"first": first, "second": second}])


def test_a_comparison_file_without_parts_and_a_file_of_settings_are_told_apart(tmp_path: Path) -> None:
    grid = planned(tmp_path, parts={}, description="", metrics=[], kl_levels=[], settings={})
    assert grid.cells()[0].id == "grpo-independent-rare_mode-s0"
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"optimizer": {"lr": 0.5}, "objectives": {"grpo": {"ema": None}}}))
    request = read_request(file)
    assert (request.objectives, request.settings) == (None, {"optimizer": {"lr": 0.5}, "objectives": {"grpo": {"ema": None}}})


def test_options_win_over_the_file_and_settings_are_merged(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    request = read_request(file).with_options(seeds=[5], budget=None, settings={"optimizer": {"lr": 0.5}})
    grid = plan_grid(request)
    assert (grid.seeds, grid.budget.model_rows, grid.settings["snapshots"]) == ([5], 60, 1)
    assert {cell.config.optimizer.lr for cell in grid.cells()} == {0.5}


def test_the_command_of_a_grid_with_parts_reads_its_file(tmp_path: Path) -> None:
    grid = planned(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comparison.yaml").write_text(yaml.safe_dump(grid.model_dump(mode="json")))
    command = command_of(grid, tmp_path / "out")
    assert command == f"alignbench compare --config {tmp_path / 'out' / 'comparison.yaml'}"
    assert plan_grid(read_request(tmp_path / "out" / "comparison.yaml")) == grid


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"part": {}}, "did you mean 'parts'"),
        ({"grid": {}}, "is a study of alignbench 0.1; move the keys of `grid` to the top level"),
        ({"parts": {"other": {"objectivs": ["grpo"]}}}, "part 'other': .*did you mean 'objectives'"),
        ({"parts": {"other": {"objectives": ["gpro"]}}}, "did you mean 'grpo'"),
        ({"parts": {"../../../escaped": {}}}, r"which '\.\./\.\./\.\./escaped' cannot; choose another name"),
        ({"parts": {"..": {}}}, r"which '\.\.' cannot"),
        ({"parts": {"a": {}, "b": {}}}, "a: grpo x independent and b: grpo x independent have identical settings"),
        ({"parts": {"a": {"settings": {"objectives": {"tmpoo": {}}}}}}, r"objectives\.tmpoo has settings but is not compared"),
        ({"objectives": []}, "needs objectives: name them with --objectives"),
    ],
)
def test_slips_are_told_before_anything_runs(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        planned(tmp_path, **{**({"parts": {}} if "objectives" in changes else {}), **changes})


def test_shipped_studies_can_be_read() -> None:
    folders = [Path(__file__).parents[3] / "results" / name for name in ("gaussian_mixture", "reference")]
    files = [file for folder in folders for file in sorted(folder.glob("*.yaml"))]
    of_toy = {"ablations", "alpha", "estimators", "known_target", "reached", "sharing"}
    assert {file.stem for file in files} == of_toy | {"geneval", "ocr", "ocr_long", "samplers", "second_model", "tmpo"}
    cells = {file.stem: plan_grid(read_request(file)).cells() for file in files}
    assert all(len(each) == len({cell.id for cell in each}) for each in cells.values())
    # Three objectives on seven scenarios, and TMPO with one tree and with four on two of them; four others with three seeds.
    assert len(cells["reached"]) == (3 * 7 + 2 * 2) * 5 + 4 * 2 * 3
    assert len(cells["known_target"]) == 19 * 2 * 7 * 5
    assert len(cells["alpha"]) == 6 * 7 * 5
    assert len(cells["estimators"]) == 5 * 3 * 2 * 5
    # Trees, the preset matching, independent rollouts and the best of n; strengths count as methods.
    assert len(cells["ocr"]) == ((3 + 1) + (3 + 2) + (3 + 8) + 3) * 5
    assert [len(cells[name]) for name in ("ocr_long", "geneval", "second_model")] == [5 * 5] * 3
    assert [len(cells[name]) for name in ("tmpo", "samplers")] == [15 * 5, 2 * 3 * 2 * 5]


def test_contrasts_that_were_set_after_results_say_so(tmp_path: Path) -> None:
    out, contrasts = tmp_path / "out", [{"first": "tmpo", "second": "grpo x independent", "metric": "js_target"}]
    small: dict[str, Any] = {"seeds": [0], "samplers": ["independent"]}
    assert compare(planned(tmp_path, **small), out).complete_before_contrasts == 0
    later = compare(planned(tmp_path, **small, contrasts=contrasts), out)
    assert later.complete_before_contrasts == len(later.cells) == 2
    assert read_results(out).complete_before_contrasts == 2
    # With the same contrasts the number stays, and contrasts of a new folder precede its runs.
    assert compare(planned(tmp_path, **{**small, "seeds": [0, 1]}, contrasts=contrasts), out).complete_before_contrasts == 2
    assert compare(planned(tmp_path, **small, contrasts=contrasts), tmp_path / "new").complete_before_contrasts == 0
    assert compare(planned(tmp_path, **small, contrasts=contrasts), tmp_path / "new").complete_before_contrasts == 0


def test_parts_run_resume_and_are_one_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = compare(planned(tmp_path, seeds=[0]), out)
    assert [(cell.part, cell.status) for cell in record.cells] == [("all", "complete")] * 2 + [("frozen", "complete")]
    before = {file: file.stat().st_mtime_ns for file in out.rglob("result.json")}
    compare(planned(tmp_path), out)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert read_grid(out) == planned(tmp_path)
    results = read_results(out)
    assert len(results.runs) == 6
    assert results.notes == []
    assert list(results.cells_frame["cell"].unique()) == [
        BASE,
        "grpo x independent",
        "grpo x fixed_tree",
        "tmpo x independent",
    ]
    names = {str(file.relative_to(out)) for file in write_report(out)}
    tables = {"samplers", "methods", "equal_kl", "modes"}
    assert {f"tables/{name}.csv" for name in tables} | {"plots/reward_kl.png", "plots/distributions.png"} <= names
    assert "tables/over_tasks.csv" not in names  # there is one task
    text = (out / "report.md").read_text()
    assert "a few cells" in text
    assert "### Differences to grpo" in text
    assert "| tmpo x independent |" in text
    assert "| grpo | independent | fixed_tree |" in text
    assert "Where the KL to the base model first reaches 0.001, rare_mode" in text


def test_what_was_run_is_neither_left_out_nor_run_with_other_settings(tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(planned(tmp_path, seeds=[0], parts={"all": {"samplers": ["independent"]}}), out)
    with pytest.raises(UserError, match="out also compares all-grpo-independent-rare_mode-s0: name parts all too"):
        check_folder(planned(tmp_path, parts={"other": {}}).cells(), out)
    with pytest.raises(UserError, match=r"was run with other settings: budget\.model_rows 60 \(now 90\)"):
        check_folder(planned(tmp_path, parts={"all": {"budget": {"model_rows": 90}}}).cells(), out)
    more = {"all": {"seeds": [0, 1, 2], "settings": {"save_images": True}}, "frozen": SMALL["parts"]["frozen"]}
    check_folder(planned(tmp_path, parts=more).cells(), out)


def test_the_folder_of_a_former_study_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "study.yaml").write_text("grid: {}")
    with pytest.raises(UserError, match=r"old holds a study of alignbench 0\.1, which can be reported on but not resumed"):
        check_folder(planned(tmp_path).cells(), tmp_path / "old")
