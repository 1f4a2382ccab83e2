"""FLUX.2 against diffusers: dev with its distilled guidance, and [klein] with true guidance."""

import json
import math
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor

from alignbench import UserError
from alignbench.backbones.flux2 import Flux2
from alignbench.backbones.flux2_klein import Flux2Klein
from alignbench.backbones.flux2_layout import Flux2Layout, empirical_mu, image_positions, text_positions
from tests.support import family_checks as checks
from tests.support.family_checks import Family, FamilyFacts


def unpacked(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (4, 4))


def packed(policy: object, latents: Tensor) -> Tensor:
    return latents.flatten(2).transpose(1, 2)


def unnormalised(policy: object, latents: Tensor) -> Tensor:
    assert isinstance(policy, Flux2Layout)
    return policy.unnormalised(latents)


DEV = Family("flux2", lambda g: {"guidance_scale": g}, unlayout=unpacked, final=packed, embedded=True)
KLEIN = Family("flux2_klein", lambda g: {"guidance_scale": g}, unlayout=unpacked, final=unnormalised)
both = pytest.mark.parametrize("family", [DEV, KLEIN], ids=lambda family: family.name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family.name: family.saved(tmp_path_factory.mktemp(family.name)) for family in (DEV, KLEIN)}


class TestDev(FamilyFacts):
    family = DEV
    memory_tolerance = 0.1  # more is told than is given, never less


class TestKlein(FamilyFacts):
    family = KLEIN
    memory_tolerance = 0.1


def test_a_folder_opens_as_its_family(folders: dict[str, Path]) -> None:
    assert isinstance(checks.opened(folders["flux2"]), Flux2)
    assert isinstance(checks.opened(folders["flux2_klein"]), Flux2Klein)


@both
def test_a_lora_has_the_places_of_the_published_trainings(folders: dict[str, Path], family: Family) -> None:
    double = {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"}
    assert checks.adapted_ends(checks.opened(folders[family.name])) == double | {"attn.to_qkv_mlp_proj", "attn.to_out"}


def test_the_shift_follows_the_tokens_and_the_steps(folders: dict[str, Path]) -> None:
    # From the constants of FLUX.2's code for 10 steps and for 200, with 1024 tokens.
    assert empirical_mu(1024, 10) == pytest.approx(8.73809524e-05 * 1024 + 1.89833333)
    assert empirical_mu(1024, 200) == pytest.approx(0.00016927 * 1024 + 0.45666666)
    # Halfway between them: 105 steps.
    assert empirical_mu(1024, 105) == pytest.approx((empirical_mu(1024, 10) + empirical_mu(1024, 200)) / 2)
    assert empirical_mu(4301, 10) == empirical_mu(4301, 200) == pytest.approx(0.00016927 * 4301 + 0.45666666)
    policy = checks.opened(folders["flux2"])
    assert policy.shift_of(4) == pytest.approx(math.exp(empirical_mu(16, 4)))
    assert policy.shift_of(4) != policy.shift_of(50)


@pytest.mark.parametrize("options", [{"use_dynamic_shifting": False, "shift": 2.0}, {"time_shift_type": "linear"}])
def test_other_schedules_that_are_followed_draw_alike(tmp_path: Path, options: dict[str, object]) -> None:
    checks.check_draws_alike(KLEIN, KLEIN.saved(tmp_path / "klein", **options), 1.0)


def test_positions_are_those_of_diffusers() -> None:
    theirs = diffusers.Flux2Pipeline._prepare_latent_ids(torch.zeros(1, 4, 2, 3))[0]
    assert torch.equal(image_positions(2, 3), theirs)
    assert torch.equal(text_positions(5), diffusers.Flux2Pipeline._prepare_text_ids(torch.zeros(1, 5, 2))[0])


def test_a_distilled_klein_draws_without_guidance(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["flux2_klein"], tmp_path / "distilled")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    assert checks.opened(folder).guidance == 1.0
    with pytest.raises(UserError, match="is distilled \\(is_distilled\\) and draws without guidance; leave guidance at 1"):
        checks.opened(folder, guidance=4.0)
    assert checks.opened(folders["flux2_klein"]).guidance == 4.0  # the default of the pipeline's call
