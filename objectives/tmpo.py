"""tmpo: Softmax Trajectory Balance, which matches a group's rollouts to the Boltzmann distribution of their rewards.

In the paper's symbols, for the K leaves of a group:

    s_i    = sum_j log pi_theta(x^i_{t_j - dt} | x^i_{t_j})       over the S stochastic steps
    p      = softmax(s),   q = softmax(beta R~),   R~ = group-standardised reward (several: the sum of each)
    A_i    = stop_gradient(log q_i - log p_i)                     the Softmax-TB advantage
    L_TMPO = -(1/K) sum_i min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i)
             + lambda_ref (1/K) sum_i ((s_i - s_i^ref) / S)^2

rho_i is the importance ratio of leaf i's path; `ratio` says of which form.

Source: Trajectory Matching Policy Optimization (arXiv 2605.10983), and its successor Uni-TMPO (arXiv 2609.34688) for
`advantage: forward_kl`. How this differs from the released code, and why: docs/methods/tmpo.md.

Fixed point: every A_i is zero where p = q, that is where the path densities of a group's leaves are proportional to exp(beta
R~); with `reference: frozen`, to p_ref exp(beta R~).
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field
from scipy.optimize import brentq
from torch import Tensor

from alignbench import groups
from alignbench.objective import Needs
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms, log_ratio, log_ratio_reference
from objectives._target import TargetObjective, TargetSettings

BETA_MAX = 50.0
"""The largest beta that `ess_target` can lead to."""
MIN_DEVIATION = 1e-12
"""The smallest standard deviation that the advantage's skewness is divided by."""


