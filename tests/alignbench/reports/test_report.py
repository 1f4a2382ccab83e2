import json
import math
import os
import re
import shutil
import subprocess
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from markdown_it import MarkdownIt
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy import stats
from typer.testing import CliRunner

from alignbench import UserError
from alignbench.cli.app import app
from alignbench.comparison.reading import read_results
from alignbench.comparison.results import BASE, Results
from alignbench.figures import plots, sheets
from alignbench.files.escaping import latex
from alignbench.records import distributions
from alignbench.reports import findings, formatting, report, style, tables, verdict
from alignbench.reports.alarms import grouped
from alignbench.reports.plots import comparison_plots
from alignbench.reports.plots.gallery import Gallery, example_sets, gallery, image_grid, tree_drawings
from alignbench.reports.plots.trade_off import LETTER, NARROW, WIDE, _box, _labels, _overlap, _ticks, scatter, short_names
from tests.alignbench.figures.test_animation import table as distributions_table
from tests.alignbench.record_folders import PROMPTS, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, three seeds each: tmpo has more reward, grpo more diversity."""
    made = tmp_path_factory.mktemp("comparison")
    for seed in range(3):
        shift = 0.01 * seed
        write_run(made / f"t{seed}", seed=seed, reward=(0.8 + shift, 0.9 + shift), lgmd=(0.1 + shift, 0.2 - shift / 2))
        write_run(
            made / f"g{seed}", objective="grpo", seed=seed, reward=(0.5 + shift, 0.6), lgmd=(0.6 + shift, 0.7 - shift / 2)
        )
    report.write_report(made)
    return made


@pytest.fixture
def results(folder: Path) -> Results:
    return read_results(folder)


def test_the_findings_name_the_front_and_what_is_beyond_chance(results: Results) -> None:
    said = findings.findings(results, results.setups[0])
    both = "grpo x independent, tmpo x independent"
    assert said[0] == f"No other model has better means in both OCR score and LGMD than these: {both}."
    assert said[1] == "Worse in both beyond chance: base model (by grpo x independent)."
    how = "Welch's test over 3 seeds per method, Holm-corrected"
    assert said[2] == f"OCR score: 3 of 3 tested differences are beyond chance ({how})."
    rewards = {"grpo": [0.55, 0.555, 0.56], "tmpo": [0.85, 0.86, 0.87], "base": [0.45] * 3}
    p = {
        "between": stats.ttest_ind(rewards["grpo"], rewards["tmpo"], equal_var=False).pvalue,
        "grpo": stats.ttest_1samp(rewards["grpo"], 0.45).pvalue,
        "tmpo": stats.ttest_1samp(rewards["tmpo"], 0.45).pvalue,
    }
    assert p["between"] < p["tmpo"] < p["grpo"]  # so Holm multiplies them by 3, 2 and 1, and none falls below the former
    between = 3 * p["between"]
    tmpo = max(2 * p["tmpo"], between)
    grpo = max(p["grpo"], tmpo)
    # Standard errors .01 / sqrt 3 and .005 / sqrt 3; t(0.975, 2) = 4.302653, and 4.302653 * .005 / sqrt 3 = 0.01242.
    assert said[3] == (
        f"OCR score is above the base model's for grpo x independent (by 0.105 [0.093, 0.117], p = {grpo:.2g}), "
        f"tmpo x independent (by 0.410 [0.385, 0.435], p = {tmpo:.2g})."
    )
    low, high = stats.ttest_ind(rewards["tmpo"], rewards["grpo"], equal_var=False).confidence_interval()
    by = f"by 0.305 [{low:.3f}, {high:.3f}], p = {between:.2g}"
    assert said[4] == f"OCR score between methods: tmpo x independent above grpo x independent ({by})."
    assert "3 seeds per method: a difference that is not beyond chance here may still exist." in said


def test_the_verdict_has_five_sentences_that_a_newcomer_can_read(results: Results) -> None:
    """Without curves and front it says what it cannot tell. The deviations over seeds are .01 and .005 of the reward: paired,
    the differences 0.3, 0.305, 0.31 deviate by .005, of which power_row finds about 0.0196 with three seeds."""
    (setup,) = results.setups
    said = verdict.verdict(results, setup, report.curve_reports(results)[setup])
    assert len(said) == 5
    ocr = "OCR score (how well the text in the image matches the prompt, by edit distance)"
    lgmd = "LGMD (mean log distance between the final latents of a prompt's images)"
    assert said[0] == (
        "2 methods were trained on task ocr with tiny, each within 2 iterations and with 3 seeds: grpo x independent and tmpo "
        f"x independent; the reward is {ocr}, and the measure of diversity is {lgmd}, on 2 held-out prompts."
    )
    assert said[1].startswith(
        "Methods cannot be compared at equal reward, since fewer than two were evaluated along the training"
    )
    assert "tmpo x independent has the most reward (OCR score 0.860 [0.835, 0.885])" in said[1]
    assert "grpo x independent has the most diversity (LGMD 0.652 [0.646, 0.659])" in said[1]
    assert "there is no front of the tilted target here" in said[2]
    assert said[3].startswith("Whether a method over-optimised its reward cannot be told")
    assert said[3].endswith("; no run raised an alarm.")
    assert said[4].startswith("With 3 seeds, a true difference of 0.0")


def test_the_verdict_names_the_runs_that_raised_alarms(results: Results) -> None:
    (setup,) = results.setups
    curves, cell = report.curve_reports(results)[setup], "tmpo x independent"
    fell = "ocr rose by 0.1 while lgmd went from 1 to 0.9"
    curves.alarms = {(cell, 0): [fell], (cell, 1): [], (cell, 2): [], ("grpo x independent", 0): []}
    sentence = verdict.verdict(results, setup, curves)[3]
    assert sentence.endswith("; alarms were raised by 1 of 3 runs of tmpo x independent (LGMD got worse).")
    curves.alarms = {(cell, 0): [fell]}
    assert verdict.verdict(results, setup, curves)[3].endswith("raised by the run of tmpo x independent (LGMD got worse).")


def test_the_verdict_of_one_seed_says_that_it_cannot_tell(tmp_path: Path) -> None:
    write_run(tmp_path / "r")
    results = read_results(tmp_path)
    said = findings.findings(results, "ocr on tiny")
    assert "the variation from training to training is unknown" in said[1]
    assert not any("Worse in both" in s for s in said)
    short = verdict.verdict(results, "ocr on tiny", report.curve_reports(results)["ocr on tiny"])
    assert short[1].startswith("A single method can only be compared with the base model: OCR score rose by ")
    assert short[4] == "One seed for each method cannot tell any difference between methods from the chance of training."


def test_the_findings_compare_at_equal_distance_from_the_base_model(results: Results) -> None:
    frame = results.cells_frame.query("metric == 'lgmd'").assign(metric="kl_base")
    # Means .15, .1525, .155 and .65, .6525, .655: t(0.975, 2) * .0025 / sqrt 3 = 0.00621.
    assert findings._distances(frame) == [
        "The distance from the base model, KL to base (nats), ranges from 0.153 [0.146, 0.159] (n = 3 seeds) for tmpo x "
        "independent to 0.652 [0.646, 0.659] (n = 3 seeds) for grpo x independent: "
        "a model that moved less keeps more diversity for that reason alone, so compare at equal distance."
    ]
    assert findings._distances(results.cells_frame) == []


def test_the_page_is_one_file_and_prompts_and_names_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    write_run(tmp_path / "r", objective=evil, prompts=(evil, "plain"))
    report.write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert evil not in page
    assert "&lt;script&gt;alert(1)" in page
    assert 'src="http' not in page
    assert '<link rel="stylesheet"' not in page


def test_a_browser_runs_the_reports_own_script_and_style_and_loads_nothing(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    policy = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', page)
    hashes = {}
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes[tag] = f"{tag}-src 'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
    assert policy == [
        f"default-src 'none'; img-src data:; {hashes['style']}; {hashes['script']}; base-uri 'none'; form-action 'none'"
    ]
    assert not re.findall(r"\s(style|on\w+)=", page.partition("<body>")[2].partition("<script>")[0])
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_what_cannot_be_told_is_said_and_no_p_value_is_0(tmp_path: Path) -> None:
    for objective, reward in (("tmpo", 0.7), ("grpo", 0.5)):
        for seed in (1, 2):  # no spread
            write_run(tmp_path / f"{objective}{seed}", objective=objective, seed=seed, reward=(reward, reward))
    results = read_results(tmp_path)
    pairs = results.pairs_frame.query("metric == 'ocr'")
    assert pairs["p"].isna().all()
    values = report.setup_values(results, results.setups[0], tmp_path, report.Plots())
    page = report.render(
        "report.md.jinja", {"setups": [values], "families": [], "results": results, "published": [], "base": BASE}
    )
    assert page.count("| cannot be told |") == 6
    assert r"| tmpo x independent | 0.7 \[no interval\] (n = 2 seeds) |" in page
    assert any("the variation from training to training is unknown" in sentence for sentence in values["findings"])
    assert [formatting.p_value(p) for p in (0.04, 1e-300, float("nan"))] == ["0.04", "< 1e-15", "cannot be told"]


@pytest.mark.usefixtures("laid_out")
def test_names_that_differ_in_signs_alone_have_plots_and_tables_of_their_own(tmp_path: Path) -> None:
    for name, reward in (("m/x 1", (0.5, 0.7)), ("m/x_1", (0.1, 0.2)), ("M/x-1", (0.3, 0.4))):
        file = write_run(tmp_path / str(reward[0]), reward=reward) / "result.json"
        data = json.loads(file.read_text())
        data["run"]["backbone"] = name
        file.write_text(json.dumps(data))
    results = read_results(tmp_path)
    folders = {comparison_plots.plots_folder(results, setup, tmp_path) for setup in results.setups}
    assert len({str(folder).casefold() for folder in folders}) == 3
    assert len(list(filter(lambda f: f.suffix == ".tex", tables.write_tables(results, {}, tmp_path / "tables")))) == 3


def test_no_mean_stands_without_its_interval_and_n(folder: Path, results: Results) -> None:
    lines = (folder / "report.md").read_text().splitlines()
    table, differences, _, paired = [line for line in lines if line.startswith("| tmpo x independent")]
    assert paired.count("(n = 3 seeds)") == 2
    assert table.count("(n = 3 seeds)") == differences.count("(n = 3 seeds)") == 2
    tex = (folder / "tables" / "ocr_on_tiny.tex").read_text()
    assert r"\toprule" in tex
    assert tex.count("n = 3 seeds") == 4


def test_latex_escapes_what_is_special_and_knows_minus_from_hyphen() -> None:
    assert latex("a_b-2 & 5 %") == r"a\_b-2 \& 5 \%"
    assert latex("↓ -1.5 [-2, 1e-05]") == r"$\downarrow$ $-$1.5 [$-$2, 1e-05]"
    assert latex("[a]*") == "{[}a]*"  # behind the `\\\\` of the row above, brackets would be its option


def test_headings_say_where_better_is_and_what_was_trained_on(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert "OCR score ↑ (trained on)</button>" in page
    assert "LGMD ↑</button>" in page
    assert (
        "| method | OCR score ↑ (trained on) | LGMD ↑ | model evaluations | seconds of training | model evaluations per image |"
        in (folder / "report.md").read_text()
    )


def test_what_was_spent_is_told_with_the_seeds_where_they_differ(tmp_path: Path) -> None:
    for seed, rows in enumerate((150, 250)):
        write_run(tmp_path / str(seed), seed=seed, rows=rows)
    cells = read_results(tmp_path).cells_frame
    of_base, of_cell = (tables.method_row(cells, cell) for cell in (BASE, "tmpo x independent"))
    assert formatting.spent(of_cell, "model_rows") == "200 (150 to 250, n = 2 seeds)"
    assert formatting.spent(of_cell, "seconds") == "2.5"
    assert formatting.spent(of_base, "model_rows") == "0"


def test_every_plot_has_a_title_in_words(folder: Path) -> None:
    titles = {style.figure_title(file.stem) for file in (folder / "plots").iterdir()}
    assert {
        "Training against seconds of training: running means of 8 iterations",
        "OCR score of each prompt, trained minus base",
    } < titles
    assert not any("_" in title for title in titles)


def test_good_records_leave_nothing_out(folder: Path) -> None:
    assert "Not in the numbers" not in (folder / "report.md").read_text()


def test_tables_hold_what_the_frames_hold(folder: Path, results: Results) -> None:
    for kind, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        assert len(read(folder / "tables" / f"cells.{kind}")) == len(results.cells_frame) == 6
        for name, rows in (("runs", 12), ("pairs", 6), ("prompts", 24), ("curves", 12), ("images", 48), ("hypervolumes", 3)):
            assert len(read(folder / "tables" / f"{name}.{kind}")) == rows


def test_published_figures_have_a_source_and_full_rows() -> None:
    tables = yaml.safe_load(report.PUBLISHED.read_text())
    for table in tables:
        assert table["source"]
        assert table["protocol"]
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}


def test_published_figures_are_shown_beside_the_same_model_alone(tmp_path: Path) -> None:
    for name, backbone in (("ours", "tiny"), ("flux", "/models/FLUX.1-dev")):
        file = write_run(tmp_path / name / "r") / "result.json"
        data = json.loads(file.read_text())
        data["run"]["backbone"] = backbone
        file.write_text(json.dumps(data))
    assert report.published(read_results(tmp_path / "ours")) == []
    assert len(report.published(read_results(tmp_path / "flux"))) == len(yaml.safe_load(report.PUBLISHED.read_text()))


def test_plots_of_an_earlier_choice_of_axes_are_removed_and_other_files_stay(tmp_path: Path) -> None:
    write_run(tmp_path / "r")
    report.write_report(tmp_path)
    assert (tmp_path / "plots" / "profile_lgmd.png").is_file()
    (tmp_path / "plots" / "notes.png").write_text("mine")
    report.write_report(tmp_path, reward="lgmd", diversity="lgmd")
    names = {file.name for file in (tmp_path / "plots").iterdir()}
    assert "profile_ocr.png" not in names
    assert {"profile_lgmd.png", "notes.png"} <= names


@pytest.mark.usefixtures("without_plots")
def test_one_run_is_not_called_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "r")
    report.write_report(tmp_path)
    assert "<h1>Comparison of 1 run</h1>" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "report.md").read_text().startswith("# Comparison of 1 run\n")


def test_alarms_that_differ_in_numbers_alone_are_one(results: Results) -> None:
    cell = "tmpo x independent"
    said = {(cell, seed): [f"ocr rose by 0.{seed} while lgmd went from 0.5 to 0.{seed}"] for seed in (1, 2)}
    (group,) = grouped({**said, (cell, 3): [], ("grpo x independent", 1): []})
    assert group == (cell, 3, 2, "LGMD got worse", [("1, 2", said[cell, 1][0])])


def test_many_alarms_of_a_method_are_told_by_the_first_and_their_number() -> None:
    worse = ["lgmd", "vendi", "cosine_diversity", "pixel_diversity"]
    sentences = [f"ocr rose by 0.1 while {metric} went from 0.5 to 0.4" for metric in worse]
    (group,) = grouped({("a x b", 0): [*sentences, "ocr_judge fell by 0.1", "2 modes of 'a' died"]})
    assert group.about.startswith("LGMD, Vendi score and 2 more got worse, ")
    (three,) = grouped({("a x b", 0): sentences[:3]})
    assert three.about == "LGMD, Vendi score and cosine diversity got worse"


def test_labels_of_the_trade_off_do_not_cover_one_another() -> None:
    """Five methods at nearly the same place: estimated boxes of their names must not overlap, nor leave the frame."""
    marks = [{"label": f"method {i} x independent", "x": 400.0 + i, "y": 250.0 + i} for i in range(5)]
    labels = _labels(marks, WIDE.frame)
    boxes = [_box((label["label_x"], label["label_y"], label["anchor"]), LETTER * 22) for label in labels]
    for i, one in enumerate(boxes):
        assert one[0] >= 80
        assert one[2] <= 880
        assert not any(_overlap(one, other) for other in boxes[:i])
    assert labels[0]["leader"] is None  # the first one stands beside its mark
    assert labels[4]["leader"] is not None  # two lines away: a line joins it to its mark


def test_a_label_that_finds_no_free_place_covers_as_little_as_it_can() -> None:
    """At the right edge only labels to the left fit: 23 lines from the middle of the frame, and more marks than that."""
    marks = [{"label": "a method", "x": 860.0, "y": 270.0} for _ in range(30)]
    boxes = [_box((label["label_x"], label["label_y"], label["anchor"]), LETTER * 8) for label in _labels(marks, WIDE.frame)]
    assert all(box[2] <= 880 and box[1] >= 30 and box[3] <= 510 for box in boxes)


def test_labels_leave_out_a_sampler_that_all_methods_share() -> None:
    assert short_names([BASE, "grpo x tree", "tmpo x tree"]) == {BASE: BASE, "grpo x tree": "grpo", "tmpo x tree": "tmpo"}
    assert short_names(["grpo x tree", "grpo x independent"])["grpo x tree"] == "grpo x tree"


def test_on_a_phone_marks_have_numbers(results: Results) -> None:
    cells = results.cells_frame[results.cells_frame["setup"] == results.setups[0]]
    wide, narrow = (scatter(cells, "ocr", "lgmd", (), canvas) for canvas in (WIDE, NARROW))
    assert [mark["label"] for mark in narrow["marks"]] == ["1", "2", "3"]
    assert [mark["cell"] for mark in narrow["marks"]] == [mark["cell"] for mark in wide["marks"]]
    assert all(mark["x"] <= NARROW.width and mark["y"] <= NARROW.height for mark in narrow["marks"])
    assert not wide["cut"]  # the intervals are far narrower than the distances of the methods


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.06634, 0.0403, 0.0922), "0.066 [0.040, 0.092]"),  # half-width 0.026
        ((-0.00182, -0.0174, 0.0137), "-0.002 [-0.017, 0.014]"),
        ((0.855, 0.836, 0.8749), "0.855 [0.836, 0.875]"),  # half-width 0.019: 3 decimals for two digits
        ((0.42242, 0.42203, 0.42281), "0.4224 [0.4220, 0.4228]"),  # half-width 0.0004: one digit of it at least
        ((4.09, 3.17, 5.0), "4.09 [3.17, 5.00]"),
        ((13.9, 4.65, 23.15), "13.9 [4.7, 23.1]"),
        ((382050.4, 350000.0, 414100.8), "382,050 [350,000, 414,101]"),
        ((-0.0004, -0.2, 0.2), "0.00 [-0.20, 0.20]"),  # no minus before a zero
        ((2e-7, 1e-7, 3e-7), "2e-07 [1e-07, 3e-07]"),
        ((0.0, 0.0, 0.0), "0 [0, 0]"),
        ((0.5, -math.inf, math.inf), "0.5"),
    ],
)
def test_numbers_have_as_many_decimals_as_their_interval_needs(numbers: tuple[float, float, float], text: str) -> None:
    assert formatting.with_interval(*numbers) == text


def test_an_n_that_is_told_once_is_not_repeated() -> None:
    row = {"mean": 0.5, "mean_lower": 0.4, "mean_upper": 0.6, "mean_n": 3, "over": "seeds"}
    assert formatting.estimate(row) == "0.50 [0.40, 0.60] (n = 3 seeds)"
    assert formatting.estimate(row, usual="n = 3 seeds") == "0.50 [0.40, 0.60]"
    assert formatting.estimate(row, usual="n = 4 seeds").endswith("(n = 3 seeds)")


def test_ticks_of_nearly_equal_values_are_told_apart() -> None:
    texts = [text for _, text in _ticks(MaxNLocator(6), (0.235760, 0.235766))]
    assert len(texts) == len(set(texts)) > 3


def test_what_is_empty_has_no_brackets() -> None:
    assert formatting.listed({"ocr": {"settings": {"batch": 16}}, "quality": {"settings": {}}}) == (
        "ocr (settings (batch 16)), quality"
    )


def test_the_best_mean_is_bold(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    row = (
        page[page.index("The trained models</h3>") :].partition('<td data-value="tmpo x independent">')[2].partition("</tr>")[0]
    )
    assert row.count('class="best"') == 1  # the reward, and not the diversity


def test_plots_are_written_for_paper_and_screen(folder: Path) -> None:
    names = {f.name for f in (folder / "plots").iterdir()}
    for name in ("trade_off", "hypervolume", "curves_by_seconds", "prompts_ocr", "profile_lgmd"):
        assert {f"{name}.png", f"{name}.svg"} <= names
    assert not any(name.startswith("against") for name in names)  # all cells cost the same


def test_what_cells_spent_is_drawn_where_it_differs(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", objective="grpo", rows=1500)
    figures = comparison_plots.comparison_figures(read_results(tmp_path), "ocr on tiny")
    assert [name for name in figures if name.startswith("against")] == ["against_model_rows"]


def test_curves_are_averaged_where_all_seeds_have_one() -> None:
    slow, fast = ({"iteration": [0, 1, 2], "x": x, "y": [0.0, 1.0, 2.0]} for x in ([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]))
    part = pd.concat([pd.DataFrame(c).assign(seed=s) for s, c in enumerate((slow, fast))])
    across, curves = comparison_plots._over_seeds(part, "x", "y", smooth=1)
    assert across.tolist() == [2.0, 3.0]
    assert curves.tolist() == [[1.0, 2.0], [0.0, 0.5]]


def test_diagnostics_that_are_zero_throughout_are_said_in_words() -> None:
    frame = pd.DataFrame({"cell": "a x b", "seed": 0, "iteration": [0, 1], "grad_norm": [1.0, 2.0], "zero_std_ratio": 0.0})
    figure = comparison_plots.diagnostics(frame)
    assert [axis.get_title() for axis in figure.axes if axis.get_visible()] == ["gradient norm"]
    assert figure.get_suptitle() == "0 throughout: groups of equal rewards"


def test_the_legend_has_a_line_for_objectives_and_one_for_samplers() -> None:
    cells = [f"{objective} x {sampler}" for objective in "abcde" for sampler in ("one", "two")]
    figure = plt.figure()
    style.add_legend(figure, style.looks([BASE, *cells]))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [texts[i::3] for i in range(3)] == [["a", "b", "c", "d"], ["e", "", "", ""], ["one", "two", BASE, ""]]


def test_markdown_shows_names_as_they_are(tmp_path: Path) -> None:
    name = "a|b <i>*c*</i> [d](e) `f`"
    write_run(tmp_path / "r", objective=name)
    report.write_report(tmp_path)
    tokens = MarkdownIt().enable("table").parse((tmp_path / "report.md").read_text())
    cells, rows = [], []
    for at, token in enumerate(tokens):
        if token.type == "tr_open":
            rows.append(0)
        elif token.type in ("td_open", "th_open"):
            rows[-1] += 1
            cells.append("".join(t.content for t in tokens[at + 1].children or []))
    assert f"{name} x independent" in cells
    # Own numbers, differences, one pair for each of two metrics, and settings, each with a head.
    assert rows == [6, 6, 6, 3, 3, 7, 7, 7, 3, 3]
    assert not any("<i>" in t.content for t in tokens if t.type == "html_block")


def test_markdown_links_to_plots_that_are_there(tmp_path: Path) -> None:
    for steps in (8, 16):  # two setups, so that plots are in folders of their own
        write_run(tmp_path / str(steps), steps=steps)
    report.write_report(tmp_path)
    linked = re.findall(r"!\[.*?\]\((.*?)\)", (tmp_path / "report.md").read_text())
    assert {Path(link).parts[:2] for link in linked} == {("plots", "ocr_on_tiny"), ("plots", "ocr_on_tiny_2")}
    assert all((tmp_path / link).is_file() for link in linked)


def test_the_plots_of_a_run_stay_when_it_is_reported_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    plots.plot_run(run)
    before = {file.name: file.read_bytes() for file in (run / "plots").iterdir()}
    written = report.write_report(run)
    assert {file.name: file.read_bytes() for file in (run / "plots").iterdir()} == before
    assert run / "report.html" in written
    assert "data:image/svg+xml;base64" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("report.md", "was not written by alignbench"),
        ("tables/runs.csv", "tables holds files"),
        ("plots/mine.png", "plots holds"),
    ],
)
def test_what_a_report_has_not_written_stays(tmp_path: Path, name: str, says: str) -> None:
    write_run(tmp_path / "results" / "one")
    file = tmp_path / "results" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("what I found, by hand")
    before = {*(tmp_path / "results").rglob("*"), tmp_path / "results" / ".report.lock"}
    with pytest.raises(UserError, match=says):
        report.write_report(tmp_path / "results")
    assert file.read_text() == "what I found, by hand"
    assert {*(tmp_path / "results").rglob("*")} == before


def test_a_report_is_written_again_over_itself_also_where_its_hidden_marks_are_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy made with `cp -r results/* elsewhere` has none."""
    monkeypatch.setattr(report, "_write_report", lambda results, curves, folder, refresh: ([], report.Plots()))
    for mark in folder.rglob(".alignbench"):
        mark.unlink()
    report.write_report(folder)
    (folder / "report.md").write_text("Numbers stand as mean [95 % interval] (n).")  # of a version without marks
    report.write_report(folder)


