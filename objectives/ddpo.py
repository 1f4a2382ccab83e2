"""ddpo: clipped policy gradient with advantages from running statistics of each prompt.

Black et al. 2023 (arXiv 2305.13301), on the flow SDE in place of DDIM steps. For leaf i of prompt c and stochastic step t
on its path:

    A_i  = (R_i - mean_c) / (std_c + 1e-8), clamped to +- adv_clip
    L    = mean_it max(-A_i r_it, -A_i clip(r_it, 1 - eps, 1 + eps)),   r_it = pi_theta / pi_old of the edge

mean_c and std_c are those of the last `buffer` rewards of prompt c, once it has `min_count`; before that they are those of
the whole rollout. Unlike in GRPO a prompt's earlier rollouts count, and a group of one is enough.
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


class DDPO(Objective):
    class Settings(settings.Settings):
        clip: float = Field(1e-4, gt=0)
        """eps of the per-step ratio."""
        adv_clip: float = Field(5.0, gt=0)
        """Advantages are clamped to +- this."""
        buffer: int = Field(32, ge=2)
        """Rewards that are remembered for each prompt."""
        min_count: int = Field(16, ge=2)
        """Rewards of a prompt from which on its own statistics are used."""

    settings: Settings
    separable = True

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.history: dict[str, list[float]] = {}

    def observe(self, forest: RolloutForest) -> None:
        for prompt, rewards in zip(forest.prompts, forest.by_group(forest.rewards).tolist(), strict=True):
            kept = self.history.setdefault(prompt_identity(prompt), [])
            kept += [r for r in rewards if r == r]
            del kept[: -self.settings.buffer]

    def state(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state(self, state: dict[str, Any]) -> None:
        self.history = {prompt_identity(prompt): list(rewards) for prompt, rewards in state.get("history", {}).items()}

    def advantage(self, forest: RolloutForest) -> Tensor:
        """[G, K], zero where a reward is missing or where all known rewards are equal."""
        rewards = forest.by_group(forest.rewards).double()
        here = groups.valid(rewards)
        everything = rewards[here]
        rows = []
        for prompt, row in zip(forest.prompts, rewards, strict=True):
            known = self.history.get(prompt_identity(prompt), [])
            source = rewards.new_tensor(known) if len(known) >= self.settings.min_count else everything
            level = source[:1].sum()  # differences from one of them, so that a large offset costs no digits
            z = (row - level - (source - level).mean()) / ((source - level).std(correction=0) + MIN_STD)
            rows.append(z if bool(groups.varies(source)) else torch.zeros_like(row))
        a = torch.where(here, torch.stack(rows), 0.0).float()
        return a.clamp(-self.settings.adv_clip, self.settings.adv_clip)

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        counts = groups.valid(forest.rewards)[:, None].expand_as(forest.leaf_edges)
        a = self.advantage(forest).reshape(-1, 1)
        r = torch.exp(log_ratio(terms, forest))[forest.leaf_edges]
        return -groups.mean(groups.clipped(r, a, self.settings.clip), counts)

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        ready = [len(self.history.get(prompt_identity(p), [])) >= self.settings.min_count for p in forest.prompts]
        return {
            "advantage_abs": float(self.advantage(forest).abs().mean()),
            "own_statistics_share": sum(ready) / len(ready),
        }