class TMPO(TargetObjective):
    """Softmax Trajectory Balance over the leaves of each group."""

    class Settings(TargetSettings):
        beta: float = Field(2.0, ge=0)
        """Inverse temperature of the target after the warm-up, for rewards in the unit of `reward_scale`. A
        larger one asks for more reward and less diversity."""
        beta_start: float = Field(0.8, ge=0)
        """Inverse temperature at the first iteration."""
        beta_warmup: int = Field(150, ge=0)
        """Number of iterations over which beta goes from `beta_start` to `beta`; 0 starts with `beta`."""
        beta_schedule: Literal["linear", "cosine"] = "linear"
        """How beta goes from `beta_start` to `beta`. linear: evenly. cosine: slowly at the beginning and at the end."""
        ess_target: float | None = Field(None, gt=0, lt=1)
        """The effective sample size of q as a fraction of K. If it is set, it replaces the schedule: in each iteration beta is
        solved for so that q has this effective sample size on average over the groups of the rollout."""
        advantage: Literal["log_ratio", "centred", "forward_kl", "squared"] = "log_ratio"
        """What multiplies the ratio. log_ratio: A (the paper). centred: A minus its group mean. forward_kl: K (q - p), the
        negative gradient of KL(q || p) (Uni-TMPO). squared: 2 K (A - p sum A), that of sum (log p - log q)^2."""
        ratio: Literal["rationorm", "trajectory", "released", "none"] = "rationorm"
        """Which importance ratio rho is used. rationorm: exp of the regulated log-ratio, averaged over steps (the paper).
        trajectory: exp(s - s_old). released: the centred trajectory ratio of the official code, times a RatioNorm weight
        without gradient. none: no importance ratio and no clip."""
        clip: float = Field(0.2, gt=0)
        """eps: how far the ratio may move from 1 before its gradient stops."""
        temperature: float = Field(1.0, gt=0)
        """What s is divided by in p = softmax(s / temperature). A larger one makes p more uniform."""
        reference: Literal["none", "behaviour", "frozen"] = "behaviour"
        """What s is compared with. none: nothing. behaviour: the policy that drew the rollout, only in the lambda_ref term, as
        in the official code. frozen: the base model, also inside p, so that the target is p_ref exp(beta R)."""
        lambda_ref: float = Field(0.05, ge=0)
        """Weight of the reference term; 0 leaves it out."""

    settings: Settings
    ratio_settings = ("clip",)

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.solved_beta = settings.beta_start

    def observe(self, forest: RolloutForest) -> None:
        """Solves for beta if `ess_target` is set."""
        super().observe(forest)
        if self.settings.ess_target is not None:
            self.solved_beta = self._solve_beta(forest, self.settings.ess_target)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "solved_beta": self.solved_beta}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.solved_beta = float(state["solved_beta"])

    def _solve_beta(self, forest: RolloutForest, target: float) -> float:
        """Solves for the beta whose q has this mean effective sample size; `BETA_MAX` if ties allow none so small."""
        usable = groups.usable_leaves(forest.by_group(forest.rewards))
        usable_groups = usable.any(1)
        if not bool(usable_groups.any()):
            return self.solved_beta
        reward = self.target_reward(forest).double()

        def excess(beta: float) -> float:
            ess = groups.effective_sample_size(groups.boltzmann_log_prob(reward, beta, usable), usable)
            return float((ess / usable.sum(1).clamp(min=1))[usable_groups].mean()) - target

        return BETA_MAX if excess(BETA_MAX) > 0 else float(brentq(excess, 0.0, BETA_MAX, xtol=1e-6))

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.settings.reference == "frozen")

    def beta(self, iteration: int) -> float:
        """Computes the inverse temperature at an iteration."""
        o = self.settings
        if o.ess_target is not None:
            return self.solved_beta
        warm = min(iteration / o.beta_warmup, 1.0) if o.beta_warmup else 1.0
        if o.beta_schedule == "cosine":
            warm = (1 - math.cos(math.pi * warm)) / 2
        return o.beta_start + (o.beta - o.beta_start) * warm

    def target_beta(self, iteration: int) -> float:
        return self.beta(iteration)

    def log_p_q(self, terms: Terms, forest: RolloutForest) -> tuple[Tensor, Tensor, Tensor]:
        """Computes log p and log q, and marks the leaves that count, those of groups with distinct rewards; each [G, K]."""
        usable = groups.usable_leaves(forest.by_group(forest.rewards))
        s = forest.path_sum(log_ratio_reference(terms) if self.settings.reference == "frozen" else terms["log_prob"])
        log_p = groups.log_softmax(s / self.settings.temperature, usable)
        log_q = groups.boltzmann_log_prob(self.target_reward(forest), self.beta(forest.iteration), usable)
        return log_p, log_q, usable

    def advantage(self, log_p: Tensor, log_q: Tensor, usable: Tensor) -> Tensor:
        """Computes what multiplies the ratio: [G, K]. At rho = 1 it is -K times the coefficient of grad s_i in the gradient."""
        a = log_q - log_p
        k = usable.sum(1, keepdim=True)
        p, q = usable * log_p.exp(), usable * log_q.exp()
        match self.settings.advantage:
            case "log_ratio":
                return a
            case "centred":
                return torch.where(usable, a - groups.group_mean(a, usable), 0.0)
            case "forward_kl":
                return k * (q - p)
            case "squared":
                return 2 * k * (a - p * a.sum(1, keepdim=True))

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        o = self.settings
        log_p, log_q, usable = self.log_p_q(terms, forest)
        a = self.advantage(log_p, log_q, usable).detach()
        change = forest.path_sum(log_ratio(terms, forest))  # s - s_old
        regulated = forest.path_mean(terms["drift_noise"])
        weight = torch.ones_like(change)
        match o.ratio:
            case "rationorm":
                rho = torch.exp(regulated)
            case "trajectory":
                rho = torch.exp(change)
            case "released":
                rho = torch.exp(torch.where(usable, change, 0.0) - groups.group_mean(change.detach(), usable))
                weight = torch.exp(regulated).clamp(1 - o.clip, 1 + o.clip).detach()
            case "none":
                return -groups.mean((change - change.detach()) * a, usable) + self.reference_term(terms, forest, usable)
        return -groups.mean(groups.clipped(rho, a, o.clip) * weight, usable) + self.reference_term(terms, forest, usable)

    def reference_term(self, terms: Terms, forest: RolloutForest, usable: Tensor) -> Tensor:
        """Computes lambda_ref (1/K) sum_i ((s_i - s_i^ref) / S)^2, averaged over groups: a scalar."""
        o = self.settings
        if o.reference == "none" or o.lambda_ref == 0:
            return terms["log_prob"].new_zeros(())
        change = log_ratio_reference(terms) if o.reference == "frozen" else log_ratio(terms, forest)
        return o.lambda_ref * groups.mean(forest.path_mean(change) ** 2, usable)

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        log_p, log_q, usable = self.log_p_q(terms, forest)
        if not bool(usable.any()):
            return {}
        a = self.advantage(log_p, log_q, usable)[usable]
        usable_groups = usable.any(1)
        log_k = groups.log_size(usable)
        return {
            "beta": self.beta(forest.iteration),
            "kl_target_policy": float((usable * log_q.exp() * (log_q - log_p)).sum(1)[usable_groups].mean()),
            "ess_policy": float(groups.effective_sample_size(log_p, usable)[usable_groups].mean()),
            "ess_target": float(groups.effective_sample_size(log_q, usable)[usable_groups].mean()),
            "policy_term_abs": float((log_p + log_k)[usable].abs().mean()),
            "target_term_abs": float((log_q + log_k)[usable].abs().mean()),
            "advantage_mean": float(a.mean()),
            "advantage_abs": float(a.abs().mean()),
            "advantage_skew": float(((a - a.mean()) ** 3).mean() / a.std(correction=0).clamp(min=MIN_DEVIATION) ** 3),
        }
