"""ppo: actor and critic, with a value head on the noisy state and its time.

Denoising is an episode of S stochastic steps whose only reward comes at its end (as in DDPO and DPOK, with a critic in place of
group or prompt statistics). For leaf i and its stochastic steps t = 1..S, with V the value of the state at step t and
V_{S+1} = R_i:

    delta_t = V_{t+1} - V_t,   A_t = sum_l lambda^l delta_{t+l}   (no discount)
    L = -mean_it min(r_it A_it, clip(r_it, 1 - eps, 1 + eps) A_it) + value_weight mean_it (V_t - stop_gradient(A_t + V_t))^2

Advantages are standardised over the batch. R is the reward minus the mean of all rewards so far, divided by their standard
deviation, so that the critic's scale does not depend on the scorer's. The critic is small on purpose: it reads the mean and the
standard deviation of each latent channel, and sigma, but not the prompt.

Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7, with generalised advantage estimation (Schulman et al. 2015, arXiv
1506.02438, equation 16). There is no published configuration for flow models: docs/methods/ppo.md.

Fixed point: the largest expected reward. There is no KL term, so nothing but the clip and the number of updates keeps the
policy from concentrating on the best images of each prompt.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from alignbench import Objective, groups, settings
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms, Velocities, log_ratio
from objectives._state_network import state_features, state_network

MIN_STD = 1e-6
"""The smallest standard deviation that rewards and advantages are divided by."""


class PPO(Objective):
    """Clipped policy gradient with a learnt critic."""

    class Settings(settings.Settings):
        clip: float = Field(1e-4, gt=0)
        """eps: how far the ratio of a step may move from 1 before its gradient stops. Log-probs are means over latent
        dimensions, so ratios stay very close to 1."""
        adv_clip: float = Field(5.0, gt=0)
        """The largest absolute value of a standardised advantage."""
        gae_lambda: float = Field(0.95, ge=0, le=1)
        """lambda of generalised advantage estimation. 0 trusts the critic's value after each step; 1 trusts only the reward at
        the end of the path."""
        value_weight: float = Field(0.5, gt=0)
        """Weight of the critic's squared error in the loss."""
        hidden: int = Field(64, ge=1)
        """Number of hidden units of the critic."""

    settings: Settings
    ratio_settings = ("clip",)

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.critic = nn.Sequential()
        self.count, self.mean, self.square = 0, 0.0, 0.0

    def prepare(self, latent_shape: tuple[int, ...], device: torch.device) -> None:
        """Makes the critic, whose first value of every state is 0, the mean of the rewards."""
        self.critic = state_network(latent_shape, self.settings.hidden, device)

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.critic.parameters()

    def observe(self, forest: RolloutForest) -> None:
        """Updates the running mean and standard deviation with the rollout's rewards (Chan et al. 1979)."""
        new = forest.rewards[groups.valid(forest.rewards)].double()
        if len(new) == 0:
            return
        total, shift = self.count + len(new), float(new.mean()) - self.mean
        self.square += float(((new - new.mean()) ** 2).sum()) + shift**2 * self.count * len(new) / total
        self.mean += shift * len(new) / total
        self.count = total

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.square = int(state["count"]), float(state["mean"]), float(state["square"])

    def terms(self, rows: Any, velocities: Velocities) -> Terms:
        """Computes the stock terms of edges, and value: V of each row, float32 [R']."""
        return super().terms(rows, velocities) | {"value": self.critic(state_features(rows))[:, 0]}

    def returns(self, forest: RolloutForest) -> Tensor:
        """Computes R of each leaf: float64 [G * K], NaN where the reward is missing."""
        deviation = max((self.square / max(self.count, 1)) ** 0.5, MIN_STD)
        rewards = forest.rewards.double()
        mean = rewards.new_tensor([self.mean]).float()
        if not bool(groups.varies(torch.cat([rewards, mean.double()]))):  # differences by rounding alone are not a return
            rewards = torch.where(groups.valid(rewards), self.mean, torch.nan)
        return (rewards - self.mean) / deviation

    def advantage(self, values: Tensor, forest: RolloutForest) -> Tensor:
        """Computes A of each leaf at each of its stochastic steps, before standardisation.

        Args:
            values: V at the states of each leaf's path, [G * K, S].
            forest: the rollout, with rewards.

        Returns:
            [G * K, S], NaN where the reward is missing.
        """
        next_values = torch.cat([values[:, 1:], self.returns(forest)[:, None]], dim=1)
        deltas = next_values - values
        a = torch.zeros_like(deltas)
        gae = deltas.new_zeros(len(deltas))
        for t in reversed(range(deltas.shape[1])):
            gae = deltas[:, t] + self.settings.gae_lambda * gae
            a[:, t] = gae
        return a

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        o = self.settings
        valid_mask = groups.valid(forest.rewards)[:, None].expand_as(forest.leaf_edges)
        values = terms["value"][forest.edge_row[forest.leaf_edges]]
        a = self.advantage(values.detach(), forest)
        target = values.detach() + a
        batch = a[valid_mask]
        if len(batch) == 0:
            return values.sum() * 0.0
        z = ((a - batch.mean()) / batch.std(correction=0).clamp(min=MIN_STD)).clamp(-o.adv_clip, o.adv_clip)
        ratio = torch.exp(log_ratio(terms, forest))[forest.leaf_edges]
        surrogate = groups.clipped(ratio, torch.where(valid_mask, z, 0.0), o.clip)
        error = torch.where(valid_mask, values - target, 0.0) ** 2
        return groups.mean(o.value_weight * error - surrogate, valid_mask)

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        values = terms["value"][forest.edge_row[forest.leaf_edges]]
        valid_mask = groups.valid(forest.rewards)
        returns = self.returns(forest)[valid_mask, None].expand(-1, values.shape[1])
        variance = returns.var(correction=0).clamp(min=MIN_STD)
        return {
            "value_mean": float(values.mean()),
            # 1: the critic predicts every reward; 0: it is no better than the mean reward.
            "explained_variance": float(1 - (returns - values[valid_mask]).var(correction=0) / variance),
        }
