"""`diagnose`: how correlated the leaves of a sampler's groups are, and what that costs when a group is averaged.

Groups of the sampler are compared with groups of independent rollouts, which take the same steps while each leaf has a root
and a path of its own (`Plan.as_independent`). A single leaf has the same distribution in both; only the dependence between
leaves of one group differs.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from alignbench.backbone import Backbone
from alignbench.config.run_config import RunConfig
from alignbench.diagnosis import estimators, figure
from alignbench.diagnosis.draws import draw_groups, training_prompts
from alignbench.diagnosis.record import Diagnosis
from alignbench.diagnosis.writing import measured_into
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.load import load_configured_backbone, load_configured_sampler, threads_of
from alignbench.records.environment import environment
from alignbench.tasks import trained_task
from alignbench.training.checkpoint import judged_weights, policy_weights

ROUNDS, ROUNDS_OF_SMALL_LATENTS, SMALL = 24, 400, 16
"""Default number of groups per prompt; it is larger for latents of at most SMALL numbers, which cost almost nothing."""


def diagnose(
    config: RunConfig,
    out: Path,
    *,
    run: Path | None = None,
    prompts: int = 4,
    rounds: int | None = None,
    beta: float = 2.0,
    progress: float = 0.5,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Diagnosis:
    """Draws groups from a model and writes `diagnosis.json` and `diagnosis.png` into the folder `out`.

    Args:
        config: names the sampler, the backbone and the task; the reward is what a run with it trains on.
        out: a new or empty folder.
        run: folder of a run whose newest checkpoint is diagnosed; None for the base model.
        prompts: number of the task's training prompts.
        rounds: groups per prompt; by default 24, or 400 for latents of at most 16 numbers.
        beta: inverse temperature of the target, for rewards with standard deviation 1.
        progress: training progress, 0 to 1, at which plans are drawn.
        advance: called with the rounds that are done and their total number.

    Raises:
        UserError: a setting is wrong, there is no checkpoint, or the folder is taken; nothing has been written.
        RunError: a scorer failed.
    """
    return measured_into(
        out, "diagnosis", lambda: _measured(config, run, prompts, rounds, beta, progress, advance), figure.draw
    )


def _measured(
    config: RunConfig,
    run: Path | None,
    prompts: int,
    rounds: int | None,
    beta: float,
    progress: float,
    advance: Callable[[int, int], None],
) -> Diagnosis:
    task = trained_task(config)
    chosen = training_prompts(task, prompts)
    sampler = load_configured_sampler(config)
    # An impossible plan, and one without an independent counterpart, is refused before anything is loaded.
    sampler.plan(progress, np.random.default_rng(0)).as_independent()
    weights = policy_weights(run / "checkpoints") if run else None
    metrics = MetricSuite(task, config.scorer_timeout)
    metrics.require()
    policy = load_configured_backbone(config)
    rounds = rounds or _default_rounds(policy)
    began = time.perf_counter()
    with judged_weights(policy, weights):
        draws = draw_groups(
            policy,
            sampler,
            metrics,
            chosen,
            rounds,
            progress=progress,
            seed=config.seed,
            normalise_rewards=config.normalise_rewards,
            advance=advance,
        )
    partition, slopes = estimators.partition_function(draws, beta)
    rewards = np.stack([part.rewards for part in (draws.shared, draws.independent, draws.reference)])
    return Diagnosis(
        sampler=config.sampler.name,
        backbone=config.backbone.name,
        task=task.name,
        seed=config.seed,
        prompts=chosen,
        groups=rounds,
        group_size=rewards.shape[-1],
        progress=progress,
        beta=beta,
        distances=estimators.distances(draws),
        prefix_entropy=estimators.prefix_entropy(draws, beta),
        total_variation=estimators.total_variation(draws),
        partition=partition,
        slopes=slopes,
        model_rows=draws.model_rows,
        reward_calls=rewards.size,
        failed_scores=int(np.isnan(rewards).sum()),
        seconds=time.perf_counter() - began,
        environment=environment(str(policy.device), threads_of(config)),
        config=config.resolved(),
        checkpoint=str(run) if run else None,
        iteration=weights.iteration if weights else None,
    )


def _default_rounds(policy: Backbone) -> int:
    return ROUNDS_OF_SMALL_LATENTS if int(np.prod(policy.latent_shape)) <= SMALL else ROUNDS
