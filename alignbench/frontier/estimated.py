"""The front of a backbone whose target must be estimated, from samples of the base model.

N images of each evaluation prompt are drawn from the base model and scored once. Everything else is arithmetic on them; see
`alignbench.frontier.tilt`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignbench import groups
from alignbench.backbone import Backbone
from alignbench.config.run_config import EvaluationConfig
from alignbench.errors import UserError
from alignbench.evaluation.evaluate import MetricSuite, evaluate_images, named_failure
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
from alignbench.frontier.tilt import (
    best_of_log_weights,
    draw_sets,
    effective_sample_size,
    set_mean,
    tilted_kl,
    tilted_log_weights,
    tilted_mean,
    weighted_mean,
)
from alignbench.inference import solvers
from alignbench.rollouts.executor import decode
from alignbench.rollouts.noise import group_keys, seed_of
from alignbench.scorer import Scorer, checked_scores, measure_sets, read_sets
from alignbench.statistics import best_of_n_kl_bound
from alignbench.tasks import Task

LEAST_SHARE = 0.1
"""Smallest share of the samples that must be effective; larger values of beta are left out."""
SETS = 100
"""Number of sets of images over which a set metric is averaged, for each prompt and strength."""
IMAGES_AT_ONCE = 256
"""Number of images that are drawn at a time."""


@dataclass
class Samples:
    """The base model's images of each prompt, as the metrics read them.

    Attributes:
        prompts: the P prompts.
        scores: metric -> float [P, N], one value for each image.
        rewards: float [P, N], the total reward, by which the base model is tilted.
        features: eval of sets -> what `read_sets` gives of the images of each prompt.
        metrics: what is known of the metrics.
    """

    prompts: list[str]
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    rewards: np.ndarray = field(default_factory=lambda: np.empty(0))
    features: dict[str, list[Any]] = field(default_factory=dict)
    metrics: FrontMetrics = field(default_factory=FrontMetrics)


def measure_front(
    policy: Backbone,
    task: Task,
    suite: MetricSuite,
    config: EvaluationConfig,
    *,
    images: int,
    normalise_rewards: bool,
    backbone: str,
    betas: Sequence[float] | None = None,
    best_of: Sequence[int] = (),
    prompt_set: PromptSet | None = None,
    micro_batch: int | None = None,
    advance: Callable[[str], None] = lambda what: None,
) -> Front:
    """Draws and scores images of the base model, and computes the front from them.

    Args:
        policy: the backbone.
        task: the task.
        suite: the task's evals.
        config: the protocol of an evaluation.
        images: N for each prompt; at least twice the number of images in a set.
        normalise_rewards: whether several rewards are standardised before their sum; see `groups.total`.
        backbone: name of the backbone, for the record.
        betas: values of beta on raw rewards; by default `GRID` over the reward's deviation.
        best_of: values of n; those that leave fewer samples than a set has images are left out.
        prompt_set: the prompts and the size of a set; by default those of an evaluation.
        micro_batch: the largest number of rows in a model call.
        advance: called with what is being done, for a progress display.

    Raises:
        UserError: there are too few images, or the task has too few prompts.
        RunError: a scorer failed, or all images of a prompt have the same reward.
    """
    chosen = prompt_set or PromptSet.of(task, config)
    prompts, size = chosen.prompts, chosen.size
    if images < 2 * size:
        raise UserError(
            f"a front for sets of {size} images of a prompt needs at least {2 * size} samples "
            f"of each, got {images}; raise --images"
        )
    samples = draw_samples(policy, prompts, suite, config, images, normalise_rewards, micro_batch, advance)
    deviation = float(np.sqrt(np.nanmean(np.nanvar(samples.rewards, axis=1))))
    asked = strengths_to_measure(betas, deviation, task)
    least_gain = -np.inf if betas is not None else SATURATED * deviation
    rows, left_out = _tilted_rows(samples, asked, least_gain, suite, size, config.seed, advance)
    rows += _best_of_rows(samples, best_of, suite, size, config.seed)
    return assemble_front(
        rows,
        samples.metrics,
        policy,
        task,
        suite,
        config,
        chosen,
        backbone=backbone,
        images=images,
        normalised=groups.standardises(suite.weights, normalise=normalise_rewards),
        reward_deviation=deviation,
        left_out=left_out,
    )


def draw_samples(
    policy: Backbone,
    prompts: Sequence[str],
    suite: MetricSuite,
    config: EvaluationConfig,
    images: int,
    normalise_rewards: bool,
    micro_batch: int | None = None,
    advance: Callable[[str], None] = lambda what: None,
) -> Samples:
    """Draws N images of each prompt from the base model with the noise of an evaluation, and reads them with all metrics.

    The arguments are those of `measure_front`.

    Raises:
        RunError: a scorer failed.
    """
    scorers = suite.only(Scorer)
    samples = Samples(list(prompts), features={name: [] for name in set_evals(suite)})
    scores: dict[str, list[np.ndarray]] = {}
    policy.prepare(prompts)
    at_once = max(1, IMAGES_AT_ONCE // images)
    for start in range(0, len(prompts), at_once):
        part = list(prompts[start : start + at_once])
        advance(f"drawing images of the base model ({start} of {len(prompts)} prompts done)")
        with policy.reference():
            steps = config.steps or policy.default_steps
            latents = solvers.draw(
                policy,
                part,
                group_keys(part),
                images,
                steps=steps,
                seed=config.seed,
                solver=config.solver,
                micro_batch=micro_batch,
            )
            drawn = decode(policy, latents, micro_batch)
        owners = [p for p in range(len(part)) for _ in range(images)]
        evaluation = evaluate_images(drawn, latents, part, owners, scorers)
        samples.metrics.directions |= evaluation.directions
        samples.metrics.roles |= evaluation.roles
        for metric, table in evaluation.table.groupby("metric", sort=False):
            wide = table.pivot(index="prompt_index", columns="image", values="value")
            scores.setdefault(str(metric), []).append(np.asarray(wide, dtype=np.float64))
        _read_sets(samples, suite, part, drawn, latents)
    for name, metrics in samples.metrics.set_metrics.items():
        samples.metrics.directions |= {metric: suite.evals[name].higher_is_better(metric) for metric in metrics}
        samples.metrics.roles |= dict.fromkeys(metrics, "judge")
    samples.scores = {metric: np.concatenate(parts) for metric, parts in scores.items()}
    samples.metrics.scored = set(samples.scores)
    rewards = {name: torch.from_numpy(samples.scores[name]) for name in suite.rewards}
    samples.rewards = groups.total(rewards, suite.weights, normalise=normalise_rewards).numpy()
    return samples


def _read_sets(samples: Samples, suite: MetricSuite, prompts: Sequence[str], drawn: np.ndarray, latents: Tensor) -> None:
    """Reads the images of some prompts, equally many of each in order, with all evals that measure sets."""
    images = len(drawn) // len(prompts)
    for name, metric in set_evals(suite).items():
        for p, prompt in enumerate(prompts):
            of_prompt = slice(p * images, (p + 1) * images)
            with named_failure(name, "on the base model's images", suite.timeout):
                read = read_sets(metric, drawn[of_prompt], latents[of_prompt].cpu(), prompt)
                samples.features[name].append(read)
                if name not in samples.metrics.set_metrics:
                    samples.metrics.set_metrics[name] = list(measure_sets(metric, read, range(images), prompt))


def _tilted_rows(
    samples: Samples,
    betas: Sequence[float],
    least_gain: float,
    suite: MetricSuite,
    size: int,
    seed: int,
    advance: Callable[[str], None],
) -> tuple[Rows, str | None]:
    """The table's rows of ascending values of beta, and why the last ones were left out; None if none was.

    Args:
        least_gain: the smallest gain in reward from one beta to the next.
    """
    images = samples.rewards.shape[1]
    rows: Rows = []
    reached = -np.inf
    for beta in betas:
        advance(f"tilting by beta = {beta:.3g}")
        log_weights = tilted_log_weights(samples.rewards, beta)
        effective = float(np.median(effective_sample_size(log_weights)))
        if effective < max(LEAST_SHARE * images, size):
            return rows, f"at beta = {beta:.3g} only {effective:.1f} of {images} samples of a prompt are effective"
        mean = float(np.nanmean([tilted_mean(*of_prompt) for of_prompt in zip(samples.rewards, log_weights, strict=True)]))
        if mean - reached < least_gain:
            return rows, f"at beta = {beta:.3g} the reward rises no further"
        reached = mean
        rows += _rows_of(TILT, beta, samples, log_weights, suite, size, seed)
    return rows, None


def _best_of_rows(samples: Samples, best_of: Sequence[int], suite: MetricSuite, size: int, seed: int) -> Rows:
    """The table's rows of best-of-n, for the values of n that leave enough samples for a set."""
    rows: Rows = []
    for n in best_of:
        if n <= (~np.isnan(samples.rewards)).sum(1).min() - size:
            log_weights = np.stack([best_of_log_weights(of_prompt, n) for of_prompt in samples.rewards])
            rows += _rows_of(BEST_OF, float(n), samples, log_weights, suite, size, seed)
    return rows


