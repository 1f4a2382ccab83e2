import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from alignbench import UserError
from alignbench.comparison.reading import read_results
from alignbench.comparison.results import BASE
from alignbench.records.diversity import default_diversity
from tests.alignbench.record_folders import write_comparison, write_run


def test_a_cell_is_the_mean_over_its_seeds_with_students_interval(tmp_path: Path) -> None:
    for seed, reward in enumerate([(0.5, 0.7), (0.6, 0.8), (0.7, 0.9)], start=1):
        write_run(tmp_path / "deep" / f"r{seed}", seed=seed, reward=reward)
    frame: Any = read_results(tmp_path).cells_frame.set_index(["cell", "metric"])
    cell = frame.loc[("tmpo x independent", "ocr")]
    # Means 0.6, 0.7, 0.8: deviation 0.1, standard error 0.1 / sqrt 3, t(0.975, 2) = 4.302653
    assert cell["mean"] == pytest.approx(0.7)
    assert cell["sd"] == pytest.approx(0.1)
    assert cell["mean_upper"] - 0.7 == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    assert (cell["mean_n"], cell["over"]) == (3, "seeds")
    assert cell["iqm"] == pytest.approx(0.7)  # .5 .6 .7 | .7 .8 .9 without one at each end
    assert cell["difference"] == pytest.approx(0.25)
    assert cell["model_rows"] == 150
    base = frame.loc[(BASE, "ocr")]
    assert base["mean"] == pytest.approx(0.45)
    assert (base["mean_n"], base["over"]) == (2, "prompts")


def test_the_interval_of_one_seed_is_over_prompts_and_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "r")
    results = read_results(tmp_path)
    cell: Any = results.cells_frame.set_index(["cell", "metric"]).loc[("tmpo x independent", "ocr")]
    assert (cell["mean_n"], cell["over"]) == (2, "prompts")
    assert np.isnan(cell["sd"])
    assert results.pairs_frame["p"].isna().all()


def test_pairs_are_welchs_corrected_within_setup_and_metric(tmp_path: Path) -> None:
    values = {"tmpo": [0.60, 0.62, 0.65], "grpo": [0.40, 0.45, 0.41]}
    for objective, means in values.items():
        for seed, mean in enumerate(means):
            write_run(tmp_path / f"{objective}{seed}", objective=objective, seed=seed, reward=(mean, mean))
    pairs: Any = read_results(tmp_path).pairs_frame.query("metric == 'ocr'").set_index(["first", "second"])
    assert len(pairs) == 3  # two cells and the base model
    pair = pairs.loc[("grpo x independent", "tmpo x independent")]
    assert pair["p"] == pytest.approx(stats.ttest_ind(values["grpo"], values["tmpo"], equal_var=False).pvalue)
    assert pair["p_holm"] >= pair["p"]
    assert pair["probability"] == 0.0
    assert pair["difference"] == pytest.approx(0.42 - 0.62333, abs=1e-5)
    assert pair["paired_n"] == 2


def test_runs_of_another_protocol_are_not_averaged(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=2, steps=16)
    results = read_results(tmp_path)
    assert results.setups == ["ocr on tiny", "ocr on tiny (2)"]
    assert (results.cells_frame["seeds"] <= 1).all()
    assert "protocol.steps (8 and 16)" in results.notes[0]


def test_other_settings_are_another_method(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=2, settings={"beta": 3})
    results = read_results(tmp_path)
    assert [run.cell for run in results.runs] == ["tmpo x independent", "tmpo x independent (2)"]
    assert "objective.beta (None and 3)" in results.notes[0]


