"""Folders as they are passed around: half-precision files, shards, parts that are left out, missing or damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignbench import UserError, load_backbone
from alignbench.backbones.diffusers_folder import DiffusersFolder
from alignbench.training.exporting import _write_pipeline
from tests.support.pipelines import SIDE, save_pipeline

VAE = "vae/diffusion_pytorch_model.safetensors"
INDEX = "model_index.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline("sd3", tmp_path_factory.mktemp("sd3"))


def opened(folder: Path, device: str = "cpu") -> DiffusersFolder:
    policy = load_backbone(str(folder), device=device, resolution=SIDE, guidance=1.0, lora_rank=1)
    assert isinstance(policy, DiffusersFolder)
    policy.components()
    return policy


def answers(folder: Path) -> Tensor:
    policy = opened(folder)
    policy.call["max_sequence_length"] = 8
    with torch.no_grad():
        return policy.velocity(
            torch.ones(1, *policy.latent_shape), torch.tensor([0.5]), policy.encode(["cat"]), torch.tensor([0])
        )


def refused(folder: Path) -> str:
    """What the run says, and the dry run in the same words."""
    said = []
    for device in ("meta", "cpu"):
        with pytest.raises(UserError) as told:
            opened(folder, device).encode(["cat"])
        said.append(str(told.value))
    assert said[0] == said[1]
    assert "\n" not in said[0]
    return said[0]


def halves(folder: Path, part: str = ".") -> None:
    for file in (folder / part).rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("part", [".", "transformer"])
def test_weights_under_a_variants_name_open_as_plain_ones_do(base: Path, tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(base, tmp_path / "half")
    halves(folder, part)
    assert torch.equal(answers(folder), answers(base))
    assert opened(folder, "meta").parts.variants["transformer"] == "fp16"


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_open_as_one_file_does(base: Path, tmp_path: Path, variant: str | None) -> None:
    StableDiffusion3Pipeline.from_pretrained(base).save_pretrained(tmp_path, max_shard_size="20KB", variant=variant)
    assert len(list((tmp_path / "transformer").glob("*-of-*"))) > 1
    # The same numbers at other places in memory, which the order of float32 sums may depend on.
    assert torch.allclose(answers(tmp_path), answers(base), atol=1e-5)
    assert set(opened(tmp_path, "meta").parts.variants.values()) == {variant}
    next((tmp_path / "vae").glob("*-of-*")).unlink()
    assert "vae lacks diffusion_pytorch_model" in refused(tmp_path)


def test_plain_weights_come_before_a_variants(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "both")
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"never read")
    assert opened(folder).parts.variants["vae"] is None
    (folder / VAE).rename(folder / "vae" / "diffusion_pytorch_model.ema.safetensors")
    assert "weights of several variants (ema, fp16) and no plain ones" in refused(folder)


def test_a_folder_of_a_variant_is_exported_so_that_plain_diffusers_opens_it(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "half")
    halves(folder)
    (tmp_path / "out").mkdir()
    policy = load_backbone(str(folder), device="cpu", resolution=SIDE, train="full")
    assert isinstance(policy, DiffusersFolder)
    _write_pipeline(policy, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in folder.iterdir()}
    theirs = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out", variant="fp16")
    assert all(torch.equal(a, b) for a, b in zip(theirs.transformer.parameters(), policy.parameters(), strict=True))


@pytest.mark.parametrize("entries", [{"text_encoder_3": [None, None], "tokenizer_3": [None, None]}, None])
def test_sd3_opens_without_its_third_encoder(base: Path, tmp_path: Path, entries: dict[str, Any] | None) -> None:
    """Left out by null, or not named at all; its states are zeros then, as diffusers has it."""
    folder = shutil.copytree(base, tmp_path / "two")
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
    index = json.loads((folder / INDEX).read_text())
    named = {name: value for name, value in index.items() if not name.endswith("_3")}
    (folder / INDEX).write_text(json.dumps({**named, **(entries or {})}))
    policy = opened(folder)
    policy.call["max_sequence_length"] = 8
    states = policy.encode(["cat"]).prompts.states
    assert states[:, -8:].abs().max() == 0 < states.abs().max()
    on_meta = opened(folder, "meta")
    on_meta.call["max_sequence_length"] = 8
    assert on_meta.encode(["cat"]).prompts.states.shape == states.shape
    assert set(policy.components()) == {"transformer", "vae", "text_encoder", "text_encoder_2"}


def without_weight(file: Path) -> None:
    weights = load_file(file)
    save_file({name: weights[name] for name in sorted(weights)[1:]}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: shutil.rmtree(d / "text_encoder_3"), "lacks text_encoder_3/config.json, though model_index.json names"),
        (lambda d: shutil.rmtree(d / "text_encoder_3"), "set text_encoder_3 and tokenizer_3 to [null, null]"),
        (lambda d: shutil.rmtree(d / "vae"), "lacks vae/config.json, though model_index.json names a vae: download it"),
        (lambda d: change(d / INDEX, vae=[None, None]), "leaves out vae, which alignbench needs"),
        (lambda d: change(d / INDEX, tokenizer_3=[None, None]), "has a text_encoder_3 but no tokenizer_3"),
        (lambda d: change(d / INDEX, vae=["os", "system"]), "names os.system as its vae; alignbench opens diffusers's"),
        (lambda d: change(d / INDEX, vae=["diffusers", "AutoencoderTiny"]), "names diffusers.AutoencoderTiny as its vae"),
        (lambda d: change(d / INDEX, vae="AutoencoderKL"), "leaves out vae"),
        (lambda d: change(d / INDEX, **{"../..": ["diffusers", "AutoencoderKL"]}), "names a component '../..', which a"),
        (lambda d: change(d / INDEX, **{"/etc": ["diffusers", "AutoencoderKL"]}), "names a component '/etc', which a"),
        (lambda d: (d / VAE).unlink(), "vae lacks weights: there is no diffusion_pytorch_model.safetensors"),
        (lambda d: (d / VAE).rename(d / "vae/x.bin"), "lacks weights: it has x.bin, but alignbench reads only safetensors"),
        (lambda d: (d / VAE).write_text("version https://git-lfs.github.com/spec/v1\n"), "a Git LFS pointer instead of"),
        (lambda d: (d / VAE).write_bytes((d / VAE).read_bytes()[:-1]), f"{VAE} is damaged or incomplete"),
        (lambda d: (d / "vae" / "config.json").write_text("{"), "vae/config.json: it is not valid JSON (line 1, column 2"),
        (lambda d: (d / "tokenizer" / "tokenizer.json").write_text("{"), "tokenizer does not open as a "),
    ],
)
def test_what_a_run_would_refuse_a_dry_run_refuses_alike(
    base: Path, tmp_path: Path, damage: Callable[[Path], Any], says: str
) -> None:
    folder = shutil.copytree(base, tmp_path / "damaged")
    damage(folder)
    assert says in refused(folder)


def test_an_index_of_shards_names_files_beside_it(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "outside")
    (folder / VAE).unlink()
    contents: list[Any] = [{"weight_map": {"a": "../../weights.safetensors"}}, {"weight_map": {}}, {"weight_map": {"a": 1}}, []]
    for content in contents:
        (folder / f"{VAE}.index.json").write_text(json.dumps(content))
        assert "is not an index of weights in the same folder" in refused(folder)


@pytest.mark.parametrize("file", ["transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_weights_that_would_be_drawn_at_random_are_refused(base: Path, tmp_path: Path, file: str) -> None:
    folder = shutil.copytree(base, tmp_path / "less")
    without_weight(folder / file)
    with pytest.raises(UserError, match="lacks 1 of its weights, among them "):
        answers(folder)