def _rows_of(
    rule: str, strength: float, samples: Samples, log_weights: np.ndarray, suite: MetricSuite, size: int, seed: int
) -> Rows:
    """The table's rows of one strength.

    Args:
        log_weights: of the samples, float [P, N].
        size: K, the number of images in a set.
        seed: seed of the sets.
    """
    tilted = rule == TILT
    mean_of = tilted_mean if tilted else weighted_mean
    rows: Rows = []
    for p, prompt in enumerate(samples.prompts):
        log_w = log_weights[p]
        values = {REWARD: mean_of(samples.rewards[p], log_w), ESS: float(effective_sample_size(log_w))}
        values[KL] = tilted_kl(log_w) if tilted else best_of_n_kl_bound(int(strength))
        values |= {metric: mean_of(of_all[p], log_w) for metric, of_all in samples.scores.items()}
        if np.isfinite(log_w).sum() >= size:
            rng = np.random.default_rng(seed_of("sets", seed, rule, repr(strength), p))
            values |= _set_values(samples, p, draw_sets(log_w, size, SETS, rng), suite, debias=tilted)
        rows += [(rule, strength, p, prompt, metric, value) for metric, value in values.items()]
    return rows


def _set_values(samples: Samples, p: int, sets: np.ndarray, suite: MetricSuite, *, debias: bool) -> Mapping[str, float]:
    """The metrics of sets of one prompt's images, averaged over the sets, int [SETS, K]."""
    values: dict[str, float] = {}
    evals = set_evals(suite)
    for name, features in samples.features.items():
        with named_failure(name, "on the base model's images", suite.timeout):
            measured = [measure_sets(evals[name], features[p], members, samples.prompts[p]) for members in sets]
        for metric in dict.fromkeys(key for of_set in measured for key in of_set):
            of_sets = checked_scores([of_set.get(metric, np.nan) for of_set in measured], len(sets), metric)
            values[metric] = set_mean(of_sets, sets, debias=debias)
    return values
