"""The front of a task and backbone: reward, diversity and KL of the tilted target over beta, and of best-of-n.

N images of each evaluation prompt are drawn from the base model and scored once. Everything else is arithmetic on them (see
`alignbench.frontier.tilt`). The tilted target is the distribution that has the most reward at its KL divergence to the base
model. Its line therefore tells which fall of diversity the reward itself asks for, and which a method lost needlessly. It is
not an upper bound of every metric: at a higher KL a method may lie above it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from alignbench import groups
from alignbench.backbone import Backbone, checksum
from alignbench.config.run_config import EvaluationConfig
from alignbench.errors import RunError, UserError
from alignbench.evaluation.evaluate import MetricSuite, evaluate_images, evaluation_prompts, named_failure, validation_prompts
from alignbench.files.json_files import read_json
from alignbench.files.reading import read_table
from alignbench.files.writing import write_atomically
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
from alignbench.load import complete_settings
from alignbench.rollouts.executor import decode, predict, sample
from alignbench.rollouts.noise import seed_of
from alignbench.scorer import Scorer, SetMetric, checked_scores
from alignbench.settings import Settings, validate
from alignbench.statistics import mean_interval
from alignbench.tasks import Task

TABLE, RECORD = "front.parquet", "front.json"
TILT, BEST_OF = "tilt", "best_of"
"""Values of the table's column `rule`; its `strength` is beta of the one and n of the other."""
REWARD, KL, ESS = "reward", "kl_base", "effective_samples"
"""Rows of every front beside its metrics: the reward that is trained on, nats, and effective samples of the prompt."""
COLUMNS = ["rule", "strength", "prompt_index", "prompt", "metric", "value"]
GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
"""Betas by default, in units of one over the reward's deviation within a prompt."""
LEAST_SHARE = 0.1
"""Of the samples that must remain effective; a beta beyond is left out."""
SATURATED = 0.02
"""Of the reward's deviation: a default beta that adds less reward than this to the one before is left out."""
SETS = 100
"""Sets of images that a metric of sets is averaged over, for each prompt and strength."""
IMAGES_AT_ONCE = 256
FORMAT = 2
"""Of what is computed here; another one makes every front anew."""
EVALUATION, VALIDATION = "evaluation", "validation"
"""Whose prompts a front is for: those of a run's evaluation, or those of its curve."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a front.

    Attributes:
        kind: `EVALUATION` or `VALIDATION`.
        prompts: the prompts.
        size: images of a set, K: as many as a prompt has there.
    """

    kind: str
    prompts: list[str]
    size: int

    @classmethod
    def of(cls, task: Task, config: EvaluationConfig, kind: str = EVALUATION) -> "PromptSet":
        """Raises UserError where more prompts are asked for than the task has."""
        if kind == VALIDATION:
            return cls(kind, validation_prompts(task, config), config.validation_images)
        return cls(kind, evaluation_prompts(task, config), config.images_per_prompt)


class FrontRecord(Settings):
    """What must be known of a front to compare with it: `front.json`."""

    schema_version: int = FORMAT
    key: str
    """Digest of all that the front depends on."""
    task: str
    backbone: str
    prompts: int
    images: int
    """Samples of the base model for each prompt, N."""
    set_size: int
    """Images of a set, K: as many as a prompt has in an evaluation."""
    steps: int
    guidance: float
    noise_seed: int
    rewards: dict[str, float]
    """Reward -> its weight in the one that is tilted by."""
    normalised: bool
    """Whether several rewards were standardised within each prompt before they were added."""
    reward_deviation: float
    """Root mean square deviation of the reward within a prompt of the base model."""
    left_out: str | None = None
    """Why larger betas are not there."""
    headline: list[str] = Field(default_factory=list)
    """Metrics to show first: the one of each independent scorer, and those of sets of images."""
    directions: dict[str, bool | None] = Field(default_factory=dict)
    """Metric -> whether higher is better."""
    roles: dict[str, str] = Field(default_factory=dict)
    set_metrics: list[str] = Field(default_factory=list)
    """Metrics of sets of images: how diverse the images of a prompt are."""
    prompt_set: str = EVALUATION
    """Whether it is for a run's evaluation or for its curve."""
    exact: bool = False
    """Whether reward, KL and the backbone's own metrics are known, and images are drawn from the target itself."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The keys of a run's configuration on which the front depends; see `dependence`."""
    fingerprint: dict[str, str] = Field(default_factory=dict)
    """Of the task."""


