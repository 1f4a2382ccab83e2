"""The best reward at a divergence, against tilts by other functions."""

import pytest
import torch

from alignbench.backbones.mixture.known_target import known_target
from alignbench.backbones.mixture.mixtures import EXTENT, midpoints
from alignbench.backbones.mixture.scenarios import world


@pytest.mark.parametrize("prompt", ["equal_modes 0", "rare_mode 1", "narrow_peak 2"])
def test_no_distribution_exceeds_the_best_reward_at_its_divergence(prompt: str) -> None:
    target, w = known_target(prompt, 2, 4.0), world(prompt)
    reward, kl = target.tilt(4.0)
    assert target.best_reward(kl) == pytest.approx(reward, abs=1e-6)  # that of the target, at the target's divergence
    grid, cell = midpoints(2, 120, EXTENT)
    base = torch.exp(w.base.log_density(grid)) * cell
    generator = torch.Generator().manual_seed(0)
    for beta in (0.5, 2.0, 6.0):
        # Tilted by the reward and by something else: not the best use of a divergence.
        other = torch.sin(grid @ torch.randn(2, generator=generator, dtype=torch.float64))
        distribution = base * torch.exp(beta * w.reward(grid) + other)
        distribution = distribution / distribution.sum()
        spent = float((distribution * torch.log(distribution / base)).nansum())
        assert float((distribution * w.reward(grid)).sum()) < target.best_reward(spent)
