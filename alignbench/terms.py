"""Row terms: what one model row contributes to a loss, from velocities and states.

An objective asks the model about *rows*; the engine computes them in micro-batches and the objective's `terms` turns
each micro-batch's velocities into small tensors. The stock rows here are the distinct parents of the forest's
stochastic edges: each is evaluated once, however many children and descendants it has.
"""

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from alignbench import flow
from alignbench.forest import RolloutForest
from alignbench.plan import Rule

Terms = dict[str, Tensor]
"""Name -> small tensor; micro-batches are concatenated along dimension 0."""


class Rows(Protocol):
    """Model inputs, in an order in which a contiguous part of the rows gives a contiguous part of each term."""

    @property
    def x(self) -> Tensor: ...
    @property
    def sigma(self) -> Tensor: ...
    @property
    def group(self) -> Tensor: ...
    def __len__(self) -> int: ...
    def part(self, start: int, stop: int) -> Self: ...


@dataclass(frozen=True)
class EdgeRows:
    """The forest's replay rows `start` to `stop`, with the edges that leave them."""

    forest: RolloutForest
    start: int
    stop: int

    @classmethod
    def of(cls, forest: RolloutForest) -> "EdgeRows":
        return cls(forest, 0, len(forest.rows))

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> "EdgeRows":
        return EdgeRows(self.forest, self.start + start, min(self.start + stop, self.stop))

    @property
    def x(self) -> Tensor:
        return self.forest.states[self.forest.rows[self.start : self.stop]]

    @property
    def sigma(self) -> Tensor:
        return self.forest.row_sigma[self.start : self.stop]

    @property
    def group(self) -> Tensor:
        return self.forest.row_group[self.start : self.stop]

    @property
    def edges(self) -> slice:
        first, last = torch.searchsorted(
            self.forest.edge_row, self.forest.edge_row.new_tensor([self.start, self.stop])
        ).tolist()
        return slice(first, last)


def edge_terms(rows: EdgeRows, velocity: Tensor, reference_velocity: Tensor | None = None) -> Terms:
    """Stock terms of stochastic edges, each float32 [E'] for the edges that leave `rows`.

    log_prob: log-density of the child under the policy, reduced over latent dimensions as the forest says.
    drift_noise: (mu - mu_old) . eps, reduced likewise, with eps the noise that was drawn: GRPO-Guard's regulated
        log-ratio std (log w + |mu - mu_old|^2 / (2 std^2)), which has mean zero.
    With a reference: kl, the KL divergence |mu - mu_ref|^2 / (2 std^2) of the edge's Gaussians, reduced likewise; and
        log_prob_reference, without gradient.
    """
    forest, edges = rows.forest, rows.edges
    of_row = forest.edge_row[edges]
    local = of_row - rows.start
    x = rows.x[local]
    child = forest.states[forest.edge_child[edges]]
    sigma, sigma_next = forest.edge_sigma[edges], forest.edge_sigma_next[edges]
    level, steps = forest.edge_noise_level[edges], forest.row_step[of_row]

    def moments(edge_velocity: Tensor) -> tuple[Tensor, Tensor]:
        rules: set[Rule] = {forest.plan.steps[t].rule for t in set(steps.tolist())}
        if len(rules) == 1:
            return flow.moments(x, edge_velocity, sigma, sigma_next, level, rules.pop())
        mean, std = x.new_zeros(x.shape), x.new_zeros(len(x), *[1] * (x.ndim - 1))
        for rule in sorted(rules):
            of_rule = torch.tensor([forest.plan.steps[t].rule == rule for t in steps.tolist()], device=x.device).nonzero()[:, 0]
            m, s = flow.moments(x[of_rule], edge_velocity[of_rule], sigma[of_rule], sigma_next[of_rule], level[of_rule], rule)
            mean, std = mean.index_copy(0, of_rule, m), std.index_copy(0, of_rule, s)
        return mean, std

    mean, std = moments(velocity[local])
    with torch.no_grad():
        old_mean, _ = moments(forest.row_velocity[of_row])
        noise = (child - old_mean) / std
    terms = {
        "log_prob": flow.log_prob(child, mean, std, reduction=forest.reduction),
        "drift_noise": flow.reduce_latent((mean - old_mean) * noise, forest.reduction),
    }
    if reference_velocity is not None:
        with torch.no_grad():
            reference_mean, _ = moments(reference_velocity[local])
            terms["log_prob_reference"] = flow.log_prob(child, reference_mean, std, reduction=forest.reduction)
        terms["kl"] = flow.reduce_latent((mean - reference_mean) ** 2 / (2 * std**2), forest.reduction)
    return terms
