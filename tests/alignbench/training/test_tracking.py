import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from accelerate import PartialState
from PIL import Image

from alignbench import UserError
from alignbench.config.run_config import load_config
from alignbench.training import tracking
from alignbench.training.run import run
from tests.support.plugins import toy_config, write_task


def scalars(folder: Path) -> Any:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(folder))
    found.Reload()
    return found


def test_tensorboard_gets_each_iteration_and_the_result(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    task = write_task(tmp_path)
    result = run(toy_config(task, trackers="tensorboard"), tmp_path / "tracked")
    found = scalars(tmp_path / "tracked" / "tensorboard")
    table = pd.read_parquet(tmp_path / "tracked" / "metrics.parquet")
    for name in ("reward", "loss", "model_rows"):
        events = found.Scalars(f"train/{name}")
        assert [e.step for e in events] == [0, 1, 2]
        assert [e.value for e in events] == pytest.approx(list(table[name]), rel=1e-6)  # TensorBoard's are float32
    (event,) = found.Scalars("difference/brightness")
    assert (event.step, event.value) == (3, pytest.approx(result.metrics["brightness"].difference.value, rel=1e-6))


def test_tensorboard_gets_images_of_each_evaluation(tmp_path: Path) -> None:
    """Of a toy of 3 x 3 pixels, enlarged twice: 6 prompts of 3 images, in rows of 15 images."""
    pytest.importorskip("tensorboard")
    evaluation = {"prompts": 6, "images_per_prompt": 3, "steps": 4, "every": 2, "validation_images": 2}
    config = toy_config(write_task(tmp_path), trackers="tensorboard", save_images=True, evaluation=evaluation)
    run(config, tmp_path / "tracked")
    found = scalars(tmp_path / "tracked" / "tensorboard")
    steps = {name: [event.step for event in found.Images(f"samples/{name}")] for name in ("base", "validation", "trained")}
    assert steps == {"base": [0], "validation": [0, 2, 3], "trained": [3]}
    (event,) = found.Images("samples/base")
    assert (event.width, event.height) == (2 * 15 * 3, 2 * 2 * 3)
    sheet = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert np.array_equal(sheet, np.asarray(Image.open(tmp_path / "tracked" / "samples" / "base.png")))


def test_no_image_is_logged_where_none_is_saved(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(toy_config(write_task(tmp_path), trackers="tensorboard"), tmp_path / "tracked")
    assert scalars(tmp_path / "tracked" / "tensorboard").Tags()["images"] == []


def test_no_number_depends_on_a_tracker_and_there_is_none_by_default(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    task = write_task(tmp_path)
    plain, tracked = (run(toy_config(task, trackers=t), tmp_path / str(len(t))) for t in ((), ("tensorboard",)))
    assert load_config().trackers == ()
    assert plain.metrics == tracked.metrics
    assert {f.name for f in (tmp_path / "1").iterdir()} - {f.name for f in (tmp_path / "0").iterdir()} == {"tensorboard"}


def test_what_a_killed_run_logged_behind_its_checkpoint_is_not_shown_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard numbers the files that a process opens within a second, and would read the tenth before the ninth."""
    writers = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    monkeypatch.setattr(writers, "_global_uid", writers.AtomicCounter(0))
    config = toy_config(write_task(tmp_path), trackers=["tensorboard"])
    for start, stop in ((0, 4), (2, 5)):
        with tracking.Tracking(config, tmp_path, start) as opened:
            for i in range(start, stop):
                opened.log({"iteration": i, "reward": 10 * start + i, "splits": "1,2"})
    events = scalars(tmp_path / "tensorboard").Scalars("train/reward")
    assert [(e.step, e.value) for e in events] == [(0, 0), (1, 1), (2, 22), (3, 23), (4, 24)]


def test_weights_and_biases_stays_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setattr(PartialState, "_shared_state", {})  # as in a process where nothing has used accelerate before
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    run(toy_config(write_task(tmp_path), trackers=["wandb"], save_images=True), tmp_path / "out")
    (folder,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    logged = log.read_bytes()
    for key in (b"train/reward", b"final/brightness", b"optimizer.lr", b"samples/base", b"samples/trained"):
        assert key in logged
    assert list(folder.rglob("samples/trained_*.png"))


def test_a_missing_package_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb, which is not installed: pip install 'alignbench\[wandb\]', or leave it out"):
        run(toy_config(write_task(tmp_path), trackers=["wandb"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(UserError, match=r"trackers\.0: input should be 'tensorboard' or 'wandb', got 'tensorbord'"):
        load_config(sets=["trackers=[tensorbord]"])
