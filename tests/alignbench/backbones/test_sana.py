"""SANA against diffusers: an instruction before prompts alone, and a solver that Euler steps replace only on demand."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import DPMSolverMultistepScheduler

from alignbench import UserError
from alignbench.backbones.sana import Sana
from alignbench.rollouts.executor import sample
from tests.support import family_checks as checks
from tests.support.family_checks import STEPS, Family, FamilyFacts

# The pipeline's own sigmas for Euler end above 0, since the shift is applied to their end twice; ours are spaced equally.
SANA = Family(
    "sana",
    lambda g: {"guidance_scale": g},
    own={"sigmas": [1 - i / STEPS for i in range(STEPS)], "use_resolution_binning": False},
)
SOLVER = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


def with_solver(folder: Path, to: Path, **options: Any) -> Path:
    """The folder with the scheduler of the published ones."""
    shutil.copytree(folder, to)
    DPMSolverMultistepScheduler(**{**SOLVER, **options}).save_pretrained(to / "scheduler")
    index = json.loads((to / "model_index.json").read_text())
    (to / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}))
    return to


class TestSana(FamilyFacts):
    family = SANA

    def test_a_folder_opens_as_its_family(self, folder: Path, tmp_path: Path) -> None:
        assert isinstance(checks.opened(folder), Sana)
        bare = shutil.copytree(folder, tmp_path / "bare")
        (bare / "alignbench.json").unlink()
        # 16 latents of 2 pixels: the size of the training, to which the pipeline's call rounds its 1024.
        assert checks.opened(bare).latent_shape == (4, 16, 16)

    def test_a_lora_has_the_places_of_the_published_training(self, folder: Path) -> None:
        ends = checks.adapted_ends(checks.opened(folder))
        assert ends == {f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v")}

    def test_a_solver_of_second_order_is_never_taken_for_euler(self, folder: Path, tmp_path: Path) -> None:
        published = with_solver(folder, tmp_path / "published")
        with pytest.raises(UserError, match="is for a DPMSolverMultistepScheduler, but alignbench takes Euler steps; set"):
            checks.opened(published)
        assert "euler" in checks.opened(folder, euler=True).ineffective_settings()
        assert "euler" not in checks.opened(published, euler=True).ineffective_settings()
        # Equally spaced, 1, 2/3, 1/3, 0, with shift 3: sigma = 3 t / (1 + 2 t).
        assert checks.opened(published, euler=True).sigmas(3).tolist() == pytest.approx([1, 6 / 7, 3 / 5, 0])

    def test_euler_steps_are_the_first_order_of_that_solver(self, folder: Path, tmp_path: Path) -> None:
        published = with_solver(folder, tmp_path / "first", solver_order=1)
        policy, own = checks.opened(published, euler=True, guidance=1.0), checks.pipeline(published)
        call = {"latents": checks.noise(policy), "num_inference_steps": 20, "height": 32, "width": 32, "guidance_scale": 1.0}
        theirs = own(
            prompt=checks.PROMPTS, max_sequence_length=48, use_resolution_binning=False, output_type="latent", **call
        ).images
        ours = sample(policy, checks.PROMPTS, 1, 20, seed=5)
        # Their schedule begins at 0.999 before the shift and ours at 1, and they tell the transformer whole time steps.
        assert (ours - theirs).norm() < 0.02 * theirs.norm()

    @pytest.mark.parametrize(("key", "value"), [("use_flow_sigmas", False), ("prediction_type", "epsilon")])
    def test_a_solver_of_another_process_is_refused(self, folder: Path, tmp_path: Path, key: str, value: object) -> None:
        with pytest.raises(UserError, match=f"is not a schedule of a flow: {key} is"):
            checks.opened(with_solver(folder, tmp_path / "other", **{key: value}), euler=True)
