"""What sharing does to a sampler's groups: how alike leaves of one tree are, and what that costs where a group is averaged.

Groups of the sampler are compared with groups of independent rollouts: the same steps, but each leaf with a root and a path of
its own (`Plan.as_independent`). A single leaf has the same distribution in both; only how leaves of one group depend on
each other differs. docs/samplers.md says what each number means and what it does not say.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from alignbench import groups
from alignbench.backbone import Backbone
from alignbench.config.run_config import RunConfig
from alignbench.errors import RunError, UserError
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.figures import plots
from alignbench.files.writing import claimed, fill
from alignbench.load import load_configured_backbone, load_sampler, threads_of
from alignbench.records.environment import environment
from alignbench.records.record import Estimate
from alignbench.rollouts.executor import rollout
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.noise import seed_of
from alignbench.sampler import Sampler
from alignbench.statistics import interval_over_groups
from alignbench.tasks import load_task
from alignbench.training.checkpoint import judged_weights, policy_weights

SCHEMA_VERSION = 1
ROUNDS, ROUNDS_OF_SMALL_LATENTS, SMALL = 24, 400, 16
"""Groups of each prompt; more of them where a latent has at most so many numbers, since those cost nothing."""
LARGEST, FEWEST = 81, 8
"""Several groups are pooled up to this K, as long as so many pools of each prompt are left."""
PROJECTIONS = 8
"""Random directions in which the classifier sees a single leaf."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Distance(_Part):
    """Of two leaves of one group: |z - z'| / sqrt(D), averaged over such pairs."""

    apart_since: str
    """`root` where the two share nothing, `split j` where they part at the j-th split."""
    sampler: Estimate
    independent: Estimate
    """Of any two leaves of an independent group."""


class PrefixEntropy(_Part):
    """How evenly a group's mass is spread over its prefixes: entropy over its maximum, the log of their number."""

    prefixes: int
    policy: Estimate
    """Of p, the softmax over the group of the path's log-prob."""
    target: Estimate
    """Of q, the softmax of beta times the reward, standardised in the group."""


class TotalVariation(_Part):
    """What a classifier finds between sampler and independent rollouts: in expectation a lower bound of the total variation."""

    leaf: Estimate
    """Between single leaves; they have the same distribution, so 0 is expected."""
    group: Estimate
    """Between whole groups."""


class PartitionFunction(_Part):
    """log Z_hat = log mean_i exp(beta z_i) over K leaves, against log Z from many independent ones."""

    k: int
    pooled_groups: int
    """How many of the sampler's groups give K leaves; 1 where they are all, or a part, of one."""
    sampler_bias: Estimate
    independent_bias: Estimate
    sampler_deviation: Estimate
    """Standard deviation of log Z_hat."""
    independent_deviation: Estimate


class Slope(_Part):
    """Of log(-bias) or log(deviation) on log K; null where fewer than two values of K show one."""

    quantity: str
    """`bias` or `deviation`."""
    of: str
    """`sampler`, within one of its groups, or `independent`."""
    sizes: list[int]
    """The values of K it is fitted to; for the bias those whose interval lies below 0."""
    slope: Estimate


class Diagnosis(_Part):
    """`diagnosis.json`."""

    schema_version: int = SCHEMA_VERSION
    sampler: str
    backbone: str
    task: str
    seed: int
    prompts: list[str]
    groups: int
    """Of the sampler, for each prompt."""
    group_size: int
    progress: float
    beta: float
    distances: list[Distance]
    prefix_entropy: list[PrefixEntropy]
    total_variation: TotalVariation
    partition: list[PartitionFunction]
    slopes: list[Slope]
    model_rows: int
    reward_calls: int
    failed_scores: int
    seconds: float
    environment: dict[str, object]
    config: dict[str, object]
    checkpoint: str | None = None
    """Folder of the run whose policy was diagnosed; null for the base model."""
    iteration: int | None = None
    """Of that checkpoint."""


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
    """Draws groups of a model and writes `diagnosis.json` and `diagnosis.png` into the folder `out`.

    Args:
        out: a new or empty folder.
        run: the folder of a run whose newest checkpoint is diagnosed; None for the base model.
        prompts: how many of the task's training prompts.
        rounds: groups of each prompt; by default 24, and 400 where a latent has at most 16 numbers.
        beta: inverse temperature of the target, in units of one over the reward's deviation.
        progress: of the training, which the plans are drawn for.
        advance: told how many of all rounds are done.

    Raises:
        UserError: a wrong setting, no checkpoint, or a folder that is taken; nothing has been written.
        RunError: a scorer failed.
    """
    with claimed(out):
        return _diagnose(config, out, run, prompts, rounds, beta, progress, advance)


