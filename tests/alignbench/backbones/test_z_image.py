"""Z-Image against diffusers: lists of images and texts, time that runs the other way, guidance that is counted from 0."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignbench.backbones.z_image import ZImage
from tests.support import family_checks as checks
from tests.support.family_checks import PROMPTS, Family, FamilyFacts


def velocity_of(answers: Any) -> Tensor:
    return -torch.stack(list(answers)).squeeze(2)


Z_IMAGE = Family("z_image", lambda g: {"guidance_scale": g - 1}, unlayout=velocity_of)


class TestZImage(FamilyFacts):
    family = Z_IMAGE

    def test_a_folder_opens_as_its_family(self, folder: Path) -> None:
        policy = checks.opened(folder)
        assert isinstance(policy, ZImage)
        # The pipeline's call has guidance_scale 5, which it adds to the prompt's own velocity.
        assert policy.guidance == 6.0
        assert checks.opened(folder, resolution=32).latent_shape == (4, 16, 16)

    def test_without_a_size_of_its_own_a_folder_draws_1024_pixels(self, folder: Path, tmp_path: Path) -> None:
        policy = checks.opened(folder)
        policy.call["height"] = None
        assert policy.default_side == 1024

    def test_encoding_leaves_the_prompts_as_they_are(self, folder: Path) -> None:
        prompts = list(PROMPTS)
        policy = checks.opened(folder)
        policy.embed(policy._text_pipeline(), prompts)
        assert prompts == PROMPTS

    def test_a_lora_has_the_places_of_the_published_training(self, folder: Path) -> None:
        policy = checks.opened(folder)
        ends = {"attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"}
        assert checks.adapted_ends(policy) == ends
