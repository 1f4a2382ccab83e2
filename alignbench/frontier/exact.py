"""The front of a backbone that knows its tilted target: exact numbers, and images drawn from the target itself.

Nothing is reweighted, so there is no limit on beta by effective samples, and sets may have any size. Reward, KL and the metrics
that the backbone measures itself are exact; those of scorers and of sets of images are means over independent draws.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from alignbench.backbone import Backbone, KnownDistributions, Tilt
from alignbench.config.run_config import EvaluationConfig
from alignbench.errors import RunError
from alignbench.evaluation.evaluate import Evaluation, MetricSuite, evaluate_images
from alignbench.frontier.front import (
    BEST_OF,
    COLUMNS,
    ESS,
    GRID,
    KL,
    REWARD,
    SATURATED,
    TILT,
    Front,
    FrontRecord,
    PromptSet,
    headline_metrics,
    set_evals,
)
from alignbench.rollouts.noise import seed_of
from alignbench.tasks import Task

SETS, LEAST_DRAWS = 4, 400
"""Sets of images for each prompt and strength, and the fewest images that they hold together."""
AGREEMENT = 5.0
"""Standard errors by which the scored reward of draws may differ from the backbone's expected one."""
CHECKED_DRAWS = 400

Rows = list[tuple[str, float, int, str, str, float]]


def knows_target(policy: Backbone, prompts: Sequence[str], suite: MetricSuite) -> bool:
    """Whether the backbone knows the target of these prompts under this task's reward.

    The backbone does not know what the task rewards. So draws at two strengths are scored, and their mean must be the reward
    that the backbone expects.
    """
    if not isinstance(policy, KnownDistributions) or len(suite.weights) != 1:
        return False
    (reward,) = suite.weights
    for beta in (0.0, 1.0):
        tilt = policy.tilted(prompts[0], beta)
        if tilt is None:
            return False
        images = policy.decode(tilt.draw(CHECKED_DRAWS, _generator("check", beta)).to(policy.device))
        scores = suite.score(images, [prompts[0]] * CHECKED_DRAWS, when="on draws of the target")[reward]
        error = np.nanstd(scores) / CHECKED_DRAWS**0.5 + 1e-3 * abs(tilt.reward)
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
    """Computes the front from the known targets; see `measure_front` for the arguments.

    Raises:
        RunError: a scorer failed, or the reward is the same for all images.
    """
    draws = _Draws(policy, prompt_set, suite, config.seed)
    deviation = draws.reward_deviation()
    if not deviation > 0:
        raise RunError(f"the reward of task {task.name!r} is the same for all images of a prompt: nothing can be tilted by it")
    asked = sorted({*betas, 0.0}) if betas is not None else [step / deviation for step in GRID]
    rows: Rows = []
    left_out, reached = None, -np.inf
    for beta in asked:
        advance(f"tilting by beta = {beta:.3g}")
        tilts = draws.tilts(beta)
        mean = float(np.mean([tilt.reward for tilt in tilts]))
        if betas is None and mean - reached < SATURATED * deviation:
            left_out = f"at beta = {beta:.3g} the reward rises no further"
            break
        reached = mean
        rows += draws.tilted_rows(beta, tilts)
    for n in best_of:
        advance(f"drawing the best of {n}")
        rows += draws.best_of_rows(n)
    record = FrontRecord(
        key="",
        task=task.name,
        backbone=backbone,
        prompts=len(prompt_set.prompts),
        images=draws.sets * prompt_set.size,
        set_size=prompt_set.size,
        steps=config.steps or policy.default_steps,
        guidance=policy.guidance,
        noise_seed=config.seed,
        rewards=suite.weights,
        normalised=False,
        reward_deviation=deviation,
        left_out=left_out,
        directions=draws.directions,
        roles=draws.roles,
        headline=draws.headline(),
        set_metrics=list(dict.fromkeys(metric for of_eval in draws.set_metrics.values() for metric in of_eval)),
        prompt_set=prompt_set.kind,
        exact=True,
        fingerprint=task.fingerprint(),
    )
    return Front(record, pd.DataFrame(rows, columns=COLUMNS))


def _generator(*names: Any) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*names) % 2**63)


