"""The front of a backbone that knows its tilted target: exact numbers, and images drawn from the target itself.

Nothing is reweighted, so effective samples do not limit beta, and sets may have any size. Reward, KL and the metrics that the
backbone measures itself are exact. The metrics of scorers and of sets of images are means over independent samples of the
target.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from alignbench.backbone import Backbone, KnownDistributions, Tilt
from alignbench.config.run_config import EvaluationConfig
from alignbench.evaluation.evaluate import Evaluation, MetricSuite, evaluate_images, named_failure
from alignbench.frontier.front import (
    BEST_OF,
    ESS,
    KL,
    REWARD,
    SATURATED,
    TILT,
    Front,
    FrontMetrics,
    PromptSet,
    Rows,
    assemble_front,
    set_evals,
    strengths_to_measure,
)
from alignbench.rollouts.noise import seed_of
from alignbench.scorer import measure_sets, read_sets
from alignbench.statistics import best_of_n_kl_bound
from alignbench.tasks import Task

SETS, LEAST_SAMPLES = 4, 400
"""Smallest number of sets of images for each prompt and strength, and smallest number of images in all these sets."""
AGREEMENT = 5.0
"""Largest difference between the scored mean reward of samples and the expected reward, in standard errors."""
CHECKED_SAMPLES = 400
"""Number of samples whose mean reward is compared with the expected reward."""


def knows_target(policy: Backbone, prompts: Sequence[str], suite: MetricSuite) -> bool:
    """Tells whether the backbone knows the target of these prompts under the task's reward.

    The task has one reward, of weight 1. The backbone cannot know which: so samples at two values of beta are scored, and
    their mean reward must agree with the expected reward that the backbone states.
    """
    if not isinstance(policy, KnownDistributions) or list(suite.weights.values()) != [1.0]:
        return False
    (reward,) = suite.weights
    for beta in (0.0, 1.0):
        tilt = policy.tilted(prompts[0], beta)
        if tilt is None:
            return False
        images = policy.decode(tilt.draw(CHECKED_SAMPLES, _generator("check", beta)).to(policy.device))
        scores = suite.score(images, [prompts[0]] * CHECKED_SAMPLES, when="on samples of the target")[reward]
        error = np.nanstd(scores) / CHECKED_SAMPLES**0.5 + 1e-3 * abs(tilt.reward)
        if not abs(np.nanmean(scores) - tilt.reward) <= AGREEMENT * error:
            return False
    return True


def measure_known_front(
    policy: Backbone,
    task: Task,
    suite: MetricSuite,
    config: EvaluationConfig,
    *,
    backbone: str,
    prompt_set: PromptSet,
    betas: Sequence[float] | None = None,
    best_of: Sequence[int] = (),
    advance: Callable[[str], None] = lambda what: None,
) -> Front:
    """Computes the front from the known targets. The arguments are those of `estimated.measure_front`.

    Raises:
        RunError: a scorer failed, or all images of a prompt have the same reward.
    """
    samples = _TargetSamples(policy, prompt_set, suite, config.seed)
    deviation = samples.reward_deviation()
    asked = strengths_to_measure(betas, deviation, task)
    rows: Rows = []
    left_out, reached = None, -np.inf
    for beta in asked:
        advance(f"tilting by beta = {beta:.3g}")
        tilts = samples.tilts(beta)
        mean = float(np.mean([tilt.reward for tilt in tilts]))
        if betas is None and mean - reached < SATURATED * deviation:
            left_out = f"at beta = {beta:.3g} the reward rises no further"
            break
        reached = mean
        rows += samples.tilted_rows(beta, tilts)
    for n in best_of:
        advance(f"drawing the best of {n}")
        rows += samples.best_of_rows(n)
    return assemble_front(
        rows,
        samples.metrics,
        policy,
        task,
        suite,
        config,
        prompt_set,
        backbone=backbone,
        images=samples.sets * prompt_set.size,
        normalised=False,
        reward_deviation=deviation,
        left_out=left_out,
        exact=True,
    )


def _generator(*names: Any) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*names) % 2**63)


class _TargetSamples:
    """Samples of the targets of all prompts, and their metrics."""

    def __init__(self, policy: Backbone, prompt_set: PromptSet, suite: MetricSuite, seed: int) -> None:
        self.policy, self.prompts, self.size, self.suite, self.seed = policy, prompt_set.prompts, prompt_set.size, suite, seed
        (self.reward,) = suite.weights
        self.sets = max(SETS, -(-LEAST_SAMPLES // self.size))
        self.metrics = FrontMetrics()

    def tilts(self, beta: float) -> list[Tilt]:
        """The target of each prompt at this beta."""
        assert isinstance(self.policy, KnownDistributions)
        tilts = [self.policy.tilted(prompt, beta) for prompt in self.prompts]
        assert all(tilt is not None for tilt in tilts)
        return [tilt for tilt in tilts if tilt is not None]

    def reward_deviation(self) -> float:
        """Standard deviation of the base model's reward within a prompt, as the root mean square over prompts."""
        variances = []
        for prompt, tilt in zip(self.prompts, self.tilts(0.0), strict=True):
            images = self.policy.decode(tilt.draw(LEAST_SAMPLES, _generator("deviation", self.seed, prompt)))
            scores = self.suite.score(images, [prompt] * LEAST_SAMPLES, when="on samples of the base model")[self.reward]
            variances.append(np.nanvar(scores))
        return float(np.sqrt(np.mean(variances)))

    def tilted_rows(self, beta: float, tilts: Sequence[Tilt]) -> Rows:
        """The table's rows of one beta."""
        rows = self._mean_rows(TILT, beta, (self._evaluated(tilts, s, TILT, beta) for s in range(self.sets)))
        known = [(p, {**tilt.metrics, REWARD: tilt.reward, KL: tilt.kl}) for p, tilt in enumerate(tilts)]
        known = [(p, {**values, ESS: float(self.sets * self.size)}) for p, values in known]
        exact = {metric for _, values in known for metric in values}
        rows = [row for row in rows if row[4] not in exact]
        return rows + [(TILT, beta, p, self.prompts[p], metric, value) for p, vs in known for metric, value in vs.items()]

    def best_of_rows(self, n: int) -> Rows:
        """The table's rows of best-of-n, from samples of the base model."""
        base = self.tilts(0.0)
        rows = self._mean_rows(BEST_OF, n, (self._evaluated(base, s, BEST_OF, n) for s in range(self.sets)))
        rewards = [(*row[:4], REWARD, row[5]) for row in rows if row[4] == self.reward]
        others = {KL: best_of_n_kl_bound(n), ESS: float(self.sets * self.size)}
        return [
            *rows,
            *rewards,
            *((BEST_OF, float(n), p, prompt, m, v) for p, prompt in enumerate(self.prompts) for m, v in others.items()),
        ]

    def _evaluated(self, tilts: Sequence[Tilt], number: int, rule: str, strength: float) -> Evaluation:
        """One set of images of each prompt, with its metrics."""
        latents = [
            self._chosen(tilt, prompt, _generator("exact front", self.seed, rule, repr(float(strength)), number, prompt), n)
            for prompt, tilt in zip(self.prompts, tilts, strict=True)
            for n in [int(strength) if rule == BEST_OF else 1]
        ]
        together = torch.cat(latents).to(self.policy.device)
        owners = [p for p in range(len(self.prompts)) for _ in range(self.size)]
        images = self.policy.decode(together)
        evaluation = evaluate_images(images, together, self.prompts, owners, self.suite)
        self.metrics.directions |= evaluation.directions
        self.metrics.roles |= evaluation.roles
        of_images = evaluation.table[evaluation.table.image >= 0]
        self.metrics.scored |= set(of_images.metric)
        if not self.metrics.set_metrics:
            self._name_set_metrics(images[: self.size], together[: self.size])
        return evaluation

    def _chosen(self, tilt: Tilt, prompt: str, generator: torch.Generator, n: int) -> torch.Tensor:
        """The final latents of one set of images, each the best of n samples."""
        latents = tilt.draw(self.size * n, generator)
        if n == 1:
            return latents
        images = self.policy.decode(latents.to(self.policy.device))
        scores = self.suite.score(images, [prompt] * len(latents), when="on samples of the base model")[self.reward]
        best = np.nan_to_num(scores, nan=-np.inf).reshape(self.size, n).argmax(1)
        return latents[torch.from_numpy(best + n * np.arange(self.size))]

    def _name_set_metrics(self, images: np.ndarray, latents: torch.Tensor) -> None:
        """Records which metrics each eval of sets has, from one set of the first prompt."""
        for name, metric in set_evals(self.suite).items():
            with named_failure(name, "on samples of the target", self.suite.timeout):
                read = read_sets(metric, images, latents.cpu(), self.prompts[0])
                self.metrics.set_metrics[name] = list(measure_sets(metric, read, range(len(images)), self.prompts[0]))

    def _mean_rows(self, rule: str, strength: float, evaluations: Iterator[Evaluation]) -> Rows:
        """The table's rows of one strength: the mean of each prompt's metrics over several evaluations."""
        table = pd.concat([evaluation.table for evaluation in evaluations])
        means: Any = table.groupby(["prompt_index", "metric"], sort=False)["value"].mean()
        return [(rule, float(strength), int(p), self.prompts[int(p)], str(m), float(v)) for (p, m), v in means.items()]