def test_axes_are_chosen_on_the_command_line(tmp_path: Path) -> None:
    write_run(tmp_path / "r")
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--reward", "lgmd", "--diversity", "ocr"])
    assert done.exit_code == 0, done.output
    assert "reward: LGMD" in (tmp_path / "report.html").read_text()
    for command in ("report", "plot"):
        refused = CliRunner().invoke(app, [command, str(tmp_path), "--diversity", "lgdm"])
        assert str(refused.exception) == "--diversity: no run recorded a metric 'lgdm'; did you mean 'lgmd'?"
    refused = CliRunner().invoke(app, ["plot", str(tmp_path / "r"), "--diversity", "ocr"])
    assert "a single run has no such plot" in str(refused.exception)


def test_the_front_is_a_staircase(results: Results) -> None:
    cells = results.cells_frame
    found = scatter(cells, "ocr", "lgmd")
    at = {mark["cell"]: (mark["x"], mark["y"]) for mark in found["marks"]}
    left, right = at["grpo x independent"], at["tmpo x independent"]
    points = [tuple(map(float, point.split(","))) for point in found["front"].split()]
    assert points == [left, (left[0], right[1]), right]


def test_hypervolume_by_hand(results: Results) -> None:
    runs = results.runs_frame.query("seed == 0")
    table = comparison_plots.hypervolume_table(runs, "ocr", "lgmd").set_index("cell")
    # Rewards .85 .55 .45, diversities .15 .65 .45: the box starts at .45 - .04 = .41 and .15 - .05 = .10, and is .44 x .55.
    assert table.loc["tmpo x independent", "value"] == pytest.approx(0.44 * 0.05 / (0.44 * 0.55))
    assert table.loc["grpo x independent", "value"] == pytest.approx(0.14 * 0.55 / (0.44 * 0.55))
    assert table.loc[BASE, "value"] == pytest.approx(0.04 * 0.35 / (0.44 * 0.55))


