"""Counts the model rows that a run will evaluate, from its sampler's plans and its objective."""

from typing import NamedTuple

import numpy as np

from alignbench.config.run_config import RunConfig
from alignbench.load import load_configured_sampler
from alignbench.objective import Needs, Objective
from alignbench.rollouts.builder import planned_forest
from alignbench.rollouts.plan import Plan, Step
from alignbench.training.pairs import PAIR

PROGRESS_POINTS = 25
"""Number of points of the training at which plans are drawn, to find the average cost of a rollout."""
ONE_PAIR = Plan((Step("cps", 0.5), Step()), roots=2)
"""The smallest group that every objective can train on."""


class ExpectedRows(NamedTuple):
    """Model rows of one iteration, averaged over the training. A sampler that adapts to rewards counts as at the start."""

    rollout: float
    """Rows of one rollout."""
    scored: float
    """Rows of one rollout whose velocities enter a log-density."""
    replay: float
    """Rows of one training pass."""
    asked: float
    """Rows of a training pass at which the policy is evaluated, if rewards differ within each group."""
    widest: float
    """Largest number of rows in one model call of a rollout, if no micro-batch limits it."""
    images: int
    """Number of images that are decoded and scored."""
    data: int = 0
    """Rows of the data term of keepers in one training pass."""
    data_drawn: float = 0.0
    """Rows of drawing these data."""
    double_passes: int = 0
    """Updates of a rollout whose rows are evaluated twice: a pass of several micro-batches, see `training.engine`."""


def rows_per_iteration(config: RunConfig, objective: Objective | None = None) -> ExpectedRows:
    """Counts the model rows of an iteration.

    Args:
        config: the configuration of the run.
        objective: the objective, which decides which rows are trained on; None to count all replay rows of the plan.
    """
    groups = config.prompts_per_iteration
    plans = _plans(config)
    scored = replay = asked = float(np.mean([plan.replay_rows(groups) for plan in plans]))
    if objective is not None and not objective.replays:
        rows = objective.rows(planned_forest(plans[0], groups), update=0)
        replay = asked = len(rows)
        if rows.reused is not None:
            asked = int((~rows.reused[0]).sum())
    elif objective is not None:
        leaves = objective.trained_leaves(planned_forest(plans[0], groups))
        asked = replay if leaves is None else replay * float(leaves.float().mean())
    data = config.keepers.data_images if config.keepers.data else 0
    return ExpectedRows(
        rollout=0.0 if config.pairs else float(np.mean([plan.model_rows(groups) for plan in plans])),
        scored=scored,
        replay=replay,
        asked=asked,
        widest=groups * max(max(plan.rows_of_calls) for plan in plans),
        images=0 if config.pairs else groups * plans[0].leaves,
        data=data,
        data_drawn=data * float(np.mean([len(plan.calls) for plan in plans])) if config.keepers.data_from == "base" else 0.0,
        double_passes=0 if objective is None else _double_passes(config, objective, replay),
    )


def _plans(config: RunConfig) -> list[Plan]:
    """The plans of rollouts along the training; fixed pairs are images without paths."""
    if config.pairs:
        return [PAIR]
    sampler = load_configured_sampler(config)
    return [sampler.plan(i / (PROGRESS_POINTS - 1), np.random.default_rng([config.seed, 1, i])) for i in range(PROGRESS_POINTS)]


def model_rows(config: RunConfig, rows: ExpectedRows, needs: Needs) -> float:
    """Computes the total number of rows of an iteration, as a run's record counts them.

    Rows that are evaluated twice count twice, and the rows of a reference and of a behaviour policy count as well.
    """
    passes = config.updates_per_rollout + rows.double_passes
    return data_rows(config, rows) + rows.rollout + rows.asked * passes + rows.replay * passes_without_gradient(config, needs)


def data_rows(config: RunConfig, rows: ExpectedRows) -> float:
    """Computes the rows of an iteration that draw the data of keepers and train on them."""
    return rows.data_drawn + rows.data * config.updates_per_rollout * data_passes(config, rows)


def data_passes(config: RunConfig, rows: ExpectedRows) -> int:
    """How often each row of the data term is evaluated in an update: twice where they take several micro-batches."""
    return 2 if rows.data > (config.micro_batch or rows.data) else 1


def passes_without_gradient(config: RunConfig, needs: Needs) -> int:
    """Counts the passes of the reference and of the behaviour policy over the replay rows of a rollout."""
    updates = config.updates_per_rollout
    behaviour = (updates if needs.behaviour_is_ema else updates - 1) * needs.behaviour
    return updates * needs.reference + behaviour


def trains_guided(objective: Objective) -> bool:
    """Tells whether the rows of training are evaluated with guidance."""
    return objective.replays or objective.rows(planned_forest(ONE_PAIR, 1), update=0).guided


def _double_passes(config: RunConfig, objective: Objective, replay: float) -> int:
    """The number of updates in which the terms of all rows must be computed before the first backward pass."""
    if config.micro_batch is None or config.micro_batch >= replay:
        return 0
    if not objective.replays:
        return config.updates_per_rollout
    off_policy = not objective.needs.policy_draws_rollouts
    later = 0 if objective.separable else config.updates_per_rollout - 1
    return later + (off_policy and not objective.separable)
