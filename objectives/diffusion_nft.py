"""diffusion_nft: `nft` as it was published, against a behaviour policy that lags, with the deviation of the whole batch.

The loss is that of `nft`; only the defaults differ. They are those of the authors' code for GenEval, PickScore and HPSv2: the
behaviour policy is a moving average that is another model from the second update on, so that the contrast of v+ and v- acts;
rewards are divided by the standard deviation of the whole batch; images are noised to the sigmas of the rollout's own steps.

Source: Zheng et al. 2025 (arXiv 2509.16117) and its code. How this differs from them: docs/methods/nft.md.

Fixed point: as for `nft`.
"""

from typing import Literal

from pydantic import Field

from alignbench.objective import Strength
from alignbench.rollouts.terms import Times
from objectives.nft import NFT


class DiffusionNFT(NFT):
    """Negative-aware flow matching with the published settings."""

    class Settings(NFT.Settings):
        std: Literal["group", "batch"] = "batch"
        """Which standard deviation rewards are divided by. group: that of their group. batch: that of all rewards of the
        batch, as published."""
        times: Times = "steps"
        """How the sigmas of noised images are drawn. schedule: from a logit-normal distribution, shifted as the model's own
        schedule is. logit_normal: without that shift. uniform: evenly between 0 and 1. steps: from the steps of the rollout,
        each of them once before any is repeated, as published."""
        decay_rate: float = Field(1e-3, gt=0)
        """By how much the behaviour policy's decay d grows with each update. It is above 0, so that the behaviour policy
        lags."""

    settings: Settings
    strength = Strength("kl_beta", (1e-2, 1e-3, 1e-4))
