from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from alignbench import UserError
from alignbench.backbone import PointDistribution
from alignbench.backbones.mixture import distributions
from alignbench.comparison.study import (
    FILE,
    TARGET,
    Study,
    _refuse_other_study,
    at_kl,
    cells_frame,
    equal_kl_frame,
    first_crossing,
    jobs,
    method_frame,
    modes_frame,
    read_study,
    run,
    runs_frame,
    sampler_frame,
)
from alignbench.records.results import BASE, read_results
from alignbench.reports.comparison_plots import kept_laws
from alignbench.reports.study_report import method, write_study

SMALL: dict[str, Any] = {
    "description": "a few cells",
    "grid": {
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


def study(**changes: Any) -> Study:
    return Study.model_validate({**SMALL, **changes})


def write(folder: Path, content: dict[str, Any]) -> Path:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def frame(rows: list[tuple[str, str, str, str, int, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["part", "task", "objective", "sampler", "seed", "js"])


def test_a_part_is_the_grid_with_its_own_keys() -> None:
    both = study()
    frozen = both.part("frozen")
    assert (frozen.objectives, frozen.samplers, frozen.tasks) == (["tmpo"], ["independent"], ["rare_mode"])
    (cell, *_) = frozen.cells()
    assert cell.config.objective.settings["reference"] == "frozen"
    assert cell.config.backbone.settings["quadrature"] == 10
    assert cell.config.objective.settings["beta_warmup"] == 0
    # What one part changes must not reach into the grid of the others.
    assert both.part("all").settings["objectives"] == {"tmpo": {"objective": {"beta_warmup": 0}}}


def test_an_objective_goes_by_its_label(tmp_path: Path) -> None:
    soft = {"objectives": ["soft"], "samplers": ["independent"], "seeds": [0]}
    small = study(parts={"one": {**soft, "settings": {"objectives": {"soft": {"objective": {"name": "grpo", "clip": 0.2}}}}}})
    assert run(small, tmp_path / "out") == []
    assert list(runs_frame(small, tmp_path / "out")["objective"]) == [BASE, "soft"]


def test_jobs_go_seed_by_seed(tmp_path: Path) -> None:
    names = [job.name for job in jobs(study(), tmp_path)]
    assert names == [f"{part}, rare_mode, seed {seed}" for seed in (0, 1) for part in ("all", "frozen")]
    (only, *_) = jobs(study(), tmp_path, seeds=[7])
    assert (only.grid.seeds, only.folder) == ([7], tmp_path / "runs" / "all" / "rare_mode" / "s7")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"part": {}}, "did you mean 'parts'"),
        ({"parts": {"other": {"objectivs": ["grpo"]}}}, r"part 'other' of the study: .*did you mean 'objectives'"),
        ({"parts": {"other": {"objectives": ["gpro"]}}}, "did you mean 'grpo'"),
        ({"parts": {}}, "parts"),
        ({"parts": {"../../../escaped": {}}}, r"a folder of its name, which '\.\./\.\./\.\./escaped' cannot be"),
        ({"parts": {"..": {}}}, r"which '\.\.' cannot be"),
    ],
)
def test_slips_are_told_before_anything_runs(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_study(write(tmp_path, {**SMALL, **changes}))


def test_shipped_studies_can_be_read() -> None:
    files = sorted((Path(__file__).parents[3] / "results" / "gaussian_mixture").glob("*.yaml"))
    assert {file.stem for file in files} == {"ablations", "equal_kl", "sharing", "study"}
    of_study = jobs(read_study(files[-1]), Path("nowhere"))
    # Ten objectives and TMPO with a frozen reference, three samplers, seven scenarios, five seeds.
    assert sum(len(job.grid.objectives) * len(job.grid.samplers) for job in of_study) == 11 * 3 * 7 * 5


def test_a_study_runs_goes_on_and_writes_its_tables_and_pictures(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    read = read_study(write(tmp_path, SMALL))
    assert run(read, tmp_path / "out", seeds=[0], advance=lambda *what: told.append(what)) == []
    assert [(done, total) for _, done, total in told] == [(1, 2), (2, 2)]
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("result.json")}
    assert len(before) == 2 + 1
    assert run(read, tmp_path / "out") == []
    assert {f: f.stat().st_mtime_ns for f in before} == before
    table = runs_frame(read, tmp_path / "out")
    assert len(table) == 2 * 3 + 1
    assert table["objective"].tolist() == [BASE, *["grpo"] * 4, "tmpo", "tmpo"]
    assert table["sampler"].tolist()[1:5] == ["independent", "independent", "fixed_tree", "fixed_tree"]
    found = {file.name for file in write_study(tmp_path / "out", "alignbench study mine.yaml")}
    assert {
        "runs.csv",
        "cells.csv",
        "samplers.csv",
        "methods.csv",
        "equal_kl.csv",
        "modes.csv",
        "summary.md",
        "price.png",
    } <= found
    assert "laws_rare_mode.png" in found
    # The budget ends tmpo's run in its first iteration, before any snapshot.
    trained = {f"training_grpo_x_{sampler}_rare_mode_seed_0.png" for sampler in ("independent", "fixed_tree")}
    assert {name for name in found if name.startswith("training")} == trained
    results = read_results(tmp_path / "out" / "runs" / "all")
    assert set(kept_laws(results, results.setups[0])) == {("grpo", "fixed_tree"), ("grpo", "independent")}
    text = (tmp_path / "out" / "report" / "summary.md").read_text()
    assert "6 runs, seeds 0, 1" in text
    assert "| frozen: tmpo x independent |" in text
    assert "| grpo x fixed_tree |" in text
    assert "| grpo | independent | fixed_tree | " in text
    assert "## Methods: minus `grpo` with the same sampler" in text
    with pytest.raises(UserError, match=r"holds part .all. with other settings \(budget\)"):
        run(study(grid={**SMALL["grid"], "budget": {"model_rows": 90}}), tmp_path / "out")


def test_failed_cells_are_told_and_the_others_counted(tmp_path: Path) -> None:
    failing = study(parts={"all": {"objectives": ["tests.support.plugins:Failing", "grpo"], "samplers": ["fixed_tree"]}})
    failed = run(failing, tmp_path / "out", seeds=[0])
    assert len(failed) == 1
    assert "a fault of the plug-in" in failed[0]
    assert len(runs_frame(failing, tmp_path / "out")) == 1 + 1


def test_another_study_does_not_take_the_place_of_one(tmp_path: Path) -> None:
    """Parts, objectives and seeds can be added; a part that is left out or has other settings is refused."""
    first = study(parts={"plain": {}})
    (tmp_path / FILE).write_text(yaml.safe_dump(first.model_dump(mode="json")))
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(UserError, match=r"holds another study, with a part 'plain'; choose another --out"):
        run(study(parts={"other": {}}), tmp_path)
    with pytest.raises(UserError, match=r"holds part 'plain' with other settings \(preset\)"):
        run(study(parts={"plain": {"preset": "quick"}}), tmp_path)
    assert (tmp_path / FILE).read_bytes() == before
    more = study(parts={"plain": {"seeds": [0, 1, 2], "settings": {"save_images": True}}, "other": {}})
    _refuse_other_study(more, tmp_path)


def test_folders_of_other_things_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no study"):
        run(study(), tmp_path)
    with pytest.raises(UserError, match="no finished run"):
        runs_frame(study(), tmp_path)


def test_means_over_tasks_are_taken_seed_by_seed() -> None:
    runs = frame([("p", t, "o", "s", seed, value) for t, seed, value in (("a", 0, 1.0), ("b", 0, 2.0), ("a", 1, 3.0))])
    found: Any = cells_frame(runs, ["js"]).set_index("task")
    assert found.loc["a", "value"] == 2.0
    # Student's with one degree of freedom: t(0.975) = 12.7062, standard error sqrt 2 / sqrt 2 = 1.
    assert found.loc["a", "upper"] == pytest.approx(2 + 12.7062, abs=1e-3)
    assert (found.loc["all", "value"], found.loc["all", "n"]) == (1.5, 1)  # seed 1 lacks task b


def test_methods_are_tested_against_the_base_model() -> None:
    better = [("p", "a", "o", "s", seed, value) for seed, value in enumerate([1.5, 1.6, 1.7])]
    same = [("p", "a", "dull", "s", seed, 1.0) for seed in range(3)]
    found: Any = (
        cells_frame(frame([("", "a", BASE, "", 0, 1.0), *better, *same]), ["js"]).query("task == 'a'").set_index("objective")
    )
    # Differences 0.5, 0.6, 0.7: mean 0.6, standard error 0.1 / sqrt 3, t = 10.392 with two degrees of freedom.
    assert found.loc["o", "p"] == pytest.approx(0.00913, abs=1e-4)
    assert np.isnan(found.loc["dull", "p"])  # without spread there is no test, and none that counts for Holm
    assert np.isnan(found.loc[BASE, "p"])
    assert found.loc["o", "p_holm"] == found.loc["o", "p"]


def test_samplers_are_compared_seed_by_seed() -> None:
    values = {("x", 0): 1.0, ("x", 1): 2.0, ("x", 2): 4.0, ("y", 0): 1.5, ("y", 1): 2.6, ("y", 2): 4.7}
    runs = frame([("p", "a", "o", sampler, seed, value) for (sampler, seed), value in values.items()])
    (row,) = sampler_frame(runs, ["js"]).to_dict("records")
    assert (row["first"], row["second"], row["metric"], row["n"]) == ("x", "y", "js", 3)
    assert row["value"] == pytest.approx(0.6)
    assert row["p"] == pytest.approx(0.00913, abs=1e-4)
    assert row["p_holm"] == row["p"]


def test_methods_are_compared_with_the_first_one_that_has_the_same_sampler() -> None:
    of_method = {("all", "o"): (1.0, 2.0, 4.0), ("all", "other"): (1.5, 2.6, 4.7), ("changed", "o"): (0.9, 2.0, 4.3)}
    rows = [
        (part, "a", objective, sampler, seed, value + shift)
        for (part, objective), values in of_method.items()
        for sampler, shift in (("x", 0.0), ("y", 10.0))
        for seed, value in enumerate(values)
        if (objective, sampler, seed) != ("other", "y", 2)
    ]
    found: Any = method_frame(frame([("", "a", BASE, "", 0, 9.0), *rows]), ["js"]).set_index(["part", "objective", "sampler"])
    assert list(found.index) == [(*m, sampler) for m in (("all", "other"), ("changed", "o")) for sampler in ("x", "y")]
    assert found["value"].tolist() == pytest.approx([0.6, 0.55, 0.2 / 3, 0.2 / 3])
    assert found["n"].tolist() == [3, 2, 3, 3]  # a seed that one of the two lacks is no pair
    assert found.loc[("all", "other", "x"), "p"] == pytest.approx(0.00913, abs=1e-4)
    assert found.loc[("all", "other", "x"), "p_holm"] == pytest.approx(4 * found.loc[("all", "other", "x"), "p"])


def test_the_mass_of_each_mode_is_a_mean_over_seeds(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for seed, first_mode in enumerate([0.9, 0.6]):
        folder = tmp_path / f"r{seed}"
        folder.mkdir()
        parts = [(distributions.TARGET, 0.5), (0, 0.2), (7, first_mode)]
        table = pd.concat(
            distributions.as_rows(PointDistribution(np.zeros((2, 2)), np.array([mass, 1 - mass]), np.array([0, 1])), iteration)
            for iteration, mass in parts
        )
        table.to_parquet(folder / distributions.FILE)
        rows.append({"part": "p", "task": "a", "objective": "o", "sampler": "s", "seed": seed, "folder": folder})
    found: Any = modes_frame(pd.DataFrame(rows)).set_index(["objective", "mode"])
    assert [found.loc[(name, 0), "value"] for name in (TARGET, BASE, "o")] == pytest.approx([0.5, 0.2, 0.75])
    assert found.loc[("o", 1), "value"] == pytest.approx(0.25)
    # Student's with one degree of freedom: t(0.975) = 12.7062, standard error 0.15.
    assert found.loc[("o", 0), "upper"] == pytest.approx(0.75 + 12.7062 * 0.15, abs=1e-3)
    assert modes_frame(pd.DataFrame([{**rows[0], "folder": tmp_path}])).empty


def test_the_first_crossing_is_interpolated() -> None:
    path = np.array([[0.0, 10.0], [1.0, 20.0], [0.5, 0.0], [3.0, 50.0]])
    assert first_crossing(path, 0.5).tolist() == [0.5, 15.0]
    assert first_crossing(path, 2.0).tolist() == pytest.approx([2.0, 30.0])  # between 0.5 and 3: 0.6 of the way
    assert np.isnan(first_crossing(path, 4.0)).all()
    assert first_crossing(np.array([[0.3, 10.0], [1.0, 20.0]]), 0.2).tolist() == [0.3, 10.0]


def test_a_level_that_was_leapt_over_was_not_seen() -> None:
    path = np.array([[0.01, 10.0], [4.0, 20.0]])
    assert np.isnan(first_crossing(path, 0.3)).all()
    assert np.isnan(first_crossing(path, 1.9)).all()
    assert first_crossing(path, 2.1).tolist() == pytest.approx([2.1, 10 + 10 * 2.09 / 3.99])  # 4 is within a factor of two
    assert first_crossing(path, 0.02).tolist() == pytest.approx([0.02, 10 + 10 * 0.01 / 3.99])


def test_equal_kl_counts_the_runs_that_come_so_far(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"part": "", "task": "a", "objective": BASE, "sampler": "", "seed": 0, "kl_base": 0.0, "js": 0.2, "folder": None}
    ]
    for seed, (middle, end) in enumerate([(0.5, 1.0), (0.2, 0.3)]):
        folder = tmp_path / f"r{seed}"
        folder.mkdir()
        measured = {"measured_kl_base": [np.nan, middle], "measured_js": [np.nan, 0.3]}
        pd.DataFrame(measured).to_parquet(folder / "metrics.parquet")
        run_of = {"part": "p", "task": "a", "objective": "o", "sampler": "s", "seed": seed, "kl_base": end, "js": 0.5}
        rows.append({**run_of, "folder": folder})
    at = at_kl(pd.DataFrame(rows), [0.25, 0.75], ["js", "kl_base"])
    assert at["kl"].tolist() == [0.25, 0.75] * 2
    found: Any = equal_kl_frame(at).set_index("kl")
    # Halfway to the first run's snapshot, and halfway from the second's to its end.
    assert found.loc[0.25, "value"] == pytest.approx((0.25 + 0.4) / 2)
    assert (found.loc[0.25, "n"], found.loc[0.25, "runs"]) == (2, 2)
    assert found.loc[0.75, "value"] == pytest.approx(0.4)
    assert (found.loc[0.75, "n"], found.loc[0.75, "runs"]) == (1, 2)
    assert found["metric"].tolist() == ["js", "js"]
    assert equal_kl_frame(at_kl(pd.DataFrame(rows), [], ["js"])).empty


def test_names_of_methods() -> None:
    row = {"part": "all", "objective": "tmpo", "sampler": "independent"}
    assert method(study(), row) == "tmpo x independent"
    assert method(study(), {**row, "part": "frozen"}) == "frozen: tmpo x independent"
    assert method(study(), {"part": "", "objective": BASE, "sampler": ""}) == BASE
