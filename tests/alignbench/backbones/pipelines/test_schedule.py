"""The sigmas of a folder's schedule."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from alignbench.backbones.pipelines.schedule import FOLLOWED, Schedule


def of(**options: object) -> Schedule:
    defaults = dict(FlowMatchEulerDiscreteScheduler().config)
    return Schedule({**{key: defaults[key] for key in FOLLOWED}, **options})


def test_a_terminal_sigma_stretches_the_schedule_to_it() -> None:
    # Equally spaced: 1, 3/4, 1/2, 1/4, 0. The distances 1/4, 1/2, 3/4 to 1 are stretched by 0.9 / (3/4) = 1.2.
    assert of(shift_terminal=0.1).sigmas(4, 1.0).tolist() == pytest.approx([1, 0.7, 0.4, 0.1, 0])


@pytest.mark.parametrize("options", [{}, {"shift_terminal": 0.02}, {"shift_terminal": 0.5}])
def test_sigmas_are_those_of_diffusers(options: dict[str, float]) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0, **options)
    theirs.set_timesteps(sigmas=[1 - i / 7 for i in range(7)])
    # Theirs are computed in float32, ours in float64.
    assert torch.allclose(of(**options).sigmas(7, 3.0), theirs.sigmas, atol=1e-6)


def test_a_single_step_goes_from_noise_to_the_image() -> None:
    assert of(shift_terminal=0.1).sigmas(1, 3.0).tolist() == [1, 0]
