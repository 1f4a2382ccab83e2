import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from alignbench import UserError, run
from alignbench.config.run_config import load_config
from alignbench.files import images
from alignbench.records.record import EvalRecord
from alignbench.scoring.score import score_images, score_model
from evals.diversity import Diversity
from tests.support.command_line import alignbench, in_this_process
from tests.support.plugins import toy_config, write_task

ROOT = Path(__file__).parents[3]


def test_a_checkpoint_scores_as_its_run_did(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path), ema={"decay": 0.5, "every": 1})
    result = run(config, tmp_path / "run")
    base = score_model(config, None)
    final = score_model(config, tmp_path / "eval", run=tmp_path / "run")
    of_a_run = {"path_kl"}  # between the two models that a run has
    for metric, record in result.metrics.items():
        if metric in of_a_run:
            continue
        assert base.metrics[metric].value == record.base.value
        assert (final.metrics[metric].value, final.metrics[metric].lower) == (record.final.value, record.final.lower)
    assert result.metrics["brightness"].difference.value != 0
    assert (final.protocol.iteration, final.protocol.weights, base.protocol.weights) == (3, "ema", "raw")
    assert EvalRecord.model_validate_json((tmp_path / "eval" / "eval.json").read_text()) == final
    assert len(pd.read_parquet(tmp_path / "eval" / "evals.parquet")) == 6 * 3 + 2 * 6
    with pytest.raises(UserError, match="exists already"):
        score_model(config, tmp_path / "eval")


def test_a_run_without_a_checkpoint_and_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path))
    with pytest.raises(UserError, match="has no checkpoint"):
        score_model(config, None, run=tmp_path)
    run(config, tmp_path / "run")
    other = load_config(options={"backbone": "gaussian_mixture", "task": "rare_mode", "evaluation": {"prompts": 4}})
    with pytest.raises(UserError, match="belong to another model"):
        score_model(other, None, run=tmp_path / "run")


def picture_folder(folder: Path, greys: list[int], sizes: list[tuple[int, int]] | None = None) -> Path:
    folder.mkdir()
    for i, (grey, size) in enumerate(zip(greys, sizes or [(4, 4)] * len(greys), strict=True)):
        Image.new("RGB", size, (grey, 0, 0)).save(folder / f"{i}.png")
    return folder


def test_pictures_made_elsewhere_by_hand(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path))
    pictures = picture_folder(tmp_path / "pictures", [0, 51, 255, 255])
    (tmp_path / "p.txt").write_text("a\nb")
    record = score_images(pictures, tmp_path / "p.txt", config, None)
    # Prompt means 0.1 and 1.0; one of three channels differs by a fifth of its range, and nothing.
    assert record.metrics["brightness"].value == pytest.approx(0.55)
    assert record.metrics["pixel_diversity"].value == pytest.approx(np.sqrt(0.2**2 / 3) / 2)
    assert record.metrics["brightness"].n == 2
    assert "lgmd" not in record.metrics
    assert (record.protocol.source, record.protocol.images, record.protocol.steps) == ("images", 4, None)


def test_failed_scores_are_counted(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path, "Sometimes"))
    pictures = picture_folder(tmp_path / "pictures", [1, 2, 3, 4])
    (tmp_path / "p.txt").write_text("a\nb")
    assert score_images(pictures, tmp_path / "p.txt", config, None).failed_scores == 2


def diversity_of(tmp_path: Path, sizes: list[tuple[int, int]], table: str, features: str = "") -> EvalRecord:
    """Of images 0.png and so on of these sizes, of grey 0, 50 and so on, for the prompts of a table."""
    pictures = picture_folder(tmp_path / "pictures", [50 * i for i in range(len(sizes))], sizes)
    (tmp_path / "p.csv").write_text("prompt,image\n" + table)
    settings = {"diversity": {"features": features}}
    config = toy_config(write_task(tmp_path))
    return score_images(pictures, tmp_path / "p.csv", config, None, evals=["quality", "diversity"], settings=settings)


def test_a_prompt_with_one_picture_has_no_diversity_and_all_else_is_told(tmp_path: Path) -> None:
    found = diversity_of(tmp_path, [(4, 4)] * 3, "x,0.png\nx,1.png\ny,2.png\n").metrics
    assert (found["brightness"].n, found["pixel_diversity"].n) == (2, 1)
    assert found["pixel_diversity"].value == pytest.approx(50 / 255 / np.sqrt(3))


def test_where_no_prompt_has_two_pictures_the_record_says_that_diversity_is_missing(tmp_path: Path) -> None:
    record = diversity_of(tmp_path, [(4, 4)] * 2, "x,0.png\ny,1.png\n")
    assert (record.metrics["brightness"].n, record.metrics["diversity"].n, record.metrics["diversity"].value) == (2, 0, None)
    assert record.failed_scores == 2