def test_pictures_are_cut_from_the_sheet_that_a_run_leaves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    (run / "samples").mkdir()
    for name, shades in (("base", (10, 20)), ("final", (30, 40))):
        images = np.stack([np.full((8, 8, 3), shade, dtype=np.uint8) for shade in shades])
        sheets.grid(images, 1).save(run / "samples" / f"{name}.png")
    shown = gallery(read_results(tmp_path), "ocr on tiny")
    found = {cell: [[image.getpixel((9, 9)) for image in block] for block in blocks] for cell, blocks in shown.images.items()}
    assert found == {BASE: [[(10,) * 3], [(20,) * 3]], "tmpo x independent": [[(30,) * 3], [(40,) * 3]]}
    assert shown.scores == {BASE: [[0.4], [0.5]], "tmpo x independent": [[0.5], [0.7]]}
    assert (shown.prompts, shown.metric) == (list(PROMPTS), "ocr")
    report.write_report(tmp_path)
    assert (tmp_path / "plots" / "images.svg").is_file()
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64") == 6  # gallery, and the first prompt on cards
    assert re.findall(r"<br><small>(.*?)</small></td>", page) == ["0.40", "0.50", "0.50", "0.70"]
    assert "kept no images" not in page


def test_the_grid_enlarges_each_image_by_a_whole_number_and_has_its_score_below(tmp_path: Path) -> None:
    # Two prompts of one image of 64 pixels, which a sheet has at 128. A row has 6.8 inches of 300 pixels, of which 0.845 are
    # images: 2.3 of them and gaps of 4 %, so that one takes 737 pixels at most. 704 = 11 * 64.
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    pixels[..., 0] = 255  # none is white, as the page is
    pixels[..., 1] = np.minimum(pixels[..., 1], 200)
    image = Image.fromarray(pixels).resize((128, 128), Image.Resampling.NEAREST)
    shown = Gallery({BASE: [[image], [image]]}, {BASE: [[0.25], [math.nan]]}, ["a", "b"], "ocr")
    figure = image_grid(shown)
    assert [text.get_text() for text in figure.texts if text.get_text() in ("0.25", "-")] == ["0.25", "-"]
    assert "below each image: OCR score" in figure.texts[-1].get_text()
    figure.savefig(tmp_path / "grid.png", dpi=300)
    drawn = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    is_image = (drawn[..., 0] == 255) & (drawn[..., 1] <= 200)
    rows, columns = np.flatnonzero(is_image.sum(1) > 700), np.flatnonzero(is_image.sum(0) > 350)
    assert len(rows) == 704
    assert len(columns) == 2 * 704
    first = drawn[rows[0] : rows[0] + 704, columns[0] : columns[0] + 704]
    np.testing.assert_array_equal(first[5::11, 5::11], pixels)


