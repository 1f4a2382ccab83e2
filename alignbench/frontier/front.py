"""The front of a task and backbone: reward, diversity and KL of the tilted target over beta, and of best-of-n.

The tilted target is the distribution with the largest reward at its KL divergence to the base model. Its line therefore
separates the loss of diversity that the reward itself requires from what a method loses needlessly. It is not an upper bound
of every metric: at a higher KL a method may lie above it.

This module has the front as a record with a table. `estimated` computes one from samples of the base model, and `exact` for a
backbone that knows its target.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from alignbench.backbone import Backbone, checksum
from alignbench.config.run_config import EvaluationConfig
from alignbench.errors import RunError, UserError
from alignbench.evaluation.evaluate import MetricSuite, evaluation_prompts, validation_prompts
from alignbench.files.json_files import read_json
from alignbench.files.reading import read_table
from alignbench.files.writing import write_atomically
from alignbench.load import complete_settings
from alignbench.rollouts.executor import predict
from alignbench.scorer import SetMetric
from alignbench.settings import Settings, validate
from alignbench.statistics import mean_interval
from alignbench.tasks import Task

TABLE, RECORD = "front.parquet", "front.json"
TILT, BEST_OF = "tilt", "best_of"
"""Values of the table's column `rule`. The column `strength` holds beta for `tilt`, and n for `best_of`."""
REWARD, KL, ESS = "reward", "kl_base", "effective_samples"
"""What every front has beside its metrics: the total reward, the KL divergence to the base model in nats, and the effective
number of samples of the prompt."""
COLUMNS = ["rule", "strength", "prompt_index", "prompt", "metric", "value"]
Rows = list[tuple[str, float, int, str, str, float]]
"""Rows of the table, in the order of `COLUMNS`."""
GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
"""Default values of beta, in units of 1 / (standard deviation of the reward within a prompt)."""
SATURATED = 0.02
"""Default values of beta end where a step adds less than this to the reward, in units of its deviation within a prompt."""
FORMAT = 2
"""Version of how fronts are computed; fronts of another version are computed again."""
EVALUATION, VALIDATION = "evaluation", "validation"
"""Kinds of prompt sets: the prompts of a run's evaluation, or those of its curve."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a front.

    Attributes:
        kind: `EVALUATION` or `VALIDATION`.
        prompts: the prompts.
        size: K, the number of images in a set: that of a prompt in such an evaluation.
    """

    kind: str
    prompts: list[str]
    size: int

    @classmethod
    def of(cls, task: Task, config: EvaluationConfig, kind: str = EVALUATION) -> "PromptSet":
        """Chooses the prompts of a kind; raises UserError if the task has fewer prompts than the configuration asks for."""
        if kind == VALIDATION:
            return cls(kind, validation_prompts(task, config), config.validation_images)
        return cls(kind, evaluation_prompts(task, config), config.images_per_prompt)


class FrontRecord(Settings):
    """The record of a front, `front.json`: how it was made, and what its metrics are."""

    schema_version: int = FORMAT
    key: str
    """Digest of everything that the front depends on (`content_key`)."""
    task: str
    backbone: str
    prompts: int
    """Number of prompts."""
    images: int
    """N, the number of the base model's samples for each prompt."""
    set_size: int
    """K, the number of images in a set: that of a prompt in an evaluation."""
    steps: int
    """Number of denoising steps of a sample."""
    guidance: float
    """Guidance scale of the base model; 1 is no guidance."""
    noise_seed: int
    """Seed of the samples' initial noise."""
    rewards: dict[str, float]
    """Reward -> its weight in the total reward, by which the base model is tilted."""
    normalised: bool
    """Whether several rewards were standardised within each prompt before they were added."""
    reward_deviation: float
    """Standard deviation of the base model's reward within a prompt, as the root mean square over prompts."""
    left_out: str | None = None
    """Why the front has no larger beta; null if none was left out."""
    headline: list[str] = Field(default_factory=list)
    """Metrics to show first: that of each independent scorer, and those of sets of images."""
    directions: dict[str, bool | None] = Field(default_factory=dict)
    """Metric -> whether a higher value is better; null where neither direction is."""
    roles: dict[str, str] = Field(default_factory=dict)
    """Metric -> `reward`, `judge`, or `part` of another metric."""
    set_metrics: list[str] = Field(default_factory=list)
    """Metrics of sets of images: how diverse the images of a prompt are."""
    prompt_set: str = EVALUATION
    """Whether the front is for a run's evaluation (`evaluation`) or for its curve (`validation`)."""
    exact: bool = False
    """Whether reward, KL and the backbone's own metrics are exact, and images are drawn from the target itself."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The keys of a run's configuration on which the front depends; see `dependence`."""
    fingerprint: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of each part of the task."""


@dataclass(frozen=True)
class Front:
    """A front: its record, and a table with a row for each rule, strength, prompt and metric."""

    record: FrontRecord
    table: pd.DataFrame

    def strengths(self, rule: str = TILT) -> list[float]:
        """Lists the strengths of a rule in ascending order."""
        return sorted(self.table.loc[self.table.rule == rule, "strength"].unique())

    def values(self, metric: str, rule: str = TILT) -> np.ndarray:
        """Returns a metric for each strength and prompt, float [S, P]; NaN where a prompt has no value.

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
        """The front's metrics, without reward, KL and effective samples."""
        return [m for m in self.table.metric.unique() if m not in (REWARD, KL, ESS)]


