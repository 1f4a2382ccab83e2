"""The training of the embedded model: its latents, its data and that it goes on where it stopped."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn import functional

from alignbench.embedded import train_tiny as train_tiny_module
from alignbench.embedded.drawing.scenes import NUMBERS, RELATIONS, TASK_TYPES, sample_scene
from alignbench.embedded.examples import draw_examples, held_out_words, to_pixels
from alignbench.embedded.networks import letter_tokenizer, tokenize
from alignbench.embedded.train_tiny import LatentPool, Phase, TinyTraining, patch_projection, schedule, train_tiny
from alignbench.errors import UserError
from tests.support.faults import CONTEXT

PHASES = (Phase(steps=4, fall=0.4, shards=2, words_share=0.4), Phase(steps=2, rate=0.5, shards=1, words_share=0))
SMALL = TinyTraining(
    threads=1,
    autoencoder_steps=2,
    autoencoder_batch=4,
    compile=False,
    batch=8,
    shard_size=16,
    save_every=2,
    warmup=2,
    phases=PHASES,
)


def with_steps(*steps: int) -> TinyTraining:
    phases = [phase.model_copy(update={"steps": n}) for phase, n in zip(PHASES, steps, strict=True)]
    return SMALL.model_copy(update={"phases": tuple(phases)})


@pytest.fixture(scope="module", autouse=True)
def _workers_need_not_import_torch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tiny_module, "get_context", lambda kind: CONTEXT)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("tiny")
    lines: list[str] = []
    train_tiny(SMALL, folder / "work", folder / "out", lines.append)
    return folder, lines


def test_projection_has_uncorrelated_components_whose_deviations_are_roots() -> None:
    pixels = to_pixels([e.image for e in draw_examples(0, 0, 200, 0.5)])
    kernel, offset = patch_projection(pixels)
    latents = functional.conv2d(pixels, kernel, offset, stride=4).permute(0, 2, 3, 1).flatten(0, 2).double()
    covariance = torch.cov(latents.mT)
    # float32 kernels: a relative error of about 1e-6 of variances of order 1.
    assert torch.allclose(covariance, torch.diag(covariance.diag()), atol=1e-4)
    assert latents.mean(0).abs().max() < 1e-4
    assert covariance.diag().mean().item() == pytest.approx(1.0, abs=1e-4)
    # Independently: deviations are proportional to the square roots of the singular values of the centred patches.
    patches = pixels.numpy().reshape(-1, 3, 16, 4, 16, 4).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 48).astype(np.float64)
    singular = np.linalg.svd(patches - patches.mean(0), compute_uv=False)[: len(covariance)]
    ratio = covariance.diag().sqrt().numpy() / np.sqrt(singular)
    assert ratio == pytest.approx(ratio[0], rel=1e-4)


def test_examples_are_a_pure_function_and_hold_no_word_of_the_task() -> None:
    one, two = (draw_examples(3, 1, 60, 0.5) for _ in range(2))
    assert [e.prompt for e in one] == [e.prompt for e in two]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(one, two, strict=True))
    words = [e.prompt.split('"')[1] for e in draw_examples(3, 2, 400, 1.0)]
    assert len(words) == 400
    assert not held_out_words() & set(words)


def test_a_training_ends_in_a_folder_that_diffusers_opens(trained: tuple[Path, list[str]]) -> None:
    folder, lines = trained
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder / "out")
    picture = pipeline('"HI"', height=64, width=64, num_inference_steps=2, max_sequence_length=1, output_type="np").images[0]
    assert picture.shape == (64, 64, 3)
    assert np.isfinite(picture).all()
    assert any(line.startswith("autoencoder held-out squared error") for line in lines)
    # Tokenizers go by the one name that transformers 4 and 5 both know.
    index = json.loads((folder / "out" / "model_index.json").read_text())
    assert {index[name][1] for name in ("tokenizer", "tokenizer_2", "tokenizer_3")} == {"PreTrainedTokenizerFast"}
    # A T5 without layers is none to transformers 4.
    assert json.loads((folder / "out" / "text_encoder_3" / "config.json").read_text())["num_layers"] == 1


def test_latents_have_unit_variance_over_all_components(trained: tuple[Path, list[str]]) -> None:
    shards = [load_file(path) for path in sorted((trained[0] / "work" / "latents").glob("*.safetensors"))]
    latents = torch.cat([shard["latents"] for shard in shards]).float()
    assert latents.shape == (48, 12, 16, 16)
    # The scale was measured on 16 other images.
    assert latents.std().item() == pytest.approx(1.0, abs=0.25)


def test_a_training_that_was_stopped_ends_with_the_same_weights(
    trained: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(settings: TinyTraining, step: int) -> tuple[int, float]:
        if step == 3:
            raise KeyboardInterrupt
        return schedule(settings, step)

    work, lines = tmp_path / "work", list[str]()
    with monkeypatch.context() as stopped:
        stopped.setattr(train_tiny_module, "schedule", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(SMALL, work, tmp_path / "out", lines.append)
    train_tiny(SMALL, work, tmp_path / "out", lines.append)
    assert "resuming at step 2" in lines
    for name in ("transformer", "text_encoder"):
        (one,), (two,) = (list((folder / "out" / name).glob("*.safetensors")) for folder in (tmp_path, trained[0]))
        a, b = load_file(one), load_file(two)
        assert all(torch.equal(a[key], b[key]) for key in a)
    # The autoencoder was read from the folder of the work, which is nobody else's business.
    assert str(work) not in (tmp_path / "out" / "vae" / "config.json").read_text()


def test_each_phase_has_images_and_a_rate_of_its_own(trained: tuple[Path, list[str]]) -> None:
    pool = LatentPool(SMALL, trained[0] / "work", print)
    unquoted = tokenize(letter_tokenizer(), [""])
    assert all((pool.shard(1, epoch)[2] == unquoted).all() for epoch in range(3))
    assert any((pool.shard(0, epoch)[2] != unquoted).any() for epoch in range(2))
    # Four steps with a warm-up of two, falling to zero over the last 40 %, 1.6 steps; then from a half to zero in two.
    assert [schedule(SMALL, step)[0] for step in range(6)] == [0, 0, 0, 0, 1, 1]
    assert [schedule(SMALL, step)[1] for step in range(6)] == pytest.approx([0.5, 1, 1, 1 / 1.6, 0.5, 0.25])


def test_task_types_are_drawn_as_often_as_asked() -> None:
    types = dict.fromkeys(TASK_TYPES, 0.0) | {"position": 3.0, "counting": 1.0}
    prompts = [e.prompt for e in draw_examples(0, 0, 400, words_share=0, types=types)]
    asked = [any(f" {relation} " in prompt for relation in RELATIONS) for prompt in prompts]
    counted = [any(f"{number} " in prompt for number in NUMBERS.values()) for prompt in prompts]
    assert all(a != c for a, c in zip(asked, counted, strict=True))
    # 300 of 400 expected, with a deviation of 9.
    assert 260 < sum(asked) < 340


def test_a_single_shape_has_one_of_the_given_sizes() -> None:
    metadata = {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "exclude": []}
    rng = np.random.default_rng(0)
    assert {sample_scene(rng, metadata, (32, 48)).shapes[0].size for _ in range(40)} == {32, 48}
    assert {sample_scene(rng, metadata).shapes[0].size for _ in range(40)} == {16, 32}


def test_a_folder_of_another_training_is_refused_and_left_as_it_is(trained: tuple[Path, list[str]]) -> None:
    folder, _ = trained
    before = {p: p.stat().st_mtime_ns for p in (folder / "work").rglob("*")}
    with pytest.raises(UserError, match=r"other settings: batch 8 \(now 9\); choose another --work"):
        train_tiny(SMALL.model_copy(update={"batch": 9}), folder / "work", folder / "another")
    with pytest.raises(UserError, match="other settings: phases"):
        train_tiny(with_steps(5, 2), folder / "work", folder / "another")
    assert {p: p.stat().st_mtime_ns for p in (folder / "work").rglob("*")} == before


def test_phases_can_be_added_to_a_training_that_has_ended(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    work = shutil.copytree(trained[0] / "work", tmp_path / "work")
    lines: list[str] = []
    train_tiny(SMALL.model_copy(update={"phases": (*PHASES, Phase(steps=2, shards=1))}), work, tmp_path / "out", lines.append)
    assert {"drawing and encoding 1 x 16 images", "resuming at step 6"} <= set(lines)
    assert torch.load(work / "transformer.pt", weights_only=True)["step"] == 8


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"warmup": 0}, "warmup"),
        ({"save_every": 0}, "save_every"),
        ({"batch": 128, "shard_size": 64}, "batch=128 images do not"),
    ],
)
def test_settings_that_would_fail_after_hours_are_refused_at_once(settings: dict[str, int], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TinyTraining(**settings)