def _diagnose(
    config: RunConfig,
    out: Path,
    run: Path | None,
    prompts: int,
    rounds: int | None,
    beta: float,
    progress: float,
    advance: Callable[[int, int], None],
) -> Diagnosis:
    task = load_task(config.task)
    if prompts > len(task.train_prompts):
        raise UserError(f"{prompts} prompts are asked for, but task {task.name!r} has {len(task.train_prompts)}")
    sampler = load_sampler(config.sampler.name, **config.sampler.settings)
    sampler.plan(progress, np.random.default_rng(0))  # an impossible plan is refused before anything is loaded
    weights = policy_weights(run / "checkpoints") if run else None
    judges = MetricSuite(task, config.scorer_timeout)
    judges.require()
    policy = load_configured_backbone(config)
    small = int(np.prod(policy.latent_shape)) <= SMALL
    wanted = rounds or (ROUNDS_OF_SMALL_LATENTS if small else ROUNDS)
    chosen = task.train_prompts[:prompts]
    began = time.perf_counter()
    with judged_weights(policy, weights):
        drawn = draw_groups(
            policy,
            sampler,
            judges,
            chosen,
            wanted,
            progress=progress,
            seed=config.seed,
            normalise_rewards=config.normalise_rewards,
            advance=advance,
        )
    partition, slopes = partition_function(drawn, beta)
    rewards = np.stack([part.rewards for part in (drawn.shared, drawn.independent, drawn.reference)])
    found = Diagnosis(
        sampler=config.sampler.name,
        backbone=config.backbone.name,
        task=task.name,
        seed=config.seed,
        prompts=chosen,
        groups=wanted,
        group_size=rewards.shape[-1],
        progress=progress,
        beta=beta,
        distances=distances(drawn),
        prefix_entropy=prefix_entropy(drawn, beta),
        total_variation=total_variation(drawn),
        partition=partition,
        slopes=slopes,
        model_rows=drawn.model_rows,
        reward_calls=rewards.size,
        failed_scores=int(np.isnan(rewards).sum()),
        seconds=time.perf_counter() - began,
        environment=environment(str(policy.device), threads_of(config)),
        config=config.resolved(),
        checkpoint=str(run) if run else None,
        iteration=weights.iteration if weights else None,
    )
    text = found.model_dump_json(indent=2) + "\n"

    def write(folder: Path) -> None:
        plots.write_figure(folder / "diagnosis.png", plots.diagnosis(found))
        (folder / "diagnosis.json").write_text(text, encoding="utf-8")

    fill(out, write, last="diagnosis.json")
    return found


@dataclass(frozen=True)
class Groups:
    """n groups of K leaves for each of P prompts.

    Attributes:
        latents: float32 [P, n, K, D].
        rewards: float64 [P, n, K], NaN where a scorer gave up.
        log_prob: float64 [P, n, K], of the leaf's path.
    """

    latents: np.ndarray
    rewards: np.ndarray
    log_prob: np.ndarray

    @classmethod
    def of(cls, forests: Sequence[RolloutForest]) -> "Groups":
        """From n rollouts of the same P prompts."""
        latents = [f.leaf_latents.flatten(1).view(f.groups, f.group_size, -1) for f in forests]
        rewards = [f.by_group(f.rewards).double() for f in forests]
        log_prob = [f.path_sum(f.old_log_prob).double() for f in forests]
        return cls(*(torch.stack(part, dim=1).cpu().numpy() for part in (latents, rewards, log_prob)))