@dataclass
class FrontMetrics:
    """What is known of the metrics of a front after its images have been scored.

    Attributes:
        scored: names of the metrics of single images.
        set_metrics: eval of sets -> the names of its metrics.
        directions: metric -> whether a higher value is better.
        roles: metric -> its role in a record.
    """

    scored: set[str] = field(default_factory=set)
    set_metrics: dict[str, list[str]] = field(default_factory=dict)
    directions: dict[str, bool | None] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)

    def headline(self, suite: MetricSuite) -> list[str]:
        """Chooses the metrics to show first.

        These are the metrics of independent scorers, and for each set metric the one with its name, or else all that have a
        direction.
        """
        headline = [name for name in suite.evals if name in self.scored and name not in suite.rewards]
        for name, metrics in self.set_metrics.items():
            shown = [name] if name in metrics else metrics
            headline += [metric for metric in shown if self.directions[metric] is not None]
        return headline


def strengths_to_measure(betas: Sequence[float] | None, deviation: float, task: Task) -> list[float]:
    """Lists the values of beta of a front: those given and 0, or else `GRID` over the deviation of the reward.

    Raises:
        RunError: the deviation is 0 or NaN.
    """
    if not deviation > 0:
        raise RunError(f"the reward of task {task.name!r} is the same for all images of a prompt: nothing can be tilted by it")
    return sorted({*betas, 0.0}) if betas is not None else [step / deviation for step in GRID]


def assemble_front(
    rows: Rows,
    metrics: FrontMetrics,
    policy: Backbone,
    task: Task,
    suite: MetricSuite,
    config: EvaluationConfig,
    prompt_set: PromptSet,
    **others: Any,
) -> Front:
    """Makes a front of its rows and of how they were made.

    Args:
        rows: the rows of the table.
        metrics: what is known of its metrics.
        policy, task, suite, config: what the front was measured with.
        prompt_set: the prompts and the size of a set.
        others: the remaining fields of `FrontRecord`.
    """
    record = FrontRecord(
        key="",
        task=task.name,
        prompts=len(prompt_set.prompts),
        set_size=prompt_set.size,
        steps=config.steps or policy.default_steps,
        guidance=policy.guidance,
        noise_seed=config.seed,
        rewards=suite.weights,
        directions=metrics.directions,
        roles=metrics.roles,
        headline=metrics.headline(suite),
        set_metrics=list(dict.fromkeys(metric for of_eval in metrics.set_metrics.values() for metric in of_eval)),
        prompt_set=prompt_set.kind,
        fingerprint=task.fingerprint(),
        **others,
    )
    return Front(record, pd.DataFrame(rows, columns=COLUMNS))


def set_evals(suite: MetricSuite) -> dict[str, SetMetric]:
    """Returns the suite's evals that measure sets of images, by name."""
    return {name: metric for name, metric in suite.evals.items() if isinstance(metric, SetMetric)}


# ---------------------------------------------------------------------------------------------------- files


PROTOCOL = {"prompts", "images_per_prompt", "validation_prompts", "validation_images", "steps", "solver", "seed"}
"""Settings of an evaluation on which a front depends."""
DEFAULT_PROTOCOL = {"solver": EvaluationConfig().solver}
"""What older records do not have."""


def dependence(config: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the part of a run's resolved configuration on which its front depends, besides the content of its task.

    The backbone has all its settings, also where an older record has only those that were given.
    """
    backbone = config.get("backbone")
    evaluation = config.get("evaluation") or {}
    keys = ("guidance", "normalise_rewards", "scorer_url", "reward")
    return {
        "backbone": complete_settings("backbone", backbone) if isinstance(backbone, Mapping) else backbone,
        **{key: config.get(key) for key in keys},
        "evaluation": {key: evaluation.get(key, DEFAULT_PROTOCOL.get(key)) for key in sorted(PROTOCOL)},
    }


def content_key(policy: Backbone, task: Task, suite: MetricSuite, config: EvaluationConfig, **others: Any) -> str:
    """Computes a digest of everything that a front depends on: weights, task, protocol, and metrics with their settings.

    Args:
        policy: the backbone.
        task: the task.
        suite: the evals.
        config: the protocol.
        others: further values to include.
    """
    weights = {
        name: [
            [list(p.shape), checksum(p), checksum(p.flatten()[::7])]  # the second one changes if values are permuted
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
    """The mean absolute value of one velocity of the base model, to four digits.

    It depends on the text encoders, whose weights may no longer be in memory.
    """
    with policy.reference():
        x = torch.linspace(-1, 1, int(np.prod(policy.latent_shape)), device=policy.device).view(1, *policy.latent_shape)
        velocity = predict(policy, x, 0.5, policy.encode([prompt]), torch.zeros(1, dtype=torch.long, device=policy.device))
    return f"{float(velocity.float().abs().mean()):.4g}"


def write_front(front: Front, folder: Path) -> None:
    """Writes the two files of a front. The record comes last, so a folder that has it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TABLE, lambda p: front.table.to_parquet(p, index=False))
    text = front.record.model_dump_json(indent=2) + "\n"
    write_atomically(folder / RECORD, lambda p: p.write_text(text, encoding="utf-8"))


def read_front(folder: Path) -> Front | None:
    """Reads the front in a folder; None if the folder has none.

    Raises:
        UserError: a file is damaged, or was written by another version.
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
    """Makes a table of means over prompts with Student's intervals.

    Returns:
        A row for each rule, strength and metric, with the columns value, lower, upper and n.
    """
    rows = []
    for (rule, strength, metric), part in front.table.groupby(["rule", "strength", "metric"], sort=False):
        interval = mean_interval(part["value"].to_numpy())
        rows.append({"rule": rule, "strength": strength, "metric": metric, **interval._asdict()})
    return pd.DataFrame(rows)
