"""A second implementation of the maths, written for clarity, one leaf at a time; the fast code is tested against it.

Nothing here calls `alignbench.flow`, `alignbench.rollouts.terms`, `alignbench.groups` or an objective.
"""

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignbench.rollouts.forest import RolloutForest
from tests.support.toys import ToyBackbone, ToyNet


def gaussian_step(
    rule: str,
    x: Tensor,
    v: Tensor,
    sigma: float,
    sigma_next: float,
    level: float,
) -> tuple[Tensor, float]:
    """Computes mean and deviation of one stochastic step, from the drift v - (g^2 / 2) score of the reverse-time SDE."""
    dt = sigma_next - sigma
    noise = x + (1 - sigma) * v
    if rule == "cps":
        angle = level * math.pi / 2
        return (1 - sigma_next) * (x - sigma * v) + sigma_next * math.cos(angle) * noise, sigma_next * math.sin(angle)
    if rule == "memoryless":  # x_s = r x_q + sqrt(s^2 - r^2 q^2) eps: the posterior of x_q given x_s and x_0, by Bayes
        r, clean = (1 - sigma) / (1 - sigma_next), x - sigma * v
        forward, prior = sigma**2 - r**2 * sigma_next**2, sigma_next**2
        precision = 1 / prior + r**2 / forward
        return ((1 - sigma_next) * clean / prior + r * x / forward) / precision, precision**-0.5
    score = -noise / sigma
    if rule == "dance":
        g = level
    elif rule == "sde":
        g = level * math.sqrt(sigma / (1 - (sigma if sigma < 1 else sigma_next)))
    else:
        raise ValueError(rule)
    return x + (v - g**2 / 2 * score) * dt, g * math.sqrt(-dt)


def log_density(y: Tensor, mean: Tensor, std: float, reduction: str) -> Tensor:
    """Gaussian log-density of one state, averaged or summed over its dimensions."""
    normal: Any = torch.distributions.Normal(mean, std, validate_args=False)
    total: Tensor = normal.log_prob(y).sum()
    return total / y.numel() if reduction == "mean" else total


@dataclass
class LeafValues:
    """The values of each leaf at each stochastic step of its path; all are [leaves, S]."""

    log_prob: Tensor
    old_log_prob: Tensor
    drift_noise: Tensor
    log_prob_reference: Tensor
    kl: Tensor


def leaf_values(policy: ToyBackbone, behaviour: ToyNet, forest: RolloutForest) -> LeafValues:
    """Replays every (leaf, step) pair separately; shared edges are replayed once for each descendant.

    Args:
        behaviour: the network that drew the forest.
    """
    shape = forest.leaf_edges.shape
    edges = forest.leaf_edges.flatten().tolist()
    rows = forest.edge_row[edges]
    x, y = forest.states[forest.rows[rows]], forest.states[forest.edge_child[edges]]
    sigma, condition = forest.edge_sigma[edges], policy.encode(forest.prompts)[forest.row_group[rows]]
    velocities = [net(x, sigma, condition) for net in (policy.net, behaviour, policy.frozen)]
    collected: dict[str, list[Tensor]] = {name: [] for name in LeafValues.__dataclass_fields__}
    for i, edge in enumerate(edges):
        step = forest.plan.moves[int(forest.edge_step[edge])].step
        numbers = float(sigma[i]), float(forest.edge_sigma_next[edge]), step.eta
        (mean, std), (old, _), (ref, _) = (gaussian_step(step.rule, x[i], v[i], *numbers) for v in velocities)
        size = x[i].numel() if forest.reduction == "mean" else 1
        eps = (y[i] - old) / std
        collected["log_prob"].append(log_density(y[i], mean, std, forest.reduction))
        collected["old_log_prob"].append(log_density(y[i], old, std, forest.reduction).detach())
        collected["drift_noise"].append(((mean - old.detach()) * eps.detach()).sum() / size)
        collected["log_prob_reference"].append(log_density(y[i], ref, std, forest.reduction).detach())
        pair = (torch.distributions.Normal(m, std, validate_args=False) for m in (mean, ref.detach()))
        collected["kl"].append(torch.distributions.kl_divergence(*pair).sum() / size)
    return LeafValues(**{name: torch.stack(values).view(shape) for name, values in collected.items()})


