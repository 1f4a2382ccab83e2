import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from alignbench import UserError, run
from alignbench.config import load_config
from alignbench.record import EvalRecord
from alignbench.scoring import score_model, score_pictures
from tests.plugins import toy_config, write_task

ROOT = Path(__file__).parents[2]


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
    other = load_config(options={**config.resolved(), "backbone": "gaussian_mixture"})
    with pytest.raises(UserError, match="of another model"):
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
    record = score_pictures(pictures, tmp_path / "p.txt", config, None)
    # Prompt means 0.1 and 1.0; one of three channels differs by a fifth of its range, and nothing.
    assert record.metrics["brightness"].value == pytest.approx(0.55)
    assert record.metrics["pixel_diversity"].value == pytest.approx(np.sqrt(0.2**2 / 3) / 2)
    assert record.metrics["brightness"].n == 2
    assert "lgmd" not in record.metrics
    assert (record.protocol.source, record.protocol.pictures, record.protocol.steps) == ("images", 4, None)


def test_failed_scores_are_counted_and_pictures_of_two_sizes_cannot_be_compared(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path, "Sometimes"))
    pictures = picture_folder(tmp_path / "pictures", [1, 2, 3, 4])
    (tmp_path / "p.txt").write_text("a\nb")
    assert score_pictures(pictures, tmp_path / "p.txt", config, None).failed_scores == 2
    uneven = picture_folder(tmp_path / "uneven", [1, 2], [(4, 4), (5, 4)])
    (tmp_path / "q.txt").write_text("a")
    with pytest.raises(UserError, match="'a' differ in size"):
        score_pictures(uneven, tmp_path / "q.txt", config, None, evals=["diversity"])
    assert score_pictures(uneven, tmp_path / "q.txt", config, None, evals=["quality"]).metrics["brightness"].n == 1


def test_evals_pass_over_prompts_that_they_say_nothing_about(tmp_path: Path) -> None:
    pictures = picture_folder(tmp_path / "pictures", [0, 255], [(64, 64)] * 2)
    (tmp_path / "p.txt").write_text('the word "CAT"\na red circle')
    config, settings = load_config(options={"task": "geneval"}), {"ocr": {"reader": "rapidocr"}}
    found = score_pictures(pictures, tmp_path / "p.txt", config, None, evals=["ocr", "clip_agreement"], settings=settings)
    assert (found.metrics["ocr"].n, found.metrics["clip_agreement"].n) == (1, 2)
    assert found.failed_scores == 2  # ocr and ocr_exact of the scene


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from alignbench.__main__ import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, str(ROOT), "eval", *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_the_command_prints_one_document(tmp_path: Path) -> None:
    pictures = picture_folder(tmp_path / "pictures", [0, 255])
    (tmp_path / "p.jsonl").write_text('{"prompt": "é"}')
    arguments = ("--images", str(pictures), "--prompts", "p.jsonl", "--evals", "quality", "--json")
    done = command(*arguments, cwd=tmp_path)
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
        ([], "say what to score"),
        (["--pipeline", "tiny", "--images", "x"], "say what to score"),
        (["--images", "x"], "--images and --prompts go together"),
        (["--checkpoint", "nowhere"], "nowhere is no folder of a run"),
        (["--pipeline", "no/where"], "is no diffusers folder"),
        (["--pipeline", "tiny", "--evals", "ocrr"], "there is no eval 'ocrr'; did you mean 'ocr'"),
        (["--pipeline", "tiny", "--evals", "quality", "--set", "evals.ocr.batch=3"], "the eval 'ocr', which is not asked for"),
    ],
)  # fmt: skip
def test_wrong_input_gets_one_sentence(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
