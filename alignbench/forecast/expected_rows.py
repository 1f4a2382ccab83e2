"""The model rows that a run will evaluate, counted from its sampler's plans and its objective before anything runs."""

from typing import NamedTuple

import numpy as np

from alignbench.config.run_config import RunConfig
from alignbench.load import load_sampler
from alignbench.objective import Needs, Objective
from alignbench.rollouts.builder import planned_forest
from alignbench.rollouts.plan import Plan, Step

PROGRESS_POINTS = 25
"""Points of a training at which a sampler's plans are drawn, to find what its rollouts cost on average."""
ONE_PAIR = Plan((Step("cps", 0.5), Step()), roots=2)
"""The smallest group of which every objective trains on something."""


class ExpectedRows(NamedTuple):
    """Model rows of one iteration: means over the training, for samplers that adapt as at its start."""

    rollout: float
    replay: float
    """Rows of one training pass."""
    asked: float
    """Those of them at which the policy is evaluated, if rewards differ within each group."""
    widest: float
    """The most rows that one denoising step of a rollout has."""
    images: int
    """Images that are decoded and scored."""
    double_passes: int = 0
    """Updates of a rollout whose rows are evaluated twice, since a pass takes several microbatches; see `training.engine`."""


def rows_per_iteration(config: RunConfig, objective: Objective | None = None) -> ExpectedRows:
    """Counts model rows from the sampler's plans.

    Args:
        objective: tells which rows it trains on, if rewards differ within each group; None for all replay rows of the plan.
    """
    sampler = load_sampler(config.sampler.name, **config.sampler.settings)
    groups = config.prompts_per_iteration
    plans = [
        sampler.plan(i / (PROGRESS_POINTS - 1), np.random.default_rng([config.seed, 1, i])) for i in range(PROGRESS_POINTS)
    ]
    replay = asked = float(np.mean([plan.replay_rows(groups) for plan in plans]))
    if objective is not None and not objective.replays:
        rows = objective.rows(planned_forest(plans[0], groups), update=0)
        replay = asked = len(rows)
        if rows.reused is not None:
            asked = int((~rows.reused[0]).sum())
    elif objective is not None:
        leaves = objective.trained_leaves(planned_forest(plans[0], groups))
        asked = replay if leaves is None else replay * float(leaves.float().mean())
    return ExpectedRows(
        rollout=float(np.mean([plan.model_rows(groups) for plan in plans])),
        replay=replay,
        asked=asked,
        widest=groups * max(plan.branches_before(t) for plan in plans for t in range(len(plan.steps))),
        images=groups * plans[0].leaves,
        double_passes=0 if objective is None else _double_passes(config, objective, replay),
    )


def model_rows(config: RunConfig, rows: ExpectedRows, needs: Needs) -> float:
    """All rows of an iteration, as a run's record counts them: also those that are evaluated twice, and those of a reference
    and a behaviour policy."""
    passes = config.updates_per_rollout + rows.double_passes
    return rows.rollout + rows.asked * passes + rows.replay * passes_without_gradient(config, needs)


def passes_without_gradient(config: RunConfig, needs: Needs) -> int:
    """Passes of the reference and of the behaviour policy over all replay rows of a rollout."""
    updates = config.updates_per_rollout
    behaviour = (updates if needs.behaviour_is_ema else updates - 1) * needs.behaviour
    return updates * needs.reference + behaviour


def trains_guided(objective: Objective) -> bool:
    """Whether the rows of training are evaluated with guidance."""
    return objective.replays or objective.rows(planned_forest(ONE_PAIR, 1), update=0).guided


def _double_passes(config: RunConfig, objective: Objective, replay: float) -> int:
    """Updates in which the terms of a microbatch are not known before its backward pass."""
    if config.micro_batch is None or config.micro_batch >= replay:
        return 0
    if not objective.replays:
        return config.updates_per_rollout
    off_policy = not objective.needs.policy_draws_rollouts
    later = 0 if objective.separable else config.updates_per_rollout - 1
    return later + (off_policy and not objective.separable)
