"""Terms: the inputs of a loss, one or more small tensors for each model row.

A row is one (state, sigma, prompt) at which the model is evaluated once; terms are computed from its velocity. The engine
evaluates rows in micro-batches, and the objective's `terms` turns the velocities of each micro-batch into terms. There are two
stock kinds of rows. `EdgeRows` are the distinct parents of the forest's stochastic edges: each is evaluated once, however many
children and descendants it has. `DenoisingRows` are final samples with fresh noise, for objectives that compare denoising
errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from alignbench import flow
from alignbench.config.run_config import Times as Times
from alignbench.errors import RunError, UserError
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.noise import Key, normal, seed_of
from alignbench.rollouts.plan import Rule

Terms = dict[str, Tensor]
"""Name -> small tensor; micro-batches are concatenated along dimension 0."""


@dataclass(frozen=True)
class Velocities:
    """The predictions of the models for some rows, each [R', *latent]; only `policy` has a gradient.

    Attributes:
        policy: the policy's velocities.
        reference: the frozen base model's, for an objective that needs them.
        behaviour: the behaviour policy's, for an objective that needs them.
    """

    policy: Tensor
    reference: Tensor | None = None
    behaviour: Tensor | None = None


class Rows(Protocol):
    """Model inputs, in an order in which a contiguous part of the rows gives a contiguous part of each term."""

    @property
    def x(self) -> Tensor:
        """The states, float32 [R', *latent]."""

    @property
    def sigma(self) -> Tensor:
        """The position of each in the noise schedule, float32 [R']."""

    @property
    def group(self) -> Tensor:
        """The prompt of each as an index into the forest's prompts, int64 [R']."""

    @property
    def guided(self) -> bool:
        """Whether the model is evaluated with its guidance, as in a rollout, and not with the prompt's own velocity alone."""

    @property
    def reused(self) -> tuple[Tensor, Tensor] | None:
        """Mask of rows at which the policy is not evaluated, bool [R'], and velocities [R', *latent] that these rows keep."""

    def __len__(self) -> int: ...
    def part(self, start: int, stop: int) -> Self:
        """The rows from `start` to before `stop`."""


@dataclass(frozen=True)
class EdgeRows:
    """The forest's replay rows `start` to `stop`, with the edges that leave them.

    Attributes:
        asked: bool [R] over all replay rows of the forest, those at which the policy is evaluated; None for all.
    """

    forest: RolloutForest
    start: int
    stop: int
    asked: Tensor | None = None

    @classmethod
    def of(cls, forest: RolloutForest, leaves: Tensor | None = None) -> "EdgeRows":
        """All replay rows of a forest.

        Args:
            leaves: bool [G * K]; the policy is evaluated only at rows on the paths to these leaves. None for all.

        Raises:
            UserError: the plan has no scored stochastic step, so that no edge has a density.
        """
        if len(forest.rows) == 0:
            raise UserError("the plan has no stochastic step, so there is nothing to train on; choose another sampler")
        asked = forest.trained
        if leaves is not None:
            asked = forest.rows_to(leaves) if asked is None else asked & forest.rows_to(leaves)
        return cls(forest, 0, len(forest.rows), asked)

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> "EdgeRows":
        return EdgeRows(self.forest, self.start + start, min(self.start + stop, self.stop), self.asked)

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
    def guided(self) -> bool:
        """True, since the behaviour policy was guided in the rollout."""
        return True

    @property
    def reused(self) -> tuple[Tensor, Tensor] | None:
        if self.asked is None:
            return None
        here = slice(self.start, self.stop)
        return ~self.asked[here], self.forest.row_velocity[here]

    @property
    def edges(self) -> slice:
        """The edges that leave these rows."""
        first, last = torch.searchsorted(
            self.forest.edge_row, self.forest.edge_row.new_tensor([self.start, self.stop])
        ).tolist()
        return slice(first, last)


def edge_terms(rows: EdgeRows, velocity: Tensor, reference_velocity: Tensor | None = None) -> Terms:
    """The stock terms of stochastic edges, reduced over latent dimensions as the forest says.

    Args:
        velocity: [R', *latent], the policy's.
        reference_velocity: [R', *latent], the frozen base model's.

    Returns:
        Tensors float32 [E'] for the edges that leave `rows`, by name.

        - log_ratio: log pi(child) - log pi_old(child), from the difference of the two means; see `flow.log_ratio`.
        - log_prob: the log-density of the child under the policy.
        - drift_noise: (mu - mu_old) . eps, with eps the noise that was drawn. This is GRPO-Guard's regulated log-ratio
          std (log w + |mu - mu_old|^2 / (2 std^2)), which has mean zero.
        - kl_behaviour: the KL divergence |mu - mu_old|^2 / (2 std^2) of the edge's Gaussians.

        With a reference also

        - kl: the KL divergence |mu - mu_ref|^2 / (2 std^2) of the edge's Gaussians.
        - log_prob_reference: the log-density under the reference, without gradient.
        - log_ratio_reference: log pi(child) - log pi_ref(child), from the difference of the two means.
    """
    forest, edges = rows.forest, rows.edges
    of_row = forest.edge_row[edges]
    local = of_row - rows.start
    child = forest.states[forest.edge_child[edges]]
    old_velocity = forest.row_velocity[of_row]

    def shift(change: Tensor) -> Tensor:
        """The change of the means by a change of the velocity, since means are linear in (x, velocity)."""
        return _moments(forest, edges, torch.zeros_like(change, dtype=torch.float32), change)[0]

    with torch.no_grad():
        old_mean, std = _moments(forest, edges, rows.x[local], old_velocity)
        noise = (child - old_mean) / std
        old_log_prob = flow.log_prob(child, old_mean, std, reduction=forest.reduction)

    def divergence(apart: Tensor) -> Tensor:
        """The KL divergence of two Gaussians whose means are this far apart."""
        return flow.reduce_latent(apart**2 / (2 * std**2), forest.reduction)

    moved = shift(velocity.float()[local] - old_velocity)
    log_ratio = flow.log_ratio(moved, noise, std, reduction=forest.reduction)
    terms = {
        "log_prob": old_log_prob + log_ratio,
        "log_ratio": log_ratio,
        "drift_noise": flow.reduce_latent(moved * noise, forest.reduction),
        "kl_behaviour": divergence(moved),
    }
    if reference_velocity is not None:
        reference = reference_velocity.detach().float()[local]
        with torch.no_grad():
            away = shift(reference - old_velocity)
            terms["log_prob_reference"] = old_log_prob + flow.log_ratio(away, noise, std, reduction=forest.reduction)
        apart = shift(velocity.float()[local] - reference)
        seen_from_reference = noise - away / std  # the child minus the reference's mean, in deviations
        terms["log_ratio_reference"] = flow.log_ratio(apart, seen_from_reference, std, reduction=forest.reduction)
        terms["kl"] = divergence(apart)
    return terms


def log_ratio(terms: Terms, forest: RolloutForest) -> Tensor:
    """log(pi / pi_old) of each edge, [E]: the stock term, or else the difference of the log-densities."""
    return terms["log_ratio"] if "log_ratio" in terms else terms["log_prob"] - forest.old_log_prob


def log_ratio_reference(terms: Terms) -> Tensor:
    """log(pi / pi_ref) of each edge, [E]: the stock term, or else the difference of the log-densities."""
    if "log_ratio_reference" in terms:
        return terms["log_ratio_reference"]
    return terms["log_prob"] - terms["log_prob_reference"]


def edge_std(forest: RolloutForest) -> Tensor:
    """The standard deviation of each edge's Gaussian, float32 [E]."""
    zeros = forest.edge_sigma.new_zeros(len(forest.edge_sigma), 1)  # the deviation does not depend on the state
    return _moments(forest, slice(None), zeros, zeros)[1].flatten()


def _moments(forest: RolloutForest, edges: slice, x: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation of some edges, each by the rule of its step."""
    steps = forest.edge_step[edges].tolist()
    numbers = forest.edge_sigma[edges], forest.edge_sigma_next[edges], forest.edge_eta[edges]
    rules: set[Rule] = {forest.plan.moves[t].step.rule for t in set(steps)}
    if len(rules) <= 1:  # with no edges, use any rule so that the empty result still has a grad_fn
        return flow.moments(x, velocity, *numbers, rules.pop() if rules else "sde")
    mean, std = x.new_zeros(x.shape), x.new_zeros(len(x), *[1] * (x.ndim - 1))
    for rule in sorted(rules):
        of_rule = torch.tensor([forest.plan.moves[t].step.rule == rule for t in steps], device=x.device).nonzero()[:, 0]
        sigma, sigma_next, eta = (n[of_rule] for n in numbers)
        m, s = flow.moments(x[of_rule], velocity[of_rule], sigma, sigma_next, eta, rule)
        mean, std = mean.index_copy(0, of_rule, m), std.index_copy(0, of_rule, s)
    return mean, std


@dataclass(frozen=True)
class DenoisingRows:
    """Final samples with fresh noise: x = (1 - sigma) x_0 + sigma noise.

    Attributes:
        forest: the forest whose leaves the samples are.
        leaf: int64 [R], the index of each row's leaf.
        sigma: float32 [R], the position of each row in the noise schedule.
        noise: float32 [R, *latent], standard normal.
    """

    forest: RolloutForest
    leaf: Tensor
    sigma: Tensor
    noise: Tensor

    def __len__(self) -> int:
        return len(self.leaf)

    def part(self, start: int, stop: int) -> "DenoisingRows":
        return DenoisingRows(self.forest, self.leaf[start:stop], self.sigma[start:stop], self.noise[start:stop])

    @property
    def x0(self) -> Tensor:
        """The samples before noise is added, [R, *latent]."""
        return self.forest.states[self.forest.leaves[self.leaf]]

    @property
    def x(self) -> Tensor:
        sigma = self.sigma.view(-1, *[1] * (self.noise.ndim - 1))
        return (1 - sigma) * self.x0 + sigma * self.noise

    @property
    def group(self) -> Tensor:
        return self.leaf // self.forest.group_size

    @property
    def guided(self) -> bool:
        """False: a guided mixture of two velocities is not a regression on noise - x_0."""
        return False

    @property
    def reused(self) -> None:
        return None


def denoising_noise(
    forest: RolloutForest, update: int, keys: Sequence[tuple[int, ...]], times: Times = "schedule", draws: int = 1
) -> tuple[Tensor, Tensor]:
    """Draws a sigma and noise for each key, as a function of seed, iteration, update and key.

    Equal keys get equal noise, so that the two samples of a pair differ in nothing else.

    Args:
        update: how many updates the rollout has already served.
        keys: one for each row.
        times: how sigmas are drawn. logit_normal: as the sigmoid of a standard normal. schedule: the same, shifted as the
            backbone's schedule is. uniform: between 0 and 1. steps: from the sigmas of the rollout's steps, in a random order
            for each `draws` consecutive keys, without repetition as long as there are enough.
        draws: how many consecutive keys belong to one sample or pair.

    Returns:
        Sigmas float32 [R] and noise float32 [R, *latent].

    Raises:
        RunError: `steps` for a forest without sigmas.
    """
    full = _full_keys(forest, update, keys)
    device = forest.states.device
    return _sigmas(forest, full, times, draws).to(device), normal(full, forest.states.shape[1:], device)


def denoising_sigmas(
    forest: RolloutForest, update: int, keys: Sequence[tuple[int, ...]], times: Times = "schedule", draws: int = 1
) -> Tensor:
    """Draws the sigmas of `denoising_noise` alone: float32 [R]."""
    return _sigmas(forest, _full_keys(forest, update, keys), times, draws).to(forest.states.device)


def _full_keys(forest: RolloutForest, update: int, keys: Sequence[tuple[int, ...]]) -> list[Key]:
    return [("denoising", forest.seed, forest.iteration, update, *key) for key in keys]


def _sigmas(forest: RolloutForest, keys: Sequence[Key], times: Times, draws: int) -> Tensor:
    """A sigma for each key, float32 [R], on the CPU."""
    if times == "steps":
        sigmas = forest.sigmas[:-1]
        if not len(sigmas):
            raise RunError("times=steps needs the sigmas of the rollout's steps, which this forest does not have")
        chosen: list[int] = []
        for key in keys[::draws]:
            generator = np.random.default_rng(seed_of("step", *key))
            orders = [generator.permutation(len(sigmas)) for _ in range(-(-draws // len(sigmas)))]
            chosen += np.concatenate(orders)[:draws].tolist()
        return sigmas[chosen]
    z = normal([("sigma", *key) for key in keys], (1,))[:, 0]
    if times == "uniform":
        return torch.special.ndtr(z)
    # sigma = s t / (1 + (s - 1) t) multiplies the odds of t by s.
    return torch.sigmoid(z + log(forest.schedule_shift) if times == "schedule" else z)


def part_of_update(forest: RolloutForest, update: int, count: int, parts: int) -> Tensor:
    """Chooses the items that an update trains on, from random disjoint parts of which each update takes the next.

    Args:
        update: how many updates the rollout has already served.
        count: the number of items.
        parts: the number of parts; with 1 every update takes all items.

    Returns:
        int64, the indices of the items in ascending order.
    """
    if parts == 1:
        return torch.arange(count, device=forest.states.device)
    order = np.random.default_rng(seed_of("parts", forest.seed, forest.iteration)).permutation(count)
    return torch.from_numpy(np.sort(order[update % parts :: parts])).to(forest.states.device)


def leaves_of_update(forest: RolloutForest, update: int, parts: int) -> Tensor:
    """Chooses the leaves that an update trains on by the first scored step on their paths.

    These steps, in the order of the schedule, are divided into parts of equally many, of which each update takes the next.

    Args:
        update: how many updates the rollout has already served.
        parts: the number of parts.

    Returns:
        bool [G * K].

    Raises:
        UserError: the leaves have too few different steps, or the parts would have different numbers of them.
    """
    starts = forest.edge_step.new_tensor([move.start for move in forest.plan.moves])
    steps, number = starts[forest.edge_step[forest.leaf_edges[:, :1]]].unique(return_inverse=True)
    if len(steps) == 0 or len(steps) % parts:
        raise UserError(
            f"parts={parts} with part_by=step must divide the number of steps at which the sampler's images are first trained, "
            f"which is {len(steps)}"
        )
    return (number[:, 0] * parts).div(len(steps), rounding_mode="floor") == update % parts


def denoising_terms(rows: DenoisingRows, velocity: Tensor, reference_velocity: Tensor | None = None) -> Terms:
    """The stock terms of denoising rows.

    Returns:
        `error` is |v - (noise - x_0)|^2 averaged over latent dimensions, float32 [R']; `error_reference` is the same with the
        reference's velocity, where it is given.
    """
    target = rows.noise - rows.x0
    terms = {"error": flow.mean_square(velocity.float() - target)}
    if reference_velocity is not None:
        terms["error_reference"] = flow.mean_square(reference_velocity.float() - target).detach()
    return terms