def test_pictures_of_two_sizes_are_compared_by_their_features_alone(tmp_path: Path) -> None:
    found = diversity_of(tmp_path, [(64, 64), (80, 64)], "x,0.png\nx,1.png\n", "clip:tiny").metrics
    assert (found["pixel_diversity"].n, found["cosine_diversity"].n, found["brightness"].n) == (0, 1, 1)


def test_scores_do_not_depend_on_how_many_files_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(options={"task": "geneval"})
    pictures = picture_folder(
        tmp_path / "pictures", [0, 50, 100, 150, 200, 250], [(8, 8), (8, 8), (9, 8), (9, 8), (8, 8), (8, 8)]
    )
    (tmp_path / "p.txt").write_text("a red circle\na circle and a star\na cross")
    held: list[int] = []
    load = images.ImageFiles.load

    def counted(files: images.ImageFiles, part: Sequence[int]) -> np.ndarray:
        held.append(len(part))
        return load(files, part)

    monkeypatch.setattr(images.ImageFiles, "load", counted)
    tables = []
    for count, pixels in ((256, 2**25), (1, 2**25), (4, 3 * 64)):
        monkeypatch.setattr(images, "PART_IMAGES", count)
        monkeypatch.setattr(images, "PART_PIXELS", pixels)
        out = tmp_path / f"{count}"
        held.clear()
        score_images(pictures, tmp_path / "p.txt", config, out, evals=["geneval", "quality", "diversity"])
        assert held == {256: [6], 1: [1] * 6, 4: [2, 2, 2]}[count] + [2, 2, 2]
        tables.append(pd.read_parquet(out / "evals.parquet"))
    order = ["metric", "prompt_index", "image"]
    whole, *others = [table.sort_values(order, ignore_index=True) for table in tables]
    for other in others:
        pd.testing.assert_frame_equal(whole, other)
    assert whole[whole.metric == "geneval_colors"].value.isna().sum() == 4  # of the prompts of other kinds


def test_a_damaged_file_is_told_before_any_model_is_loaded(tmp_path: Path) -> None:
    pictures = picture_folder(tmp_path / "pictures", [0, 50])
    content = (pictures / "1.png").read_bytes()
    (pictures / "1.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "p.txt").write_text("a")
    steps: list[str] = []
    with pytest.raises(UserError, match=r"cannot open the image .*1\.png"):
        score_images(pictures, tmp_path / "p.txt", toy_config(write_task(tmp_path)), None, advance=steps.append)
    assert steps == ["reading images"]


def test_evals_pass_over_prompts_that_they_say_nothing_about(tmp_path: Path) -> None:
    pictures = picture_folder(tmp_path / "pictures", [0, 255], [(64, 64)] * 2)
    (tmp_path / "p.txt").write_text('the word "CAT"\na red circle')
    config, settings = load_config(options={"task": "geneval"}), {"ocr": {"reader": "rapidocr"}}
    found = score_images(pictures, tmp_path / "p.txt", config, None, evals=["ocr", "clip_agreement"], settings=settings)
    assert (found.metrics["ocr"].n, found.metrics["clip_agreement"].n) == (1, 2)
    assert found.failed_scores == 2  # ocr and ocr_exact of the scene


def test_the_command_prints_one_document(tmp_path: Path) -> None:
    pictures = picture_folder(tmp_path / "pictures", [0, 255])
    (tmp_path / "p.jsonl").write_text('{"prompt": "é"}')
    arguments = ("--images", str(pictures), "--prompts", "p.jsonl", "--evals", "quality", "--json")
    done = alignbench("eval", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["metrics"]) == {"sharpness", "brightness", "entropy", "black_or_white"}


def test_a_config_of_another_place_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"seed": 0}))
    config = load_config(file=tmp_path / "config.yaml")
    with pytest.raises(UserError, match="has no checkpoint"):
        score_model(config, None, run=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "choose what to evaluate"),
        (["--pipeline", "tiny", "--images", "x"], "choose what to evaluate"),
        (["--images", "x"], "--images and --prompts go together"),
        (["--checkpoint", "nowhere"], "nowhere is not a run folder"),
        (["--pipeline", "no/where"], "is not a diffusers folder"),
        (["--pipeline", "tiny", "--evals", "ocrr"], "there is no eval 'ocrr'; did you mean 'ocr'"),
        (["--pipeline", "tiny", "--evals", "quality", "--set", "evals.ocr.batch=3"], "the eval 'ocr', which is not asked for"),
    ],
)  # fmt: skip
def test_wrong_input_gets_one_sentence(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = in_this_process("eval", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_draws_too_few_pictures_for_a_metric_is_refused_before_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(write_task(tmp_path), evaluation={"prompts": 2, "images_per_prompt": 2})
    monkeypatch.setattr(Diversity, "fewest", 3)
    steps: list[str] = []
    with pytest.raises(UserError, match=r"diversity needs 3 images of a prompt, but evaluation\.images_per_prompt is 2"):
        score_model(config, None, advance=steps.append)
    assert "drawing images" not in steps
