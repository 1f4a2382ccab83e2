"""subtb: sub-trajectory balance with a learnt flow, on every part of a leaf's path.

The balance is relative to the frozen base model, so the backward kernel cancels, and a tree needs none. For leaf i with
stochastic states x_1..x_S, log-ratios l_t = log p_theta - log p_ref of its edges, and log F(x_{S+1}) = beta R~_i:

    d_ab = log F(x_a) + sum_{a <= t < b} l_t - log F(x_b)      for 1 <= a < b <= S + 1
    L    = mean_i sum_{a<b} w_ab d_ab^2,      w_ab proportional to lambda^(b - a), normalised to 1

lambda towards 0 is detailed balance (as in DAG-DB, arXiv 2406.00633), lambda towards infinity is trajectory balance with a
learnt log Z.

The flow F is a small network of the noisy state: it reads the mean and the standard deviation of each latent channel, and
sigma, but not the prompt. A constant that the prompt adds to log F is fitted to each group in closed form, as in `vargrad`.

Source: Madan et al. 2023 (arXiv 2209.12782), as Zhang et al. 2024 (arXiv 2310.02679) use it for diffusion samplers. How this
differs from them: docs/methods/subtb.md.

Fixed point: the loss is zero where log F(x) = log E_ref[exp(beta R~) | x] and the policy is the tilted target p_ref exp(beta
R~) / Z. On policy the gradient claims to be that of the reverse KL of paths to this target, and is so for whole paths alone.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from alignbench import groups
from alignbench.objective import Divergence, Needs, Strength
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms, Velocities, log_ratio_reference
from objectives._state_network import state_features, state_network
from objectives._target import TargetObjective, TargetSettings


class SubTB(TargetObjective):
    """Sub-trajectory balance against a tilted base model, with a learnt flow."""

    class Settings(TargetSettings):
        beta: float = Field(2.0, ge=0)
        """Inverse temperature of the target, for rewards in the unit of `reward_scale`. A larger one asks for more reward and
        less diversity."""
        decay: float = Field(2.0, gt=0)
        """lambda: a part of n edges has the weight lambda^n. A small one weights single steps most (detailed balance), a large
        one whole paths (trajectory balance)."""
        hidden: int = Field(64, ge=1)
        """Number of hidden units of the flow network."""

    settings: Settings
    needs_steps = True
    strength = Strength("beta", (1.0, 2.0, 4.0))

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.flow = nn.Sequential()

    def prepare(self, latent_shape: tuple[int, ...], device: torch.device) -> None:
        """Makes the flow network, whose log F is 0 for every state at first."""
        self.flow = state_network(latent_shape, self.settings.hidden, device)

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.flow.parameters()

    def target_beta(self, iteration: int) -> float:
        return self.settings.beta

    def descends(self, forest: RolloutForest) -> Divergence:
        return Divergence("reverse KL", self.settings.beta)

    @property
    def needs(self) -> Needs:
        return Needs(reference=True)

    def terms(self, rows: Any, velocities: Velocities) -> Terms:
        """Computes the stock terms of edges, and log_flow: log F of each row, float32 [R']."""
        return super().terms(rows, velocities) | {"log_flow": self.flow(state_features(rows))[:, 0]}

    def residuals(self, terms: Terms, forest: RolloutForest) -> tuple[Tensor, Tensor, Tensor]:
        """Computes d_ab of the P parts of each leaf's path, and their weights.

        Returns:
            The residuals [G, K, P], the weights of the parts [P], and the leaves that count, bool [G, K].
        """
        usable = groups.usable_leaves(forest.by_group(forest.rewards))
        edges = forest.leaf_edges
        log_ratios = log_ratio_reference(terms)[edges]
        flows = terms["log_flow"][forest.edge_row[edges]]
        end = self.settings.beta * self.target_reward(forest).flatten()
        potential = torch.cat([flows, end[:, None]], dim=1)  # log F at x_1..x_{S+1}, [G * K, S + 1]
        cumulative = torch.cat([torch.zeros_like(end)[:, None], log_ratios.cumsum(1)], dim=1)
        difference = potential - cumulative
        steps = edges.shape[1]
        starts, ends = torch.triu_indices(steps + 1, steps + 1, 1, device=difference.device)
        parts = (difference[:, starts] - difference[:, ends]).view(forest.groups, forest.group_size, -1)
        # A constant of the group is the same in the flow of every state, so only the parts that reach the end contain it.
        to_end = (ends == steps).float()
        lengths = (ends - starts).float()
        weights = torch.softmax(lengths * torch.log(torch.tensor(self.settings.decay)), dim=0)
        where = usable[..., None] * to_end * weights
        offset = (where * parts).sum((1, 2), keepdim=True) / where.sum((1, 2), keepdim=True).clamp(min=1e-12)
        return torch.where(usable[..., None], parts - to_end * offset.detach(), 0.0), weights, usable

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        residuals, weights, usable = self.residuals(terms, forest)
        return groups.mean((residuals**2 * weights).sum(2), usable)

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        residuals, weights, usable = self.residuals(terms, forest)
        flows = terms["log_flow"]
        return {
            "balance_rms": float(groups.mean((residuals**2 * weights).sum(2), usable).sqrt()),
            "log_flow_mean": float(flows.mean()),
            "log_flow_std": float(flows.std(correction=0)),
        }