class _Draws:
    """Draws of the targets of all prompts, and what the metrics say of them."""

    def __init__(self, policy: Backbone, prompt_set: PromptSet, suite: MetricSuite, seed: int) -> None:
        self.policy, self.prompts, self.size, self.suite, self.seed = policy, prompt_set.prompts, prompt_set.size, suite, seed
        (self.reward,) = suite.weights
        self.sets = max(SETS, -(-LEAST_DRAWS // self.size))
        self.directions: dict[str, bool | None] = {}
        self.roles: dict[str, str] = {}
        self.set_metrics: dict[str, list[str]] = {}
        self.scored: set[str] = set()

    def tilts(self, beta: float) -> list[Tilt]:
        """The target of each prompt."""
        assert isinstance(self.policy, KnownDistributions)
        tilts = [self.policy.tilted(prompt, beta) for prompt in self.prompts]
        assert all(tilt is not None for tilt in tilts)
        return [tilt for tilt in tilts if tilt is not None]

    def reward_deviation(self) -> float:
        """Root mean square deviation of the reward within a prompt of the base model."""
        variances = []
        for prompt, tilt in zip(self.prompts, self.tilts(0.0), strict=True):
            images = self.policy.decode(tilt.draw(LEAST_DRAWS, _generator("deviation", self.seed, prompt)))
            scores = self.suite.score(images, [prompt] * LEAST_DRAWS, when="on draws of the base model")[self.reward]
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
        """The table's rows of best-of-n, from draws of the base model."""
        base = self.tilts(0.0)
        rows = self._mean_rows(BEST_OF, n, (self._evaluated(base, s, BEST_OF, n) for s in range(self.sets)))
        rewards = [(*row[:4], REWARD, row[5]) for row in rows if row[4] == self.reward]
        kl = float(np.log(n) - (n - 1) / n)  # Beirami et al. 2024, arXiv 2401.01879, with equality for no ties
        others = {KL: kl, ESS: float(self.sets * self.size)}
        return [
            *rows,
            *rewards,
            *((BEST_OF, float(n), p, prompt, m, v) for p, prompt in enumerate(self.prompts) for m, v in others.items()),
        ]

    def headline(self) -> list[str]:
        """The metrics to show first."""
        return headline_metrics(self.scored, self.set_metrics, self.directions, self.suite)

    def _evaluated(self, tilts: Sequence[Tilt], number: int, rule: str, strength: float) -> Evaluation:
        """One set of images of each prompt, with its metrics."""
        latents = [
            self._chosen(tilt, prompt, _generator("exact front", self.seed, rule, repr(float(strength)), number, prompt), n)
            for prompt, tilt in zip(self.prompts, tilts, strict=True)
            for n in [int(strength) if rule == BEST_OF else 1]
        ]
        together = torch.cat(latents).to(self.policy.device)
        owners = [p for p in range(len(self.prompts)) for _ in range(self.size)]
        evaluation = evaluate_images(self.policy.decode(together), together, self.prompts, owners, self.suite)
        self.directions |= evaluation.directions
        self.roles |= evaluation.roles
        of_images = evaluation.table[evaluation.table.image >= 0]
        self.scored |= set(of_images.metric)
        if not self.set_metrics:
            self._sort_set_metrics(evaluation)
        return evaluation

    def _chosen(self, tilt: Tilt, prompt: str, generator: torch.Generator, n: int) -> torch.Tensor:
        """As many draws as a set has images, each the best of n."""
        latents = tilt.draw(self.size * n, generator)
        if n == 1:
            return latents
        images = self.policy.decode(latents.to(self.policy.device))
        scores = self.suite.score(images, [prompt] * len(latents), when="on draws of the base model")[self.reward]
        best = np.nan_to_num(scores, nan=-np.inf).reshape(self.size, n).argmax(1)
        return latents[torch.from_numpy(best + n * np.arange(self.size))]

    def _sort_set_metrics(self, evaluation: Evaluation) -> None:
        """Notes which eval each metric of sets belongs to."""
        left = list(dict.fromkeys(evaluation.table.loc[evaluation.table.image < 0, "metric"]))
        for name in set_evals(self.suite):
            self.set_metrics[name] = [name] if name in left else left

    def _mean_rows(self, rule: str, strength: float, evaluations: Iterator[Evaluation]) -> Rows:
        table = pd.concat([evaluation.table for evaluation in evaluations])
        means: Any = table.groupby(["prompt_index", "metric"], sort=False)["value"].mean()
        return [(rule, float(strength), int(p), self.prompts[int(p)], str(m), float(v)) for (p, m), v in means.items()]