@pytest.mark.usefixtures("without_plots")
def test_a_page_says_where_the_runs_kept_no_images(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    record = json.loads((run / "result.json").read_text())
    record["config"]["save_images"] = False
    (run / "result.json").write_text(json.dumps(record))
    report.write_report(tmp_path)
    assert "These runs kept no images (<code>save_images=false</code>)." in (tmp_path / "report.html").read_text()
    distributions_table(0, 3).to_parquet(run / distributions.FILE, index=False)
    report.write_report(tmp_path)
    assert "kept no images" not in (tmp_path / "report.html").read_text()  # those of a toy problem are no images


@pytest.mark.usefixtures("without_plots")
def test_example_sets_show_the_prompt_at_which_most_and_least_diverse_differ_most(tmp_path: Path) -> None:
    # Means of LGMD .4, .3 and .1. At the first prompt tmpo is 0.1 above grpo, at the second one 0.5.
    for shade, (objective, lgmd) in enumerate({"tmpo": (0.2, 0.6), "ddpo": (0.3, 0.3), "grpo": (0.1, 0.1)}.items()):
        samples = write_run(tmp_path / objective, objective=objective, lgmd=lgmd) / "samples"
        samples.mkdir()
        for phase, first in (("base", 100), ("final", 10 * shade)):
            images = np.stack([np.full((8, 8, 3), first + prompt, dtype=np.uint8) for prompt in range(2)])
            sheets.grid(images, 1).save(samples / f"{phase}.png")
    results = read_results(tmp_path)
    found = example_sets(results, "ocr on tiny", "lgmd")
    assert found is not None
    assert (found.prompt, found.most, found.least) == (PROMPTS[1], "tmpo x independent", "grpo x independent")
    shades = {cell: [image.getpixel((9, 9)) for image in images] for cell, images in found.images.items()}
    assert shades == {BASE: [(101,) * 3], "tmpo x independent": [(1,) * 3], "grpo x independent": [(21,) * 3]}
    turned = example_sets(results, "ocr on tiny", "lgmd", higher_is_better=False)
    assert turned is not None
    assert (turned.most, turned.least) == ("grpo x independent", "tmpo x independent")
    assert example_sets(results, "ocr on tiny", "vendi") is None
    report.write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "tmpo x independent is the most diverse and grpo x independent the least" in page


@pytest.mark.parametrize("kind", ["bomb", "pipe", "one pixel", "text"])
def test_a_sheet_that_cannot_be_used_costs_its_own_place_alone(tmp_path: Path, kind: str) -> None:
    run = write_run(tmp_path / "r")
    for name in ("samples/base", "samples/final", "plots/tree"):
        file = run / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "text":
            file.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EOF\n")
        else:
            Image.new("1", (20_000, 10_000) if kind == "bomb" else (1, 1)).save(file)
    results = read_results(tmp_path)
    assert gallery(results, "ocr on tiny") == ({}, {}, [], "ocr")
    assert len(tree_drawings(results, "ocr on tiny")) == (kind == "one pixel")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser_sorting_and_pointing_work_without_errors(folder: Path, tmp_path: Path) -> None:
    """A script at the end of the page acts as a reader would, and writes what it saw into the title."""
    acts = """<script>
      const errors = []; window.addEventListener("error", e => errors.push(e.message));
      const table = document.querySelector(".sortable"), first = () => table.tBodies[0].rows[0].cells[0].textContent;
      const button = table.querySelectorAll("th button")[1];
      button.click(); const low = first(); button.click(); const high = first();
      const points = [...document.querySelectorAll(".point")].filter(point => point.checkVisibility());
      const card = document.querySelector(".card");
      points[1].dispatchEvent(new MouseEvent("mouseenter")); const hovered = card.textContent;
      points[2].focus(); const focused = card.textContent;
      points[0].dispatchEvent(new MouseEvent("click")); const clicked = card.textContent;
      const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
      document.title = JSON.stringify({low, high, hovered, focused, clicked, wide, errors, tabs: points.map(p => p.tabIndex)});
    </script></body>"""
    page = tmp_path / "acted.html"
    own = b64encode(sha256(acts.removeprefix("<script>").removesuffix("</script></body>").encode()).digest()).decode()
    text = (folder / "report.html").read_text().replace("script-src ", f"script-src 'sha256-{own}' ")
    page.write_text(text.replace("</body>", acts))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--window-size=390,800",  # a phone
    ]
    done = subprocess.run(
        [str(CHROMIUM), *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=200, check=True
    )
    title = done.stdout.split("<title>")[1].split("</title>")[0]
    saw = yaml.safe_load(title)
    assert (saw["low"], saw["high"]) == (f"{BASE} (n = 2 prompts)", "tmpo x independent")
    assert "grpo x independent" in saw["hovered"]
    assert "n = 3 seeds" in saw["hovered"]
    assert "tmpo x independent" in saw["focused"]
    assert BASE in saw["clicked"]
    assert saw["tabs"] == [0, 0, 0]  # in the order of the page
    assert saw["wide"] == 0  # only tables scroll sideways, not the page
    assert saw["errors"] == []
    assert "CONSOLE" not in done.stderr