def snapshot(policy: ToyBackbone) -> ToyNet:
    """Copies the policy's network."""
    return deepcopy(policy.net).requires_grad_(False)


def clipped(ratio: Tensor, advantage: float, eps: float) -> Tensor:
    """Computes min(r A, clip(r) A) by cases."""
    value = ratio.item()
    if advantage > 0 and value > 1 + eps:
        return torch.tensor((1 + eps) * advantage)
    if advantage < 0 and value < 1 - eps:
        return torch.tensor((1 - eps) * advantage)
    return ratio * advantage


def tmpo_loss(
    v: LeafValues,
    rewards: list[list[float]],
    *,
    beta: float,
    advantage: str = "log_ratio",
    ratio: str = "rationorm",
    reference: str = "behaviour",
    clip: float = 0.2,
    lambda_ref: float = 0.05,
    temperature: float = 1.0,
) -> Tensor:
    """Computes the TMPO loss, leaf by leaf. Leaves without a reward and groups of equal rewards are left out."""
    size, steps = len(rewards[0]), v.log_prob.shape[1]
    parts: list[Tensor] = []
    for g, group in enumerate(rewards):
        here = [i for i, r in enumerate(group) if not math.isnan(r)]
        kept = [group[i] for i in here]
        if len(set(kept)) < 2:
            continue
        leaves = [g * size + i for i in here]
        k = len(leaves)
        average = sum(kept) / k
        deviation = max(math.sqrt(sum((r - average) ** 2 for r in kept) / k), 1e-4)
        target = [math.exp(beta * (r - average) / deviation) for r in kept]
        q = torch.tensor([t / sum(target) for t in target])
        s, old = v.log_prob[leaves].sum(1), v.old_log_prob[leaves].sum(1)
        logits = s - v.log_prob_reference[leaves].sum(1) if reference == "frozen" else s
        p = torch.softmax(logits / temperature, 0).detach()
        a = torch.log(q) - torch.log(p)
        if advantage == "centred":
            a = a - a.mean()
        elif advantage == "forward_kl":
            a = k * (q - p)
        elif advantage == "squared":
            a = 2 * k * (a - p * a.sum())
        mean_move = (s - old).mean().item()
        for i, leaf in enumerate(leaves):
            regulated, a_i = v.drift_noise[leaf].mean(), float(a[i])
            if ratio == "none":
                part = -a_i * (s[i] - s[i].detach())
            elif ratio == "rationorm":
                part = -clipped(torch.exp(regulated), a_i, clip)
            elif ratio == "trajectory":
                part = -clipped(torch.exp(s[i] - old[i]), a_i, clip)
            else:
                weight = min(max(math.exp(regulated.item()), 1 - clip), 1 + clip)
                part = -clipped(torch.exp(s[i] - old[i] - mean_move), a_i, clip) * weight
            if reference != "none":
                other = v.log_prob_reference if reference == "frozen" else v.old_log_prob
                part = part + lambda_ref * ((s[i] - other[leaf].sum()) / steps) ** 2
            parts.append(part)
    return torch.stack(parts).mean()


def grpo_loss(
    v: LeafValues,
    rewards: list[list[float]],
    *,
    clip: float,
    std: str = "group",
    adv_clip: float = 5.0,
    kl_beta: float = 0.0,
) -> Tensor:
    """Computes the Flow-GRPO loss, leaf by leaf and step by step. No reward may be missing."""
    size = len(rewards[0])
    averages = [sum(group) / size for group in rewards]
    centre = sum(averages) / len(averages)
    everything = [(r - centre) ** 2 for group in rewards for r in group]
    parts: list[Tensor] = []
    for g, group in enumerate(rewards):
        of_group = math.sqrt(sum((r - averages[g]) ** 2 for r in group) / size)
        scale = {"group": of_group, "batch": math.sqrt(sum(everything) / len(everything)), "none": 1.0}[std]
        for i, reward in enumerate(group):
            leaf = g * size + i
            a = max(-adv_clip, min(adv_clip, (reward - averages[g]) / scale)) if scale else 0.0
            for t in range(v.log_prob.shape[1]):
                r = torch.exp(v.log_prob[leaf, t] - v.old_log_prob[leaf, t])
                parts.append(-clipped(r, a, clip) + kl_beta * v.kl[leaf, t])
    return torch.stack(parts).mean()