@dataclass(frozen=True)
class Draws:
    """Groups of the sampler, as many independent ones, and as many again to know log Z from.

    Attributes:
        prefixes: branches of a group of the sampler at the noise and after each split.
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
    judges: MetricSuite,
    prompts: Sequence[str],
    rounds: int,
    *,
    progress: float = 0.5,
    seed: int = 0,
    normalise_rewards: bool = True,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Draws:
    """One group of each prompt in each round; a round has a plan of its own, the same for all its groups.

    Raises:
        UserError: the sampler's plans differ in how many leaves and prefixes they have, or have a single leaf.
        RunError: a scorer failed, or gave up on all pictures of a prompt.
    """
    rows = 0
    prefixes: tuple[int, ...] = ()
    forests: dict[str, list[RolloutForest]] = {"shared": [], "independent": [], "reference": []}
    for i in range(rounds):
        plan = sampler.plan(progress, np.random.default_rng([seed, 1, i]))
        if i and plan.branch_counts != prefixes:
            raise UserError(
                f"plans of one sampler must have equal groups to be compared, got {prefixes} and {plan.branch_counts}"
            )
        if plan.leaves < 2:
            raise UserError("a group of one rollout has nothing to be compared with")
        prefixes = plan.branch_counts
        for kind, made in forests.items():
            its_plan = plan if kind == "shared" else plan.as_independent()
            forest = rollout(policy, prompts, its_plan, seed_of("diagnosis", kind, seed), i)
            scores = judges.score(policy.decode(forest.leaf_latents), forest.leaf_prompts, when=f"in round {i}")
            forest.scores = {name: torch.from_numpy(answer).to(forest.states.device) for name, answer in scores.items()}
            rows += its_plan.model_rows(len(prompts))
            made.append(forest)
        advance(i + 1, rounds)
    _reward(list(forests.values()), judges.weights, normalise=normalise_rewards)
    parts = {kind: Groups.of(made) for kind, made in forests.items()}
    standardised = forests["shared"][0].standardised
    drawn = Draws(**parts, prefixes=prefixes, model_rows=rows, standardised=standardised)
    for prompt, rewards in zip(prompts, drawn.reference.rewards, strict=True):
        if np.isnan(rewards).all():
            raise RunError(f"no picture of the prompt {prompt!r} could be scored")
    return drawn


def _reward(forests: Sequence[Sequence[RolloutForest]], weights: Mapping[str, float], *, normalise: bool) -> None:
    """Fills `rewards` of all forests of the same prompts from their scores.

    All leaves of a prompt are one group here: with a scale of each group's own, log Z would depend on the group.
    """
    every = [forest for made in forests for forest in made]
    scores = {name: torch.cat([f.by_group(f.scores[name]) for f in every], dim=1) for name in every[0].scores}
    total = groups.total(scores, weights, normalise=normalise)
    for forest, rewards in zip(every, total.split([f.group_size for f in every], dim=1), strict=True):
        forest.rewards = rewards.flatten()
        forest.standardised = groups.standardises(weights, normalise=normalise)


def distances(drawn: Draws) -> list[Distance]:
    """By where the two leaves part; places at which no pair parts are left out."""
    k = drawn.shared.latents.shape[2]
    one, other = np.triu_indices(k, 1)
    # Leaf i descends from prefix i // (K / c) of c; at the noise and after each split the pair is in one or in two of them.
    together = np.stack([one // (k // c) == other // (k // c) for c in drawn.prefixes])
    parted = together.sum(0)
    shared, independent = (_pair_distances(part.latents) for part in (drawn.shared, drawn.independent))
    alone = Estimate.of(interval_over_groups(_mean, independent.mean(-1)))
    return [
        Distance(
            apart_since="root" if level == 0 else f"split {level}",
            sampler=Estimate.of(interval_over_groups(_mean, shared[..., parted == level].mean(-1))),
            independent=alone,
        )
        for level in sorted(set(parted.tolist()))
    ]


def prefix_entropy(drawn: Draws, beta: float) -> list[PrefixEntropy]:
    """For every number of prefixes above one; the last are the leaves themselves."""
    prompts, n, k = drawn.shared.rewards.shape
    rewards = torch.from_numpy(drawn.shared.rewards).view(-1, k)
    here = groups.valid(rewards)
    log_p = torch.log_softmax(torch.from_numpy(drawn.shared.log_prob).view(-1, k), dim=1)
    log_q = groups.log_softmax(beta * groups.target_reward(rewards, standardised=drawn.standardised), here)
    q = torch.where(here, log_q.exp(), 0.0)

    def estimate(mass: torch.Tensor, prefixes: int) -> Estimate:
        by_prefix = mass.view(prompts, n, prefixes, -1).sum(-1)
        entropy = torch.special.entr(by_prefix).sum(-1) / np.log(prefixes)
        return Estimate.of(interval_over_groups(_mean, entropy.numpy()))

    return [PrefixEntropy(prefixes=c, policy=estimate(log_p.exp(), c), target=estimate(q, c)) for c in drawn.prefixes if c > 1]


def total_variation(drawn: Draws) -> TotalVariation:
    """Lower bounds by classifiers that were trained on other groups; see `advantage`."""

    def whole(part: Groups) -> np.ndarray:
        """How a group's leaves lie to one another: quantiles of log distances, and the log of their spread; [P, n, 1, F]."""
        apart = np.log(np.maximum(_pair_distances(part.latents), groups.MIN_DISTANCE))
        spread = np.log(np.maximum(part.latents.var(2).mean(-1), groups.MIN_DISTANCE))
        quantiles = np.quantile(apart, [0, 0.1, 0.25, 0.5, 0.75, 1], axis=-1)
        return np.stack([*quantiles, apart.mean(-1), spread], axis=-1)[:, :, None]

    def single(part: Groups) -> np.ndarray:
        """Each leaf in a few directions, and their squares; [P, n, K, F]."""
        d = part.latents.shape[-1]
        directions = np.linalg.qr(np.random.default_rng(0).normal(size=(d, min(d, PROJECTIONS))))[0]
        seen = part.latents @ directions
        return np.concatenate([seen, seen**2], axis=-1)

    leaf, group = (classifier_advantage(of(drawn.shared), of(drawn.independent)) for of in (single, whole))
    return TotalVariation(
        leaf=Estimate.of(interval_over_groups(_mean, leaf)), group=Estimate.of(interval_over_groups(_mean, group))
    )


