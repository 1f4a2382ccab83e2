"""Wan against diffusers: clips of which scorers see some frames, a call without sigmas, texts filled up with zeros."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from alignbench import UserError
from alignbench.backbones.diffusers_folder import DiffusersFolder
from alignbench.backbones.wan import Wan
from alignbench.rollouts.executor import sample
from alignbench.rollouts.noise import normal
from tests.support import family_checks as checks
from tests.support.family_checks import STEPS, Family, FamilyFacts

FRAMES = [0, 3, 5, 8]
"""Four of the nine frames, equally spaced and rounded: 0, 2.7, 5.3, 8."""
SOLVER = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


class WanFamily(Family):
    def draw(self, pipeline: Any, policy: DiffusersFolder, guidance: float, output: str) -> Any:
        # The call has no argument for sigmas, and its own ones for Euler end above 0.
        scheduler = pipeline.scheduler
        scheduler.set_timesteps = partial(
            type(scheduler).set_timesteps, scheduler, sigmas=[1 - i / STEPS for i in range(STEPS)]
        )
        found = super().draw(pipeline, policy, guidance, output)
        return found if output == "latent" else found[:, FRAMES]


WAN = WanFamily(
    "wan",
    lambda g: {"guidance_scale": g},
    own={"num_frames": 9},
    drawn=lambda output: output.frames,
    as_images={"frames": 1},
)


def with_solver(folder: Path, to: Path, **options: Any) -> Path:
    """The folder with the scheduler of the published ones."""
    shutil.copytree(folder, to)
    UniPCMultistepScheduler(**{**SOLVER, **options}).save_pretrained(to / "scheduler")
    with_index(to, scheduler=["diffusers", "UniPCMultistepScheduler"])
    return to


def with_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))


class TestWan(FamilyFacts):
    family = WAN

    def test_a_folder_opens_as_its_family(self, folder: Path) -> None:
        policy = checks.opened(folder)
        assert isinstance(policy, Wan)
        assert policy.guidance == 5.0  # the guidance_scale of the pipeline's call
        # 9 frames are 1 + 8 / 4 latent frames; 16 x 32 pixels are 4 x 8 latents.
        assert policy.latent_shape == (4, 3, 4, 8)
        assert checks.opened(folder, resolution=32, frames=5).latent_shape == (4, 2, 8, 8)
        assert checks.opened(folder, width=16).latent_shape == (4, 3, 4, 4)

    def test_scorers_see_the_frames_that_are_asked_for(self, folder: Path) -> None:
        policy = checks.opened(folder)
        latents = normal([("z", i) for i in range(2)], policy.latent_shape)
        whole = checks.opened(folder, scored_frames=9).decode(latents)
        assert whole.shape == (2, 9, 16, 32, 3)
        assert np.array_equal(policy.decode(latents), whole[:, FRAMES])
        assert np.array_equal(checks.opened(folder, scored_frames=(1, 7)).decode(latents), whole[:, [1, 7]])
        # A single frame is an image.
        assert np.array_equal(checks.opened(folder, scored_frames=1).decode(latents), whole[:, 4])
        assert checks.opened(folder, frames=1).decode(latents[:, :, :1]).shape == (2, 16, 32, 3)

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"frames": 8}, "frames must be 1 more than a multiple of 4 for .*, got 8"),
            ({"width": 20}, "width must be a multiple of 8 pixels for .*, got 20"),
            ({"scored_frames": 0}, "scored_frames must be at least 1, got 0"),
            ({"scored_frames": (0, 9)}, "must be increasing indices below the 9 frames of a clip, got \\[0, 9\\]"),
            ({"scored_frames": (3, 1)}, "must be increasing indices below the 9 frames of a clip, got \\[3, 1\\]"),
        ],
    )
    def test_frames_that_do_not_fit_are_refused(self, folder: Path, settings: dict[str, Any], sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            checks.opened(folder, **settings)

    def test_images_are_encoded_as_clips_of_one_frame_alone(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"cannot be encoded as clips of 9 frames; set backbone\.frames=1"):
            checks.opened(folder).encode_images([np.zeros((16, 32, 3), np.uint8)])

    def test_all_texts_have_the_full_length_and_end_with_zeros(self, folder: Path) -> None:
        texts = checks.opened(folder).encode(checks.PROMPTS).prompts
        assert texts.mask is None
        assert texts.states.shape == (2, 64, 8)
        assert not texts.states[1, 8:].any()
        assert texts.states[1, 0].any()

    def test_a_lora_has_the_places_of_the_published_training(self, folder: Path) -> None:
        ends = checks.adapted_ends(checks.opened(folder))
        assert ends == {f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")}

    def test_a_time_for_every_token_gives_the_same(self, folder: Path, tmp_path: Path) -> None:
        """Wan 2.2 TI2V-5B has `expand_timesteps`."""
        expanded = shutil.copytree(folder, tmp_path / "expanded")
        with_index(expanded, expand_timesteps=True)
        checks.check_draws_alike(WAN, expanded, 2.0)

    def test_a_second_transformer_is_refused(self, folder: Path, tmp_path: Path) -> None:
        """Wan 2.2 A14B has one for small sigmas."""
        two = shutil.copytree(folder, tmp_path / "two")
        shutil.copytree(two / "transformer", two / "transformer_2")
        with_index(two, transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=0.875)
        with pytest.raises(UserError, match="has two transformers \\(transformer_2\\), which alignbench cannot train"):
            checks.opened(two)

    def test_a_shift_that_the_call_does_not_support_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="sets use_dynamic_shifting, which a WanPipeline does not support"):
            checks.opened(WAN.saved(tmp_path / "wan", use_dynamic_shifting=True))

    def test_the_published_solver_is_never_taken_for_euler(self, folder: Path, tmp_path: Path) -> None:
        published = with_solver(folder, tmp_path / "published")
        with pytest.raises(UserError, match=r"is for a UniPCMultistepScheduler, .* Euler steps; set backbone"):
            checks.opened(published)
        # Equally spaced, 1, 2/3, 1/3, 0, with shift 3: sigma = 3 t / (1 + 2 t).
        assert checks.opened(published, euler=True).sigmas(3).tolist() == pytest.approx([1, 6 / 7, 3 / 5, 0])

    def test_many_euler_steps_draw_what_that_solver_draws(self, folder: Path, tmp_path: Path) -> None:
        published = with_solver(folder, tmp_path / "published")
        policy, own = checks.opened(published, euler=True, guidance=1.0), checks.pipeline(published)
        call = {"latents": checks.noise(policy), "height": 16, "width": 32, "num_frames": 9, "guidance_scale": 1.0}
        theirs = own(
            prompt=checks.PROMPTS, num_inference_steps=200, max_sequence_length=64, output_type="latent", **call
        ).frames
        few, many = (sample(policy, checks.PROMPTS, 1, steps, seed=5) for steps in (20, 200))
        # Both tend to the solution of the same ODE. The solver begins at 0.999 and tells the transformer whole time steps.
        assert (many - theirs).norm() < 0.5 * (few - theirs).norm()
        assert (many - theirs).norm() < 0.03 * theirs.norm()

    @pytest.mark.parametrize("option", ["use_karras_sigmas", "shift_terminal"])
    def test_a_solver_with_other_sigmas_is_refused(self, folder: Path, tmp_path: Path, option: str) -> None:
        published = with_solver(folder, tmp_path / "other", **{option: 0.1 if option == "shift_terminal" else True})
        with pytest.raises(UserError, match=f"sets {option}, but backbone.euler=true can only follow a constant flow_shift"):
            checks.opened(published, euler=True)

    def test_the_statistics_of_the_autoencoder_are_undone(self, folder: Path) -> None:
        policy = checks.opened(folder, scored_frames=9)
        latents = torch.randn(2, 4, 3, 4, 8, generator=torch.Generator().manual_seed(0))
        raw = latents * torch.tensor([1.5, 2.0, 0.5, 1.0]).view(4, 1, 1, 1)
        raw = raw + torch.tensor([0.1, -0.2, 0.3, 0.0]).view(4, 1, 1, 1)
        with torch.no_grad():
            expected = policy.pipeline.vae.decode(raw, return_dict=False)[0]
            assert torch.allclose(policy.vae_decode(latents), expected, atol=1e-6)
