import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from alignbench import comparison_plots, plots, report
from alignbench.results import BASE, Results, read_results
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


def test_the_verdict_names_the_front_and_what_is_beyond_chance(results: Results) -> None:
    said = report.verdict(results, results.setups[0])
    assert said[0] == "On the front of ocr and lgmd, by their means: grpo x independent, tmpo x independent."
    assert any(s.startswith("ocr of tmpo x independent is higher than that of grpo x independent by 0.305") for s in said)
    assert said[-1] == "No run raised an alarm."


def test_the_verdict_of_one_seed_says_that_it_cannot_tell(tmp_path: Path) -> None:
    write_run(tmp_path / "r")
    said = report.verdict(read_results(tmp_path), "ocr on tiny")
    assert "nothing can be said about chance" in said[1]


def test_the_page_is_one_file_and_prompts_and_names_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    write_run(tmp_path / "r", objective=evil, prompts=(evil, "plain"))
    report.write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert evil not in page
    assert "&lt;script&gt;alert(1)" in page
    assert 'src="http' not in page
    assert '<link rel="stylesheet"' not in page


def test_no_mean_stands_without_its_interval_and_n(folder: Path, results: Results) -> None:
    lines = (folder / "report.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| tmpo x independent")]
    assert line.count("(n = 3 seeds)") == 2
    tex = (folder / "tables" / "ocr_on_tiny.tex").read_text()
    assert r"\toprule" in tex
    assert tex.count("n = 3 seeds") == 4


def test_latex_escapes_what_is_special() -> None:
    assert report._latex("a_b & 5 %") == r"a\_b \& 5 \%"


def test_tables_hold_what_the_frames_hold(folder: Path, results: Results) -> None:
    for kind, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        assert len(read(folder / "tables" / f"cells.{kind}")) == len(results.cells_frame) == 6


def test_published_figures_have_a_source_and_full_rows() -> None:
    tables = yaml.safe_load(report.PUBLISHED.read_text())
    for table in tables:
        assert table["source"]
        assert table["protocol"]
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}


def test_plots_are_written_for_paper_and_screen(folder: Path) -> None:
    names = {f.name for f in (folder / "plots").iterdir()}
    for name in ("trade_off", "hypervolume", "against_model_rows", "curves_by_seconds", "prompts_ocr", "profile_lgmd"):
        assert {f"{name}.png", f"{name}.svg"} <= names


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
        plots.grid(images, 1).save(run / "samples" / f"{name}.png")
    rows, prompts = comparison_plots.gallery(read_results(tmp_path), "ocr on tiny")
    found = {cell: [picture.getpixel((9, 9)) for picture in pictures] for cell, pictures in rows.items()}
    assert found == {BASE: [(10,) * 3, (20,) * 3], "tmpo x independent": [(30,) * 3, (40,) * 3]}
    assert prompts == list(PROMPTS)
    report.write_report(tmp_path)
    assert (tmp_path / "plots" / "pictures.svg").is_file()
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64") == 8  # gallery and cards


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser_sorting_and_pointing_work_without_errors(folder: Path, tmp_path: Path) -> None:
    """A script at the end of the page acts as a reader would, and writes what it saw into the title."""
    acts = """<script>
      const errors = []; window.addEventListener("error", e => errors.push(e.message));
      const table = document.querySelector(".sortable"), first = () => table.tBodies[0].rows[0].cells[0].textContent;
      const button = table.querySelectorAll("th button")[1];
      button.click(); const low = first(); button.click(); const high = first();
      const points = [...document.querySelectorAll(".point")], card = document.querySelector(".card");
      points[1].dispatchEvent(new MouseEvent("mouseenter")); const hovered = card.textContent;
      points[2].focus(); const focused = card.textContent;
      document.title = JSON.stringify({low, high, hovered, focused, errors});
    </script></body>"""
    page = tmp_path / "acted.html"
    page.write_text((folder / "report.html").read_text().replace("</body>", acts))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [str(CHROMIUM), *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=200, check=True
    )
    title = done.stdout.split("<title>")[1].split("</title>")[0]
    saw = yaml.safe_load(title)
    assert (saw["low"], saw["high"]) == (BASE, "tmpo x independent")
    assert "grpo x independent" in saw["hovered"]
    assert "n = 3 seeds" in saw["hovered"]
    assert "tmpo x independent" in saw["focused"]
    assert saw["errors"] == []
    assert "CONSOLE" not in done.stderr