def test_a_metric_of_a_comparison_file_that_no_run_recorded_is_noted(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a")
    write_comparison(tmp_path, [{"id": "a"}], metrics=["ocr", "ocrr"])
    results = read_results(tmp_path)
    assert results.notes == ["the comparison's metrics name 'ocrr', which no run recorded; did you mean 'ocr'?"]


def test_a_copy_of_a_run_does_not_count_twice(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    results = read_results(tmp_path)
    assert len(results.runs) == 1
    assert "repeats cell and seed" in results.notes[0]


def test_unreadable_records_are_named_and_the_others_used(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    for name, text in (
        ("broken", "{"),
        ("other", '{"schema_version": 99}'),
        ("empty", '{"schema_version": 1}'),
        ("list", "[]"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    (tmp_path / "good" / "metrics.parquet").write_text("no parquet")
    results = read_results(tmp_path)
    assert len(results.runs) == 1
    assert len(results.unreadable) == 5
    assert results.curves_frame.empty


def test_a_comparison_tells_its_order_and_what_is_not_complete(tmp_path: Path) -> None:
    for name, objective in (("c", "tmpo"), ("a", "grpo")):
        write_run(tmp_path / "first" / "runs" / name, objective=objective)
    cells = [{"id": "c"}, {"id": "b", "status": "failed", "error": "NaN in loss"}, {"id": "a"}]
    write_comparison(tmp_path / "first", cells, "alignbench compare -x")
    results = read_results(tmp_path / "first")
    assert [run.folder.name for run in results.runs] == ["c", "a"]
    assert results.unfinished == [{"id": "b", "status": "failed", "error": "NaN in loss"}]
    assert results.commands == ["alignbench compare -x"]


def test_everything_below_a_folder_can_be_made_anew(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_run(tmp_path / name / "runs" / "a", objective=name)
        write_comparison(tmp_path / name, [], f"alignbench compare {name}")
    alone = write_run(tmp_path / "alone", objective="alone")
    (alone / "config.yaml").write_text("objective: alone")
    write_run(tmp_path / "bare", objective="bare", seed=7)
    assert read_results(tmp_path).commands == [
        "alignbench compare one",
        "alignbench compare other",
        f"alignbench run --config {alone / 'config.yaml'}",
        "alignbench run --seed 7",
    ]


def test_cells_of_all_parts_but_the_first_go_by_the_name_of_their_part(tmp_path: Path) -> None:
    for part, beta in (("all", 1), ("frozen", 2)):
        write_run(tmp_path / "runs" / f"{part}-x", settings={"beta": beta})
    parts: dict[str, Any] = {
        "parts": {"all": {}, "frozen": {"settings": {}}},
        "description": "two parts",
        "metrics": ["ocr"],
        "kl_levels": [0.5],
        "contrasts": [{"first": "frozen: tmpo x independent", "second": "tmpo x independent"}],
    }
    write_comparison(tmp_path, [{"id": f"{part}-x", "part": part} for part in ("all", "frozen")], **parts)
    results = read_results(tmp_path)
    assert [(run.part, run.cell) for run in results.runs] == [
        ("all", "tmpo x independent"),
        ("frozen", "frozen: tmpo x independent"),
    ]
    assert results.notes == []
    assert (results.description, results.kl_levels, results.table_metrics("ocr on tiny")) == ("two parts", [0.5], ["ocr"])
    assert [(contrast.first, contrast.matters) for contrast in results.contrasts] == [("frozen: tmpo x independent", 0.1)]
    assert set(results.pairs_frame["metric"]) == {"ocr", "lgmd"}  # the axes are compared in any case


def test_runs_made_with_different_software_are_noted(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=2, torch="2.15")
    results = read_results(tmp_path)
    assert results.environment == {"python": "3.11", "torch": "2.14 | 2.15"}
    assert results.notes == ["the runs differ in torch: their numbers, seconds above all, may not be comparable"]


def test_a_label_names_a_cell(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", settings={"label": "soft", "beta": 0.1})
    results = read_results(tmp_path)
    assert [run.cell for run in results.runs] == ["tmpo x independent", "soft x independent"]
    assert list(results.cells_frame["objective"].unique()) == ["", "tmpo", "soft"]
    assert results.notes == []


def test_the_metrics_of_the_axes_can_be_chosen(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    plain, turned = read_results(tmp_path), read_results(tmp_path, reward="lgmd", diversity="ocr")
    assert [(r.reward("ocr on tiny"), r.diversity("ocr on tiny")) for r in (plain, turned)] == [
        ("ocr", "lgmd"),
        ("lgmd", "ocr"),
    ]
    with pytest.raises(UserError, match="--diversity: no run recorded a metric 'lgdm'; did you mean 'lgmd'"):
        read_results(tmp_path, diversity="lgdm")


def test_the_axis_is_the_metric_that_the_trial_supports_if_it_has_a_value(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    metrics = read_results(tmp_path).runs[0].result.metrics
    seen = metrics["lgmd"]
    absent = seen.model_copy(update={"base": seen.base.model_copy(update={"value": None})})
    assert default_diversity(metrics) == "lgmd"
    assert default_diversity(metrics | {"vendi": seen}) == "vendi"
    assert default_diversity(metrics | {"vendi": seen, "mode_coverage": seen}) == "mode_coverage"
    assert default_diversity(metrics | {"mode_coverage": seen, "attribute_difference": seen}) == "attribute_difference"
    assert default_diversity(metrics | {"mode_coverage": absent}) == "lgmd"  # of prompts that ask for no drawn scene
    assert default_diversity({"mode_coverage": absent}) == "mode_coverage"
    assert default_diversity({}) is None


def test_all_scores_of_all_pictures_are_one_table(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=2)
    frame = read_results(tmp_path).images_frame
    assert len(frame) == 2 * 2 * 2 * 2  # runs, phases, metrics, prompts
    chosen: Any = frame.query("seed == 2 and phase == 'final' and metric == 'ocr'")
    assert list(chosen["value"]) == [0.5, 0.7]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run"):
        read_results(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        read_results(tmp_path / "nowhere")


def test_runs_before_and_after_a_key_was_renamed_are_one_cell(tmp_path: Path) -> None:
    for seed, key in enumerate(("pictures", "save_images")):
        file = write_run(tmp_path / str(seed), seed=seed) / "result.json"
        data = json.loads(file.read_text())
        data["config"][key] = bool(seed)
        file.write_text(json.dumps(data))
    assert [run.cell for run in read_results(tmp_path).runs] == ["tmpo x independent"] * 2


def test_methods_are_paired_by_prompt_where_each_lacks_another_one(tmp_path: Path) -> None:
    for name, objective, values, lacks in (("a", "tmpo", (0.5, 0.7), 0), ("b", "grpo", (0.1, 0.4), 1)):
        folder = write_run(tmp_path / name, objective=objective, reward=values, lgmd=values)
        evals = pd.read_parquet(folder / "evals.parquet")
        missing = (evals["metric"] == "lgmd") & (evals["prompt_index"] == lacks)
        evals.loc[missing, "value"] = np.nan
        evals.to_parquet(folder / "evals.parquet", index=False)
    results = read_results(tmp_path)
    (setup,) = results.setups
    np.testing.assert_array_equal(results.scores(setup, "tmpo x independent", "lgmd"), [[np.nan, 0.7]])
    np.testing.assert_array_equal(results.scores(setup, "grpo x independent", "lgmd"), [[0.1, np.nan]])
    row = results.pairs_frame.query("metric == 'lgmd' and second == 'grpo x independent'").iloc[0]
    assert np.isnan(row["paired"]), "no prompt has a value of both"
