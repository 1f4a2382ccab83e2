"""The groups that a diagnosis compares: those of the sampler, and independent ones that take the same steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from alignbench import groups
from alignbench.backbone import Backbone
from alignbench.errors import RunError, UserError
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.rollouts.executor import rollout
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.noise import seed_of
from alignbench.sampler import Sampler
from alignbench.tasks import Task


def training_prompts(task: Task, count: int) -> list[str]:
    """The first training prompts of a task.

    Raises:
        UserError: it has fewer.
    """
    available = len(task.train_prompts)
    if count > available:
        raise UserError(f"--prompts {count} is too many: task {task.name!r} has {available} training prompts; lower it")
    return task.train_prompts[:count]


@dataclass(frozen=True)
class Groups:
    """n groups of K leaves for each of P prompts.

    Attributes:
        latents: float32 [P, n, K, D].
        rewards: float64 [P, n, K], NaN for leaves that could not be scored.
        log_prob: float64 [P, n, K], the log-probability of each leaf's path.
    """

    latents: np.ndarray
    rewards: np.ndarray
    log_prob: np.ndarray

    @classmethod
    def of(cls, forests: Sequence[RolloutForest]) -> "Groups":
        """The groups of n rollouts of the same P prompts."""
        latents = [f.leaf_latents.flatten(1).view(f.groups, f.group_size, -1) for f in forests]
        rewards = [f.by_group(f.rewards).double() for f in forests]
        log_prob = [f.path_sum(f.old_log_prob).double() for f in forests]
        return cls(*(torch.stack(part, dim=1).cpu().numpy() for part in (latents, rewards, log_prob)))


@dataclass(frozen=True)
class Draws:
    """Groups of the sampler, as many independent groups, and as many again from which log Z is estimated.

    Attributes:
        shared: groups of the sampler.
        independent: groups of independent rollouts with the same steps.
        reference: further independent groups, from which log Z is estimated.
        prefixes: number of branches of a sampler's group at the root and after each split.
        model_rows: model evaluations of all draws.
        standardised: whether rewards are a sum of rewards that were each standardised over the prompt's leaves.
    """

    shared: Groups
    independent: Groups
    reference: Groups
    prefixes: tuple[int, ...]
    model_rows: int = 0
    standardised: bool = False


def draw_groups(
    policy: Backbone,
    sampler: Sampler,
    metrics: MetricSuite,
    prompts: Sequence[str],
    rounds: int,
    *,
    progress: float = 0.5,
    seed: int = 0,
    normalise_rewards: bool = True,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Draws:
    """Draws one group of each kind for each prompt in each round. A round has one plan for all its groups.

    Args:
        policy: the model that draws.
        sampler: makes a plan for each round.
        metrics: score the images; the weighted rewards become `Groups.rewards`.
        prompts: one group of each kind per prompt and round.
        rounds: number of groups per prompt and kind.
        progress: training progress, 0 to 1, at which the plans are drawn.
        seed: seed of noise and plans.
        normalise_rewards: whether several rewards are each standardised before they are summed.
        advance: called with the rounds that are done and their total number.

    Raises:
        UserError: the sampler's plans differ in their numbers of leaves or prefixes, or have a single leaf.
        RunError: a scorer failed, or gave no score for any image of a prompt.
    """
    rows = 0
    prefixes: tuple[int, ...] = ()
    forests: dict[str, list[RolloutForest]] = {"shared": [], "independent": [], "reference": []}
    for i in range(rounds):
        plan = sampler.plan(progress, np.random.default_rng([seed, 1, i]))
        if i and plan.branch_counts != prefixes:
            raise UserError(
                f"all plans of a sampler must have the same group structure to be compared; got {prefixes} and "
                f"{plan.branch_counts}"
            )
        if plan.leaves < 2:
            raise UserError("a group of one rollout cannot be compared with anything; the sampler must draw at least two")
        prefixes = plan.branch_counts
        for kind, made in forests.items():
            its_plan = plan if kind == "shared" else plan.as_independent()
            forest = rollout(policy, prompts, its_plan, seed_of("diagnosis", kind, seed), i)
            scores = metrics.score(policy.decode(forest.leaf_latents), forest.leaf_prompts, when=f"in round {i}")
            forest.scores = {name: torch.from_numpy(values).to(forest.states.device) for name, values in scores.items()}
            rows += its_plan.model_rows(len(prompts))
            made.append(forest)
        advance(i + 1, rounds)
    _set_rewards(list(forests.values()), metrics.weights, normalise=normalise_rewards)
    parts = {kind: Groups.of(made) for kind, made in forests.items()}
    standardised = forests["shared"][0].standardised
    draws = Draws(**parts, prefixes=prefixes, model_rows=rows, standardised=standardised)
    for prompt, rewards in zip(prompts, draws.reference.rewards, strict=True):
        if np.isnan(rewards).all():
            raise RunError(f"no image of the prompt {prompt!r} could be scored")
    return draws


def _set_rewards(forests: Sequence[Sequence[RolloutForest]], weights: Mapping[str, float], *, normalise: bool) -> None:
    """Sets `rewards` of all forests of the same prompts from their scores.

    All leaves of a prompt count as one group here: if each group had its own scale, log Z would depend on the group.
    """
    every = [forest for made in forests for forest in made]
    scores = {name: torch.cat([f.by_group(f.scores[name]) for f in every], dim=1) for name in every[0].scores}
    total = groups.total(scores, weights, normalise=normalise)
    for forest, rewards in zip(every, total.split([f.group_size for f in every], dim=1), strict=True):
        forest.set_rewards(rewards, forest.scores, weights, normalise=normalise)