@dataclass(frozen=True)
class Front:
    """A record with its table: a row for each rule, strength, prompt and metric."""

    record: FrontRecord
    table: pd.DataFrame

    def strengths(self, rule: str = TILT) -> list[float]:
        """The strengths of a rule in ascending order."""
        return sorted(self.table.loc[self.table.rule == rule, "strength"].unique())

    def values(self, metric: str, rule: str = TILT) -> np.ndarray:
        """A metric for each strength and prompt, float [S, P]; NaN where a prompt has none.

        Raises:
            UserError: the front has no such metric.
        """
        rows = self.table[(self.table.rule == rule) & (self.table.metric == metric)]
        if rows.empty:
            raise UserError(f"the front of task {self.record.task!r} has no metric {metric!r}")
        wide = rows.pivot(index="strength", columns="prompt_index", values="value")
        return np.asarray(wide.reindex(self.strengths(rule)).reindex(columns=range(self.record.prompts)), dtype=np.float64)

    @property
    def metrics(self) -> list[str]:
        """Its metrics, without reward, KL and effective samples."""
        return [m for m in self.table.metric.unique() if m not in (REWARD, KL, ESS)]


@dataclass(frozen=True)
class Samples:
    """The base model's images of each prompt, read once.

    Attributes:
        scores: metric -> float [P, N], one value for each image.
        rewards: float [P, N], what the target is tilted by.
        features: eval of sets -> what it reads of the images of each prompt.
        set_metrics: eval of sets -> the names of its metrics.
    """

    prompts: list[str]
    scores: dict[str, np.ndarray]
    rewards: np.ndarray
    features: dict[str, list[Any]]
    set_metrics: dict[str, list[str]]
    directions: dict[str, bool | None]
    roles: dict[str, str]


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
    """Draws and scores the base model's images, and computes the front from them.

    Args:
        images: N for each prompt; at least twice the images of a set.
        normalise_rewards: as of a run; see `groups.total`.
        betas: on raw rewards; by default `GRID` over the reward's deviation.
        best_of: values of n; those above N are left out.
        prompt_set: the prompts and the size of a set; by default those of an evaluation.
        micro_batch: rows in one model call, at most.
        advance: told what is being done, for a progress display.

    Raises:
        UserError: too few images, or more prompts than the task has.
        RunError: a scorer failed, or the reward is the same for all images.
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
    if not deviation > 0:
        raise RunError(f"the reward of task {task.name!r} is the same for all images of a prompt: nothing can be tilted by it")
    asked = sorted({*betas, 0.0}) if betas is not None else [step / deviation for step in GRID]
    rows: list[tuple[str, float, int, str, str, float]] = []
    left_out, reached = None, -np.inf
    for beta in asked:
        advance(f"tilting by beta = {beta:.3g}")
        log_weights = tilted_log_weights(samples.rewards, beta)
        effective = float(np.median(effective_sample_size(log_weights)))
        if effective < max(LEAST_SHARE * images, size):
            left_out = f"at beta = {beta:.3g} only {effective:.1f} of {images} samples of a prompt are effective"
            break
        mean = float(np.nanmean([tilted_mean(*of_prompt) for of_prompt in zip(samples.rewards, log_weights, strict=True)]))
        if betas is None and mean - reached < SATURATED * deviation:
            left_out = f"at beta = {beta:.3g} the reward rises no further"
            break
        reached = mean
        rows += _rows_of(TILT, beta, samples, log_weights, suite, size, config.seed)
    for n in best_of:
        if n <= (~np.isnan(samples.rewards)).sum(1).min() - size:
            weights = np.stack([best_of_log_weights(of_prompt, n) for of_prompt in samples.rewards])
            rows += _rows_of(BEST_OF, float(n), samples, weights, suite, size, config.seed)
    record = FrontRecord(
        key="",
        task=task.name,
        backbone=backbone,
        prompts=len(prompts),
        images=images,
        set_size=size,
        steps=config.steps or policy.default_steps,
        guidance=policy.guidance,
        noise_seed=config.seed,
        rewards=suite.weights,
        normalised=groups.standardises(suite.weights, normalise=normalise_rewards),
        reward_deviation=deviation,
        left_out=left_out,
        directions=samples.directions,
        roles=samples.roles,
        headline=headline_metrics(samples.scores, samples.set_metrics, samples.directions, suite),
        set_metrics=[metric for of_eval in samples.set_metrics.values() for metric in of_eval],
        prompt_set=chosen.kind,
        fingerprint=task.fingerprint(),
    )
    return Front(record, pd.DataFrame(rows, columns=COLUMNS))


def headline_metrics(
    scored: Container[str],
    set_metrics: Mapping[str, Sequence[str]],
    directions: Mapping[str, bool | None],
    suite: MetricSuite,
) -> list[str]:
    """Independent scorers' own metrics, and of each eval of sets the metric of its name, or all with a direction."""
    headline = [name for name in suite.evals if name in scored and name not in suite.rewards]
    for name, metrics in set_metrics.items():
        shown = [name] if name in metrics else metrics
        headline += [metric for metric in shown if directions[metric] is not None]
    return headline


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
    """Draws N images of each prompt from the base model with the noise of an evaluation, and reads them.

    Raises:
        RunError: a scorer failed.
    """
    scorers, set_metrics = suite.only(Scorer), set_evals(suite)
    scores: dict[str, list[np.ndarray]] = {}
    features: dict[str, list[Any]] = {name: [] for name in set_metrics}
    names: dict[str, list[str]] = {}
    directions: dict[str, bool | None] = {}
    roles: dict[str, str] = {}
    policy.prepare(prompts)
    at_once = max(1, IMAGES_AT_ONCE // images)
    for start in range(0, len(prompts), at_once):
        part = list(prompts[start : start + at_once])
        advance(f"drawing images of the base model ({start} of {len(prompts)} prompts done)")
        with policy.reference():
            steps = config.steps or policy.default_steps
            latents = sample(policy, part, images, steps, config.seed, micro_batch=micro_batch)
            drawn = decode(policy, latents, micro_batch)
        owners = [p for p in range(len(part)) for _ in range(images)]
        evaluation = evaluate_images(drawn, latents, part, owners, scorers)
        directions |= evaluation.directions
        roles |= evaluation.roles
        for metric, table in evaluation.table.groupby("metric", sort=False):
            wide = table.pivot(index="prompt_index", columns="image", values="value")
            scores.setdefault(str(metric), []).append(np.asarray(wide, dtype=np.float64))
        for name, measured in set_metrics.items():
            for p, prompt in enumerate(part):
                of_prompt = slice(p * images, (p + 1) * images)
                with named_failure(name, "on the base model's images", suite.timeout):
                    read = measured.read_images(drawn[of_prompt], latents[of_prompt].cpu(), prompt)
                    features[name].append(read)
                    if name not in names:
                        names[name] = list(measured.measure_read(read, range(images), prompt))
    for name, of_eval in names.items():
        directions |= {metric: set_metrics[name].higher_is_better(metric) for metric in of_eval}
        roles |= dict.fromkeys(of_eval, "judge")
    together = {metric: np.concatenate(parts) for metric, parts in scores.items()}
    of_reward = {name: torch.from_numpy(together[name]) for name in suite.rewards}
    rewards = groups.total(of_reward, suite.weights, normalise=normalise_rewards).numpy()
    return Samples(list(prompts), together, rewards, features, names, directions, roles)


def set_evals(suite: MetricSuite) -> dict[str, SetMetric]:
    """The suite's evals that measure sets of images, by name."""
    return {name: metric for name, metric in suite.evals.items() if isinstance(metric, SetMetric)}


def _rows_of(
    rule: str, strength: float, samples: Samples, log_weights: np.ndarray, suite: MetricSuite, size: int, seed: int
) -> list[tuple[str, float, int, str, str, float]]:
    """The table's rows of one strength."""
    tilted = rule == TILT
    mean_of = tilted_mean if tilted else weighted_mean
    metrics_of_sets = set_evals(suite)
    rows: list[tuple[str, float, int, str, str, float]] = []
    for p, prompt in enumerate(samples.prompts):
        log_w = log_weights[p]
        values = {REWARD: mean_of(samples.rewards[p], log_w), ESS: float(effective_sample_size(log_w))}
        # KL(best-of-n || base) <= log n - (n - 1) / n (Beirami et al. 2024, arXiv 2401.01879), with equality for no ties.
        values[KL] = tilted_kl(log_w) if tilted else float(np.log(strength) - (strength - 1) / strength)
        values |= {metric: mean_of(of_all[p], log_w) for metric, of_all in samples.scores.items()}
        if np.isfinite(log_w).sum() >= size:
            rng = np.random.default_rng(seed_of("sets", seed, rule, repr(strength), p))
            sets = draw_sets(log_w, size, SETS, rng)
            for name, features in samples.features.items():
                with named_failure(name, "on the base model's images", suite.timeout):
                    measured = [metrics_of_sets[name].measure_read(features[p], members, prompt) for members in sets]
                for of_set in dict.fromkeys(key for one in measured for key in one):
                    of_sets = checked_scores([one.get(of_set, np.nan) for one in measured], len(sets), of_set)
                    values[of_set] = set_mean(of_sets, sets, debias=tilted)
        rows += [(rule, strength, p, prompt, metric, value) for metric, value in values.items()]
    return rows


# ---------------------------------------------------------------------------------------------------- files


PROTOCOL = {"prompts", "images_per_prompt", "validation_prompts", "validation_images", "steps", "seed"}
"""Settings of an evaluation on which a front depends."""


def dependence(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's resolved configuration on which its front depends, beside the content of its task.

    The backbone has all its settings, also where an older record has only those that were given.
    """
    backbone = config.get("backbone")
    evaluation = config.get("evaluation") or {}
    keys = ("guidance", "normalise_rewards", "scorer_url", "reward")
    return {
        "backbone": complete_settings("backbone", backbone) if isinstance(backbone, Mapping) else backbone,
        **{key: config.get(key) for key in keys},
        "evaluation": {key: evaluation.get(key) for key in sorted(PROTOCOL)},
    }


def content_key(policy: Backbone, task: Task, suite: MetricSuite, config: EvaluationConfig, **others: Any) -> str:
    """Digest of all that a front depends on: weights, task, protocol and metrics with their settings."""
    weights = {
        name: [
            [list(p.shape), checksum(p), checksum(p.flatten()[::7])]  # the second sees values that changed places
            for p in component.module.parameters()
            if p.device.type != "meta"
        ]
        for name, component in policy.components().items()
    }
    parts = {
        "format": FORMAT,
        "weights": weights,
        "answer": _answer(policy, task.eval_prompts[0]),
        "guidance": policy.guidance,
        "steps": config.steps or policy.default_steps,
        "task": task.fingerprint(),
        "evaluation": config.model_dump(mode="json", include=PROTOCOL),
        "evals": suite.describe(),
        **others,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@torch.no_grad()
def _answer(policy: Backbone, prompt: str) -> str:
    """The size of one velocity of the base model, to four digits: text encoders may have left memory, but show in it."""
    with policy.reference():
        x = torch.linspace(-1, 1, int(np.prod(policy.latent_shape)), device=policy.device).view(1, *policy.latent_shape)
        velocity = predict(policy, x, 0.5, policy.encode([prompt]), torch.zeros(1, dtype=torch.long, device=policy.device))
    return f"{float(velocity.float().abs().mean()):.4g}"


def write_front(front: Front, folder: Path) -> None:
    """Writes the front's two files; the record last, so that a folder with one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TABLE, lambda p: front.table.to_parquet(p, index=False))
    text = front.record.model_dump_json(indent=2) + "\n"
    write_atomically(folder / RECORD, lambda p: p.write_text(text, encoding="utf-8"))


def read_front(folder: Path) -> Front | None:
    """The front in a folder, or None where there is none.

    Raises:
        UserError: its files are damaged, or of another version.
    """
    if not os.path.lexists(folder / RECORD):
        return None
    record = validate(FrontRecord, read_json(folder / RECORD, "front"), where=str(folder / RECORD))
    kinds: dict[str, Any] = dict(zip(COLUMNS, ("text", "number", "whole", "text", "text", "number"), strict=True))
    table = read_table(folder / TABLE, kinds)[COLUMNS]
    if not {TILT} <= set(table.rule) or not {REWARD, KL} <= set(table.metric):
        raise UserError(f"{folder / TABLE} is not a front: its reward or KL is missing")
    return Front(record, table)


def summary(front: Front) -> pd.DataFrame:
    """A row for each rule, strength and metric: mean over prompts with Student's interval (value, lower, upper, n)."""
    rows = []
    for (rule, strength, metric), part in front.table.groupby(["rule", "strength", "metric"], sort=False):
        interval = mean_interval(part["value"].to_numpy())
        rows.append({"rule": rule, "strength": strength, "metric": metric, **interval._asdict()})
    return pd.DataFrame(rows)
