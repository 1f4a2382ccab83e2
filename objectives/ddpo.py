"""ddpo: clipped policy gradient with advantages from running statistics of each prompt.

DDPO's importance-sampling form, on the flow SDE in place of DDIM steps. For leaf i of prompt c and stochastic step t on its
path:

    A_i  = (R_i - mean_c) / (std_c + 1e-8), clamped to +- adv_clip
    L    = mean_it max(-A_i r_it, -A_i clip(r_it, 1 - eps, 1 + eps)),   r_it = pi_theta / pi_old of the edge

mean_c and std_c are those of the last `buffer` rewards of prompt c, once it has `min_count` of them; before that they are those
of the whole rollout. Unlike in GRPO the earlier rollouts of a prompt count, and a group of one is enough.

Source: Black et al. 2023 (arXiv 2305.13301) and its code. How this differs from them: docs/methods/ddpo.md.

Fixed point: the largest expected reward. There is no KL term, so nothing but the clip and the number of updates keeps the
policy from concentrating on the best images of each prompt.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from alignbench import Objective, groups, settings
from alignbench.files.text import prompt_identity
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms, log_ratio

MIN_STD = 1e-8
"""What is added to the standard deviation that rewards are divided by."""


class DDPO(Objective):
    """Policy gradient with per-prompt running statistics."""

    class Settings(settings.Settings):
        clip: float = Field(1e-4, gt=0)
        """eps: how far the ratio of a step may move from 1 before its gradient stops. Log-probs are means over latent
        dimensions, so ratios stay very close to 1."""
        adv_clip: float = Field(5.0, gt=0)
        """The largest absolute value of an advantage."""
        buffer: int = Field(32, ge=2)
        """How many of its last rewards are remembered for each prompt."""
        min_count: int = Field(16, ge=2)
        """How many rewards of a prompt must be remembered before its own statistics are used."""

    settings: Settings
    separable = True
    ratio_settings = ("clip",)

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.history: dict[str, list[float]] = {}

    def observe(self, forest: RolloutForest) -> None:
        """Remembers the rewards of each prompt."""
        for prompt, rewards in zip(forest.prompts, forest.by_group(forest.rewards).tolist(), strict=True):
            remembered = self.history.setdefault(prompt_identity(prompt), [])
            remembered += [r for r in rewards if r == r]
            del remembered[: -self.settings.buffer]

    def state(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state(self, state: dict[str, Any]) -> None:
        self.history = {prompt_identity(prompt): list(rewards) for prompt, rewards in state.get("history", {}).items()}

    def advantage(self, forest: RolloutForest) -> Tensor:
        """Computes A of each leaf: [G, K], zero where a reward is missing or where all rewards of its statistics are equal."""
        rewards = forest.by_group(forest.rewards).double()
        valid_mask = groups.valid(rewards)
        rollout_rewards = rewards[valid_mask]
        rows = []
        for prompt, row in zip(forest.prompts, rewards, strict=True):
            remembered = self.history.get(prompt_identity(prompt), [])
            source = rewards.new_tensor(remembered) if len(remembered) >= self.settings.min_count else rollout_rewards
            offset = source[:1].sum()  # subtracting one of the rewards first keeps the digits that a large offset would cost
            z = (row - offset - (source - offset).mean()) / ((source - offset).std(correction=0) + MIN_STD)
            rows.append(z if bool(groups.varies(source)) else torch.zeros_like(row))
        a = torch.where(valid_mask, torch.stack(rows), 0.0).float()
        return a.clamp(-self.settings.adv_clip, self.settings.adv_clip)

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        valid_mask = groups.valid(forest.rewards)[:, None].expand_as(forest.leaf_edges)
        a = self.advantage(forest).reshape(-1, 1)
        r = torch.exp(log_ratio(terms, forest))[forest.leaf_edges]
        return -groups.mean(groups.clipped(r, a, self.settings.clip), valid_mask)

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        ready = [len(self.history.get(prompt_identity(p), [])) >= self.settings.min_count for p in forest.prompts]
        return {
            "advantage_abs": float(self.advantage(forest).abs().mean()),
            "own_statistics_share": sum(ready) / len(ready),
        }