def classifier_advantage(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How much better than chance a classifier tells two samples apart: P(A) - Q(A) of the set A that it calls `one`.

    No set has a larger difference than the total variation, so the expectation of each value is a lower bound of it. The
    classifier is a least-squares fit (Fisher's discriminant) to every other group, on features that are centred for each
    prompt; it judges the groups between. (Cross-fitting would judge all of them, but its values depend on each other: with
    five folds, intervals of 95 % then miss a difference of 0 in 13 % of cases.)

    Args:
        one, other: float [P, n, K, F], F features of K things in each group.

    Returns:
        float [P, n // 2]: of the judged groups of both, between -1 and 1.
    """
    both = np.stack([one, other])
    fitted = both[:, :, ::2]
    centre, scale = fitted.mean((0, 2, 3), keepdims=True), fitted.std((0, 1, 2, 3)) + 1e-12

    def rows(features: np.ndarray) -> np.ndarray:
        return np.concatenate([(features - centre) / scale, np.ones((*features.shape[:-1], 1))], axis=-1)

    x = rows(fitted)
    labels = np.broadcast_to(np.array([1.0, -1.0])[:, None, None, None], x.shape[:-1])
    weights = np.linalg.lstsq(x.reshape(-1, x.shape[-1]), labels.ravel(), rcond=None)[0]
    called_one = (rows(both[:, :, 1::2]) @ weights > 0).mean(-1)
    return called_one[0] - called_one[1]


def partition_function(drawn: Draws, beta: float) -> tuple[list[PartitionFunction], list[Slope]]:
    """Bias and deviation of log Z_hat for growing K, and how fast they fall.

    A part of a group is one leaf below each prefix, so that its distribution is that of the same plan with fewer splits;
    more leaves than a group has are several groups of the same prompt.
    """
    # One scale for each prompt: with a group's own deviation, as in the losses, Z itself would depend on the group.
    pool = drawn.reference.rewards.reshape(len(drawn.reference.rewards), -1)
    mean, deviation = np.nanmean(pool, 1)[:, None, None], np.nanstd(pool, 1)[:, None, None]

    def weights(part: Groups) -> np.ndarray:
        return np.exp(beta * (part.rewards - mean) / np.maximum(deviation, groups.MIN_STD))

    shared, independent = weights(drawn.shared), weights(drawn.independent)
    reference = np.nanmean(weights(drawn.reference), axis=-1)
    k = shared.shape[2]
    samples = {
        size: tuple(log_means(series, size) for series in (shared, independent))
        for size in _sizes(drawn.prefixes, shared.shape[1])
    }
    points = [
        PartitionFunction(
            k=size,
            pooled_groups=max(1, size // k),
            sampler_bias=Estimate.of(interval_over_groups(_bias, of_sampler, reference)),
            independent_bias=Estimate.of(interval_over_groups(_bias, alone, reference)),
            sampler_deviation=Estimate.of(interval_over_groups(_deviation, of_sampler)),
            independent_deviation=Estimate.of(interval_over_groups(_deviation, alone)),
        )
        for size, (of_sampler, alone) in samples.items()
    ]
    slopes = []
    for series, name in enumerate(("sampler", "independent")):
        inside = [p for p in points if name == "independent" or p.k <= k]
        biased = [p.k for p in inside if (upper := getattr(p, f"{name}_bias").upper) is not None and upper < 0]
        for quantity, used in (("bias", biased), ("deviation", [p.k for p in inside])):
            slope = _slope(quantity, used, [samples[size][series] for size in used], reference)
            slopes.append(Slope(quantity=quantity, of=name, sizes=used, slope=slope))
    return points, slopes


def log_means(weights: np.ndarray, size: int) -> np.ndarray:
    """log of the mean of `size` weights: over evenly spread leaves of each group, or over several groups.

    Args:
        weights: float [P, n, K], NaN where missing.

    Returns:
        float [P, n', 2]: mean and variance over the K / size disjoint parts of a group; with size > K, n' = n // (size / K)
        pools of several groups, of variance 0. NaN where all weights are missing.
    """
    prompts, n, k = weights.shape
    if size <= k:
        parts = weights.reshape(prompts, n, size, k // size)
    else:
        pooled = size // k
        parts = weights[:, : n // pooled * pooled].reshape(prompts, -1, size, 1)
    here = ~np.isnan(parts)
    logs = np.log(np.where(here, parts, 0.0).sum(2) / np.where(here.any(2), here.sum(2), np.nan))
    return np.stack([logs.mean(-1), logs.var(-1)], axis=-1)


def _sizes(prefixes: tuple[int, ...], rounds: int) -> list[int]:
    """Values of K: the numbers of prefixes, or thirds of thirds of an unsplit group; then several groups."""
    k = prefixes[-1]
    splits = [c for c in prefixes if c > 1]
    inside = splits if len(prefixes) > 1 else [size for size in (3**j for j in range(1, 9)) if size < k and k % size == 0] + [k]
    factor = k // prefixes[-2] if len(prefixes) > 1 else 3
    pools = [factor**j for j in range(1, 9)]
    return inside + [k * pool for pool in pools if k * pool <= LARGEST and rounds // pool >= FEWEST]


def _slope(quantity: str, sizes: list[int], samples: list[np.ndarray], reference: np.ndarray) -> Estimate:
    if len(sizes) < 2:
        return Estimate(value=None, lower=None, upper=None, n=0)
    x = np.log(sizes) - np.log(sizes).mean()

    def slope(*resampled: np.ndarray) -> np.ndarray:
        *parts, known = resampled
        sized = [_deviation(part) if quantity == "deviation" else -_bias(part, known) for part in parts]
        with np.errstate(divide="ignore", invalid="ignore"):
            found = (np.log(np.stack(sized, axis=-1)) * x).sum(-1) / (x**2).sum()
        return np.where(np.isfinite(found), found, np.nan)

    return Estimate.of(interval_over_groups(slope, *samples, reference))


def _mean(values: np.ndarray) -> np.ndarray:
    """[B, P, n] -> [B]."""
    return np.nanmean(values, axis=(1, 2))


def _bias(logs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Mean over prompts of E[log Z_hat] - log Z; from [B, P, n, 2] of `log_means` and mean weights [B, P, n']."""
    return (np.nanmean(logs[..., 0], axis=2) - np.log(np.nanmean(reference, axis=2))).mean(1)


def _deviation(logs: np.ndarray) -> np.ndarray:
    """Standard deviation of log Z_hat within a prompt, root mean square over prompts: between groups and within them."""
    n = logs.shape[2]
    between = np.nanvar(logs[..., 0], axis=2) * n / (n - 1)
    return np.sqrt((between + np.nanmean(logs[..., 1], axis=2)).mean(1))


def _pair_distances(latents: np.ndarray) -> np.ndarray:
    """|z_i - z_j| / sqrt(D) of the pairs i < j of each group: [P, n, K, D] -> [P, n, K (K - 1) / 2]."""
    prompts, n, k, d = latents.shape
    found = [torch.pdist(torch.from_numpy(group)).numpy() for group in latents.reshape(-1, k, d)]
    return np.stack(found).reshape(prompts, n, -1) / np.sqrt(d)
