"""subtb: sub-trajectory balance with a learnt flow, on every part of a leaf's path.

Madan et al. 2023 (arXiv 2209.12782), as Zhang et al. 2024 (arXiv 2310.02679) use it for diffusion samplers, relative to the
frozen base model: the backward kernel cancels, and a tree needs none. For leaf i with stochastic states x_1..x_S, log-ratios
l_t = log p_theta - log p_ref of its edges, and log F(x_{S+1}) = beta R~_i:

    d_ab = log F(x_a) + sum_{a <= t < b} l_t - log F(x_b)      for 1 <= a < b <= S + 1
    L    = mean_i sum_{a<b} w_ab d_ab^2 + tie,      w_ab proportional to lambda^(b - a), normalised to 1

lambda towards 0 is detailed balance (as DAG-DB, arXiv 2406.00633), lambda towards infinity trajectory balance with a learnt
log Z. At the optimum log F(x) = log E_ref[exp(beta R~) | x], and the policy is the tilted target p_ref exp(beta R~) / Z.

The flow is a small network of the noisy state: mean and deviation of each latent channel, and sigma. It does not read the
prompt; rewards that are standardised in each group hardly differ between prompts. The state at the root gets the mean of the
group's own estimates in addition, as `vargrad` has it, so that a constant of the prompt costs nothing.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from alignbench import groups
from alignbench.objective import Needs
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms, Velocities, log_ratio_reference
from objectives._target import TargetObjective, TargetSettings


class SubTB(TargetObjective):
    """Sub-trajectory balance with a learnt flow of the noisy state, relative to the base model."""

    class Settings(TargetSettings):
        beta: float = Field(2.0, ge=0)
        """Inverse temperature of the target, on rewards in the unit of `reward_scale`."""
        decay: float = Field(2.0, gt=0)
        """lambda: a part of n edges has the weight lambda^n. Small values weigh single steps (detailed balance), large ones
        whole paths (trajectory balance)."""
        hidden: int = Field(64, ge=1)
        """Width of the flow network."""

    settings: Settings

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.flow = nn.Sequential()

    def prepare(self, latent_shape: tuple[int, ...], device: torch.device) -> None:
        hidden = self.settings.hidden
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.flow = nn.Sequential(nn.Linear(2 * latent_shape[0] + 1, hidden), nn.Tanh(), last).to(device)

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.flow.parameters()

    @property
    def needs(self) -> Needs:
        return Needs(reference=True)

    def terms(self, rows: Any, velocities: Velocities) -> Terms:
        """The stock terms of edges, and log_flow: log F of each row, float32 [R']."""
        channels = rows.x.float().flatten(1).view(len(rows), rows.x.shape[1], -1)
        features = torch.cat([channels.mean(2), channels.std(2, correction=0), rows.sigma[:, None]], dim=1)
        return super().terms(rows, velocities) | {"log_flow": self.flow(features)[:, 0]}

    def residuals(self, terms: Terms, forest: RolloutForest) -> tuple[Tensor, Tensor, Tensor]:
        """d_ab of every leaf, [G, K, P] for the P parts; their weights [P]; and which leaves count, [G, K]."""
        counts = groups.usable_leaves(forest.by_group(forest.rewards))
        edges = forest.leaf_edges
        log_ratios = log_ratio_reference(terms)[edges]
        flows = terms["log_flow"][forest.edge_row[edges]]
        end = self.settings.beta * self.target_reward(forest).flatten()
        potential = torch.cat([flows, end[:, None]], dim=1)  # log F at x_1..x_{S+1}, [G * K, S + 1]
        travelled = torch.cat([torch.zeros_like(end)[:, None], log_ratios.cumsum(1)], dim=1)
        height = potential - travelled
        steps = edges.shape[1]
        starts, ends = torch.triu_indices(steps + 1, steps + 1, 1, device=height.device)
        parts = (height[:, starts] - height[:, ends]).view(forest.groups, forest.group_size, -1)
        # A constant of the group enters the flow of every state alike; the end has its own.
        to_end = (ends == steps).float()
        lengths = (ends - starts).float()
        weights = torch.softmax(lengths * torch.log(torch.tensor(self.settings.decay)), dim=0)
        where = counts[..., None] * to_end * weights
        offset = (where * parts).sum((1, 2), keepdim=True) / where.sum((1, 2), keepdim=True).clamp(min=1e-12)
        return torch.where(counts[..., None], parts - to_end * offset.detach(), 0.0), weights, counts

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        residuals, weights, counts = self.residuals(terms, forest)
        return groups.mean((residuals**2 * weights).sum(2), counts)

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        residuals, weights, counts = self.residuals(terms, forest)
        flows = terms["log_flow"]
        return {
            "balance_rms": float(groups.mean((residuals**2 * weights).sum(2), counts).sqrt()),
            "log_flow_mean": float(flows.mean()),
            "log_flow_std": float(flows.std(correction=0)),
        }
