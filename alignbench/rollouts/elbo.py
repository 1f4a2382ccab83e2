"""Log-likelihoods estimated from final images: an evidence lower bound (ELBO) in place of the densities of a path's steps.

For a final image x_0, noised at M pairs of a sigma and noise, Y = noise - x_0, and a weight w:

    log p(x_0)  is estimated by  f(v) = (1 / M) sum_j -w_j |v(x_j, sigma_j) - Y_j|^2

up to a constant. Policy, behaviour policy and reference share the pairs and the weights, so their differences are those of one
functional. An objective on paths sees a forest in which each leaf has a path of its own with M edges, one for each pair, whose
log-densities add up to f. The weights (arXiv 2602.04663):

    adaptive   sigma / mean |v_old - Y|, which makes errors of all sigmas alike in size
    uniform    1
    image      sigma^2, the error of the predicted image
    exact      (1 - sigma) / (sigma + 1e-3), with which f is a log-density if sigmas are uniform and errors are summed

Sigmas of an image are in descending order, from noise to image, as the steps of a path are.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignbench import flow
from alignbench.config.run_config import ElboConfig
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.plan import Plan, Step
from alignbench.rollouts.terms import DenoisingRows, Terms, Velocities, denoising_noise, denoising_sigmas

TO_SIGMA = 1e-3
"""Added to sigma in the weight `exact`, so that it stays finite."""


@dataclass(frozen=True)
class ElboRows(DenoisingRows):
    """A row for each image and pair of a sigma and noise.

    Attributes:
        options: how likelihoods are estimated.
        asked: bool [R], the rows at which the policy is evaluated; None for all. The others have a log-ratio of 0.
    """

    options: ElboConfig
    asked: Tensor | None = None

    def part(self, start: int, stop: int) -> "ElboRows":
        here = slice(start, stop)
        asked = None if self.asked is None else self.asked[here]
        return ElboRows(self.forest, self.leaf[here], self.sigma[here], self.noise[here], self.options, asked)

    @property
    def reused(self) -> tuple[Tensor, Tensor] | None:  # type: ignore[override]
        if self.asked is None:
            return None
        return ~self.asked, self.noise.new_zeros(()).expand_as(self.noise)


def elbo_rows(forest: RolloutForest, options: ElboConfig, leaves: Tensor | None = None) -> ElboRows:
    """Makes the rows of all images of a rollout; the same for all its updates.

    Args:
        options: how likelihoods are estimated.
        leaves: bool [G * K], the images at which the policy is evaluated; None for all.
    """
    keys, row = _keys(forest, options)
    sigma, noise = denoising_noise(forest, 0, keys, options.times, options.draws)
    order = _descending(sigma, options)
    leaf = torch.arange(len(forest.leaves), device=forest.leaves.device).repeat_interleave(options.draws)
    asked = None if leaves is None else leaves.repeat_interleave(options.draws)
    return ElboRows(forest, leaf, sigma[order][row], noise[order][row], options, asked)


def elbo_forest(forest: RolloutForest, options: ElboConfig) -> RolloutForest:
    """The forest that an objective on paths sees: each leaf has a path of `draws` edges of its own."""
    keys, row = _keys(forest, options)
    sigma = denoising_sigmas(forest, 0, keys, options.times, options.draws)
    sigma = sigma[_descending(sigma, options)][row]
    edges = torch.arange(len(sigma), device=forest.leaves.device)
    return replace(
        forest,
        plan=Plan((Step("sde", 1.0),) * options.draws, roots=forest.group_size),
        rows=forest.leaves.repeat_interleave(options.draws),
        row_group=edges // (options.draws * forest.group_size),
        row_velocity=forest.states.new_zeros(()).expand(len(edges), *forest.states.shape[1:]),
        edge_row=edges,
        edge_child=forest.leaves.repeat_interleave(options.draws),
        edge_step=edges % options.draws,
        edge_sigma=sigma,
        edge_sigma_next=torch.zeros_like(sigma),
        edge_eta=torch.zeros_like(sigma),
        old_log_prob=torch.zeros_like(sigma),
        leaf_edges=edges.view(-1, options.draws),
        trained=None,
    )


def elbo_terms(rows: ElboRows, velocities: Velocities) -> Terms:
    """The terms of an objective on paths, float32 [R'], for edges that are pairs of a sigma and noise; see `edge_terms`.

    Returns:
        log_ratio, log_prob, kl_behaviour, drift_noise; with a reference also kl, log_prob_reference, log_ratio_reference.
        kl_behaviour is w |v - v_old|^2 / M, and drift_noise the log-ratio without that part, so that its mean over images of
        the behaviour policy is zero. kl is w |v - v_ref|^2 / M, the mean of log_ratio_reference over images of the policy.
    """
    v, old = velocities.policy.float(), velocities.behaviour
    assert old is not None  # the engine gives what `needs` asks for
    old, target = old.detach().float(), rows.noise - rows.x0
    weight = _weight(rows, old - target) / rows.options.draws
    reduction = rows.forest.reduction

    def weighted(values: Tensor) -> Tensor:
        return weight * flow.reduce_latent(values, reduction)

    def log_prob(velocity: Tensor) -> Tensor:
        return -weighted((velocity - target).square())

    def log_ratio(velocity: Tensor) -> Tensor:
        """f(v) - f(velocity), from the difference of the velocities."""
        return weighted((velocity - v) * (v + velocity - 2 * target))

    ratio, moved = log_ratio(old), weighted((v - old).square())
    if rows.asked is not None:
        ratio, moved = (torch.where(rows.asked, values, 0.0) for values in (ratio, moved))
    terms = {
        "log_prob": log_prob(old) + ratio,
        "log_ratio": ratio,
        "kl_behaviour": moved,
        "drift_noise": ratio + moved,
    }
    if velocities.reference is not None:
        reference = velocities.reference.detach().float()
        terms["log_prob_reference"] = log_prob(reference)
        terms["log_ratio_reference"] = log_ratio(reference)
        terms["kl"] = weighted((v - reference).square())
    return terms


def _weight(rows: ElboRows, behaviour_error: Tensor) -> Tensor:
    """The weight of each row, float32 [R']."""
    sigma = rows.sigma
    match rows.options.weight:
        case "adaptive":
            return sigma / flow.mean_absolute(behaviour_error)
        case "uniform":
            return torch.ones_like(sigma)
        case "image":
            return sigma**2
        case "exact":
            return (1 - sigma) / (sigma + TO_SIGMA)


def _keys(forest: RolloutForest, options: ElboConfig) -> tuple[list[tuple[int, ...]], Tensor]:
    """The keys of all pairs, and for each row the index of its pair, int64 [R]."""
    draws, leaves = options.draws, len(forest.leaves)
    owners = forest.groups if options.shared else leaves
    keys: list[tuple[int, ...]] = [(owner, draw) for owner in range(owners) for draw in range(draws)]
    edges = torch.arange(leaves * draws, device=forest.leaves.device)
    leaf = edges // draws
    return keys, (leaf // forest.group_size if options.shared else leaf) * draws + edges % draws


def _descending(sigma: Tensor, options: ElboConfig) -> Tensor:
    """The order of the pairs in which the sigmas of each image fall, int64."""
    by_owner = sigma.view(-1, options.draws)
    order = by_owner.argsort(dim=1, descending=True, stable=True)
    return (order + torch.arange(len(by_owner), device=sigma.device)[:, None] * options.draws).flatten()
