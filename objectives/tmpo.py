"""tmpo: Softmax Trajectory Balance, matches the group's rollouts to the reward-induced Boltzmann distribution.

Trajectory Matching Policy Optimization (arXiv 2605.10983). In the paper's symbols, for the K leaves of a group:

    s_i    = sum_j log pi_theta(x^i_{t_j - dt} | x^i_{t_j})       over the S stochastic steps
    p      = softmax(s),   q = softmax(beta R~),   R~ = group-standardised reward (several: the sum of each)
    A_i    = stop_gradient(log q_i - log p_i)                     the Softmax-TB advantage
    L_TMPO = -(1/K) sum_i min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i)
             + lambda_ref (1/K) sum_i ((s_i - s_i^ref) / S)^2

How this differs from the released code, and why, is on the method's page: docs/methods/tmpo.md.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field
from scipy.optimize import brentq
from torch import Tensor

from alignbench import Objective, groups, settings
from alignbench.objective import Needs
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms, log_ratio, log_ratio_reference

BETA_MAX = 50.0


class TMPO(Objective):
    class Settings(settings.Settings):
        beta: float = Field(2.0, ge=0)
        """Inverse temperature of the target after the warm-up, on group-standardised rewards."""
        beta_start: float = Field(0.8, ge=0)
        """Inverse temperature at the first iteration."""
        beta_warmup: int = Field(150, ge=0)
        """Iterations over which beta goes from `beta_start` to `beta`."""
        beta_schedule: Literal["linear", "cosine"] = "linear"
        """How it goes there; cosine starts and ends gently."""
        ess_target: float | None = Field(None, gt=0, lt=1)
        """In place of a schedule: beta is what gives q, on average over the rollout's groups, an effective sample size of
        this share of K."""
        advantage: Literal["log_ratio", "centred", "forward_kl", "squared"] = "log_ratio"
        """log_ratio: A (the paper). centred: A minus its group mean. forward_kl: K (q - p), the gradient of KL(q || p)
        (Uni-TMPO, arXiv 2609.34688). squared: 2 K (A - p sum A), the gradient of sum (log p - log q)^2."""
        ratio: Literal["rationorm", "trajectory", "released", "none"] = "rationorm"
        """rationorm: exp of the mean regulated log-ratio over steps (the paper). trajectory: exp(s - s_old). released:
        the official code's centred trajectory ratio times a detached RatioNorm weight. none: no importance ratio."""
        clip: float = Field(0.2, gt=0)
        """eps: how far the ratio may move from 1 before its gradient stops."""
        temperature: float = Field(1.0, gt=0)
        """p = softmax(s / temperature)."""
        reference: Literal["none", "behaviour", "frozen"] = "behaviour"
        """What s is compared with. behaviour: the policy of the rollout, in the lambda_ref term alone, as the official
        code does. frozen: the base model, also inside p, so that the target is p_ref exp(beta R)."""
        lambda_ref: float = Field(0.05, ge=0)
        """Weight of the reference term."""

    settings: Settings

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.solved_beta = settings.beta_start

    def observe(self, forest: RolloutForest) -> None:
        """Solves for beta where `ess_target` asks for it."""
        if self.settings.ess_target is not None:
            self.solved_beta = self._solve_beta(forest, self.settings.ess_target)

    def state(self) -> dict[str, Any]:
        return {"solved_beta": self.solved_beta}

    def load_state(self, state: dict[str, Any]) -> None:
        self.solved_beta = float(state["solved_beta"])

    def _solve_beta(self, forest: RolloutForest, target: float) -> float:
        """The beta whose q has the target's mean effective sample size; `BETA_MAX` where ties forbid so small a one."""
        counts = groups.usable_leaves(forest.by_group(forest.rewards))
        some = counts.any(1)
        if not bool(some.any()):
            return self.solved_beta
        z = forest.target_reward.double()

        def excess(beta: float) -> float:
            ess = groups.effective_sample_size(groups.log_softmax(beta * z, counts), counts)
            return float((ess / counts.sum(1).clamp(min=1))[some].mean()) - target

        return BETA_MAX if excess(BETA_MAX) > 0 else float(brentq(excess, 0.0, BETA_MAX, xtol=1e-6))

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.settings.reference == "frozen")

    def beta(self, iteration: int) -> float:
        """Inverse temperature at an iteration."""
        o = self.settings
        if o.ess_target is not None:
            return self.solved_beta
        warm = min(iteration / o.beta_warmup, 1.0) if o.beta_warmup else 1.0
        if o.beta_schedule == "cosine":
            warm = (1 - math.cos(math.pi * warm)) / 2
        return o.beta_start + (o.beta - o.beta_start) * warm

    def log_p_q(self, terms: Terms, forest: RolloutForest) -> tuple[Tensor, Tensor, Tensor]:
        """log p, log q and which leaves count; each [G, K]. Groups without spread do not count."""
        counts = groups.usable_leaves(forest.by_group(forest.rewards))
        s = forest.path_sum(log_ratio_reference(terms) if self.settings.reference == "frozen" else terms["log_prob"])
        log_p = groups.log_softmax(s / self.settings.temperature, counts)
        log_q = groups.log_softmax(self.beta(forest.iteration) * forest.target_reward, counts)
        return log_p, log_q, counts

    def advantage(self, log_p: Tensor, log_q: Tensor, counts: Tensor) -> Tensor:
        """What multiplies the ratio, [G, K]: K times the coefficient that grad s_i gets at rho = 1, negated."""
        a = log_q - log_p
        k = counts.sum(1, keepdim=True)
        p, q = counts * log_p.exp(), counts * log_q.exp()
        match self.settings.advantage:
            case "log_ratio":
                return a
            case "centred":
                return torch.where(counts, a - a.sum(1, keepdim=True) / k.clamp(min=1), 0.0)
            case "forward_kl":
                return k * (q - p)
            case "squared":
                return 2 * k * (a - p * a.sum(1, keepdim=True))

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        o = self.settings
        log_p, log_q, counts = self.log_p_q(terms, forest)
        a = self.advantage(log_p, log_q, counts).detach()
        moved = forest.path_sum(log_ratio(terms, forest))  # s - s_old
        regulated = forest.path_mean(terms["drift_noise"])
        weight = torch.ones_like(moved)
        match o.ratio:
            case "rationorm":
                rho = torch.exp(regulated)
            case "trajectory":
                rho = torch.exp(moved)
            case "released":
                drift = torch.where(counts, moved, 0.0)
                rho = torch.exp(drift - drift.detach().sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1))
                weight = torch.exp(regulated).clamp(1 - o.clip, 1 + o.clip).detach()
            case "none":
                return -groups.mean((moved - moved.detach()) * a, counts) + self.reference_term(terms, forest, counts)
        return -groups.mean(groups.clipped(rho, a, o.clip) * weight, counts) + self.reference_term(terms, forest, counts)

    def reference_term(self, terms: Terms, forest: RolloutForest, counts: Tensor) -> Tensor:
        """lambda_ref (1/K) sum_i ((s_i - s_i^ref) / S)^2."""
        o = self.settings
        if o.reference == "none" or o.lambda_ref == 0:
            return terms["log_prob"].new_zeros(())
        moved = log_ratio_reference(terms) if o.reference == "frozen" else log_ratio(terms, forest)
        return o.lambda_ref * groups.mean(forest.path_mean(moved) ** 2, counts)

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        log_p, log_q, counts = self.log_p_q(terms, forest)
        if not bool(counts.any()):
            return {}
        a = self.advantage(log_p, log_q, counts)[counts]
        some = counts.any(1)
        log_k = groups.log_size(counts)
        return {
            "beta": self.beta(forest.iteration),
            "kl_target_policy": float((counts * log_q.exp() * (log_q - log_p)).sum(1)[some].mean()),
            "ess_policy": float(groups.effective_sample_size(log_p, counts)[some].mean()),
            "ess_target": float(groups.effective_sample_size(log_q, counts)[some].mean()),
            "policy_term_abs": float((log_p + log_k)[counts].abs().mean()),
            "target_term_abs": float((log_q + log_k)[counts].abs().mean()),
            "advantage_mean": float(a.mean()),
            "advantage_abs": float(a.abs().mean()),
            "advantage_skew": float(((a - a.mean()) ** 3).mean() / a.std(correction=0).clamp(min=1e-12) ** 3),
        }
