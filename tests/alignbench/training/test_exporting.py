"""A run on a small random Stable Diffusion 3, exported, and opened by plain diffusers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from diffusers import StableDiffusion3Pipeline

from alignbench import UserError, load_backbone, run
from alignbench.backbone import temporarily_set
from alignbench.config.run_config import RunConfig, load_config
from alignbench.load import load_configured_backbone
from alignbench.rollouts.executor import sample
from alignbench.rollouts.noise import group_keys, normal
from alignbench.training import exporting
from alignbench.training.checkpoint import policy_weights
from alignbench.training.exporting import ABOUT, export
from alignbench.training.tensors import PolicyWeights
from tests.support.pipelines import SIDE, save_pipeline
from tests.support.plugins import toy_config, write_task

PROMPTS = ["a red circle", 'the word "CAT"']
STEPS, SEED = 3, 7
CALL = {"height": SIDE, "width": SIDE, "max_sequence_length": 8, "num_inference_steps": STEPS, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a card, and the call that its images are judged by."""
    folder = save_pipeline("sd3", tmp_path_factory.mktemp("base"))
    (folder / "alignbench.json").write_text(json.dumps({"call": CALL}))
    (folder / "README.md").write_text("What these very weights can do.")
    return folder


def trained(folder: Path, base: Path, **settings: Any) -> RunConfig:
    """A run of two updates that move the policy far, in `folder/run`; returns its configuration."""
    backbone = {"name": str(base), "lora_rank": 4, "lora_alpha": 6.0, **settings}
    changes: dict[str, Any] = {"backbone": backbone, "iterations": 3, "ema": {"decay": 0.5, "every": 1}}
    config = toy_config(
        write_task(folder),
        **changes,
        optimizer={"lr": 0.1},
        evaluation={"prompts": 2, "images_per_prompt": 2, "steps": 2},
        prompts_per_iteration=1,
        checkpoint_every=1,
        checkpoints_kept=3,
        best_window=1,
    )
    run(config, folder / "run")
    return config


def plainly_drawn(pipeline: Any) -> np.ndarray:
    """What diffusers draws, in grey levels; its own schedule ends at sigma 0.001, ours is equally spaced down to 0."""
    pipeline.set_progress_bar_config(disable=True)
    keys = [("evaluation", SEED, *key, 0) for key in group_keys(PROMPTS)]
    noise = normal(keys, (4, SIDE // 2, SIDE // 2))
    sigmas = [1 - i / STEPS for i in range(STEPS)]
    return np.round(pipeline(PROMPTS, latents=noise, sigmas=sigmas, output_type="np", **CALL).images * 255)


def ours_drawn(config: RunConfig, checkpoints: Path, best_window: int | None = None) -> np.ndarray:
    policy = load_configured_backbone(config)
    weights = policy_weights(checkpoints, best_window)
    with temporarily_set(list(policy.parameters()), weights.in_order(policy.trainable())):
        return policy.decode(sample(policy, PROMPTS, 1, STEPS, SEED)).astype(float)


def test_an_exported_lora_draws_in_plain_diffusers_what_the_policy_draws(tmp_path: Path, base: Path) -> None:
    config = trained(tmp_path, base)
    said = export(config, tmp_path / "run", tmp_path / "out")
    assert said.endswith(f'(ema weights of iteration 3); in Python: pipeline.load_lora_weights("{tmp_path / "out"}")')
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"pytorch_lora_weights.safetensors", ABOUT}
    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    untrained = plainly_drawn(pipeline)
    pipeline.load_lora_weights(tmp_path / "out")
    theirs = plainly_drawn(pipeline)
    assert np.abs(theirs - untrained).max() > 10  # or equality would show little
    # One grey level is the rounding of either side.
    assert np.abs(theirs - ours_drawn(config, tmp_path / "run" / "checkpoints")).max() <= 1


def test_exported_full_weights_are_a_folder_that_plain_diffusers_opens(tmp_path: Path, base: Path) -> None:
    config = trained(tmp_path, base, train="full")
    export(config, tmp_path / "run", tmp_path / "out")
    theirs = plainly_drawn(StableDiffusion3Pipeline.from_pretrained(tmp_path / "out"))
    assert np.abs(theirs - plainly_drawn(StableDiffusion3Pipeline.from_pretrained(base))).max() > 10
    assert np.abs(theirs - ours_drawn(config, tmp_path / "run" / "checkpoints")).max() <= 1
    # And so does alignbench, with the same call; the base model's card is about other weights.
    assert (tmp_path / "out" / "alignbench.json").read_bytes() == (base / "alignbench.json").read_bytes()
    assert not (tmp_path / "out" / "README.md").exists()
    again = load_configured_backbone(load_config(options={"backbone": {"name": str(tmp_path / "out")}, "threads": 1}))
    with again.reference():
        assert np.abs(again.decode(sample(again, PROMPTS, 1, STEPS, SEED)) - theirs).max() <= 1


def test_the_best_checkpoint_can_be_exported_instead(tmp_path: Path, base: Path) -> None:
    config = trained(tmp_path, base)
    checkpoints = tmp_path / "run" / "checkpoints"
    best = policy_weights(checkpoints, best_window=1).iteration
    export(config, tmp_path / "run", tmp_path / "out", which="best")
    about = json.loads((tmp_path / "out" / ABOUT).read_text())
    assert (about["which"], about["iteration"], about["run"]) == ("best", best, "run")
    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    pipeline.load_lora_weights(tmp_path / "out")
    assert np.abs(plainly_drawn(pipeline) - ours_drawn(config, checkpoints, best_window=1)).max() <= 1


def test_a_file_that_comes_while_the_model_is_loaded_is_not_removed(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, load = (
        load_config(preset="smoke", options={"backbone": str(base), "task": str(write_task(tmp_path))}),
        load_backbone,
    )
    monkeypatch.setattr(exporting, "policy_weights", lambda *_: PolicyWeights("raw", 1, {}))
    monkeypatch.setattr(PolicyWeights, "in_order", lambda self, model: [p for p in model.parameters() if p.requires_grad])

    def slowly(*_: Any) -> Any:
        (tmp_path / "out" / "theirs").write_text("mine")
        return load(str(base), device="cpu")

    monkeypatch.setattr(exporting, "load_configured_backbone", slowly)
    with pytest.raises(UserError, match="out exists already"):
        export(config, tmp_path, tmp_path / "out")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["theirs"]


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    config = toy_config(write_task(tmp_path))
    run(config, tmp_path / "run")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="taken exists already; choose another --out"):
        export(config, tmp_path / "run", tmp_path / "taken")
    assert [f.name for f in (tmp_path / "taken").iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="is not a diffusers model, so there is nothing to export"):
        export(config, tmp_path / "run", tmp_path / "out")
    with pytest.raises(UserError, match="--which takes last or best, got 'bset'; did you mean 'best'"):
        export(config, tmp_path / "run", tmp_path / "out", which="bset")
    with pytest.raises(UserError, match="has no checkpoint"):
        export(config, tmp_path, tmp_path / "out")
    unkept = load_config(options=yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) | {"best_window": None})
    with pytest.raises(UserError, match="kept no best checkpoint: its best_window is null"):
        export(unkept, tmp_path / "run", tmp_path / "out", which="best")
    assert not (tmp_path / "out").exists()
