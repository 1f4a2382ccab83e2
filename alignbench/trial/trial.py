"""`check --eval`: metrics of diversity on trial, on drawn images and on the embedded model's own."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from alignbench.backbone import Backbone
from alignbench.embedded.drawing.palette import COLORS
from alignbench.errors import UserError
from alignbench.figures.style import write_figure
from alignbench.files.writing import claimed, fill
from alignbench.load import load_backbone, load_eval
from alignbench.runtime import launch
from alignbench.scorer import SetMetric
from alignbench.tasks import EvalChoice, load_task
from alignbench.trial import figure
from alignbench.trial.judging import rankings, seen, verdicts
from alignbench.trial.measuring import Differences
from alignbench.trial.own_images import own_pool
from alignbench.trial.pools import Pool, drawn_pool
from alignbench.trial.record import Trial
from alignbench.trial.subjects import subjects

MODEL = "tiny"
"""The model whose images are chosen among, and whose encoder gives the latents of drawn images."""
TASKS = ("ocr", "geneval")
"""The tasks whose evaluation prompts the model gets; evals have the settings of the first one by default."""

Advance = Callable[[int, int, str], None]
"""Called with the number of pools that are done, the number of all pools, and a note."""


@dataclass(frozen=True)
class Size:
    """How many prompts a trial has of each source."""

    drawn: int
    own: int


FULL, QUICK = Size(48, 12), Size(12, 4)
"""Three minutes and less than one on one core, with the evals of docs/evals.md."""


def choices(names: Sequence[str], settings: Mapping[str, dict[str, Any]]) -> list[EvalChoice]:
    """Chooses the evals of a trial, with the settings of the embedded model's task, which `settings` override.

    Raises:
        UserError: settings of an eval that is not among the names, or an unknown eval.
    """
    return load_task(TASKS[0]).choices(list(names), settings)


def put_on_trial(
    chosen: Sequence[EvalChoice],
    out: Path | None,
    *,
    size: Size = FULL,
    seed: int = 0,
    advance: Advance = lambda done, total, note: None,
) -> Trial:
    """Plants losses of diversity, and measures how well each metric detects them.

    Args:
        chosen: the evals, each of them a set metric.
        out: a new folder for `trial.json`, `trial.csv` and `trial.png`; None to write nothing.
        size: how many prompts there are.
        seed: of all draws.
        advance: called as the work proceeds, for a progress display.

    Raises:
        UserError: an eval is unknown or is not a set metric, or the folder exists already.
    """
    metrics = {choice.title: _set_metric(choice) for choice in chosen}
    with claimed(out):
        start = time.monotonic()
        for metric in metrics.values():
            metric.prepare()
        torch.set_num_threads(launch.threads())
        policy = load_backbone(MODEL, device="cpu")
        prompts = _prompts(size.own)
        policy.prepare(prompts)
        differences, makers = Differences(), [*_drawn(size.drawn, policy, seed), *_own(prompts, policy, seed)]
        for number, make in enumerate(makers):
            advance(number, len(makers), "")
            differences.add(make(), metrics, number, seed)
        advance(len(makers), len(makers), "")
        known = differences.metrics
        found, ranked = seen(differences, seed), rankings(differences)
        trial = Trial(
            evals={choice.title: metric.settings.model_dump() for choice, metric in zip(chosen, metrics.values(), strict=True)},
            seed=seed,
            drawn_prompts=size.drawn,
            own_prompts=size.own,
            seconds=time.monotonic() - start,
            metrics={name: [m for m in of if m in known] for name, of in differences.of_eval.items()},
            verdicts=verdicts(differences, found, ranked),
            rankings=ranked,
            seen=found,
        )
        if out is not None:
            fill(out, lambda folder: _write(trial, folder), last="trial.json")
    return trial


def _set_metric(choice: EvalChoice) -> SetMetric:
    metric = load_eval(choice.eval, **choice.settings)
    if not isinstance(metric, SetMetric):
        raise UserError(
            f"{choice.eval!r} scores single images; a trial of diversity needs a set metric, such as diversity or mode_coverage"
        )
    metric.name = choice.title
    return metric


def _prompts(count: int) -> list[str]:
    """Evaluation prompts of the model's tasks in turn, those that name no colour: there is a colour to lose."""
    each = [[p for p in load_task(task).eval_prompts if not COLORS.keys() & re.findall(r"\w+", p)] for task in TASKS]
    return [prompt for together in zip(*each, strict=False) for prompt in together][:count]


def _drawn(count: int, policy: Backbone, seed: int) -> list[Callable[[], Pool]]:
    """A function for each drawn pool."""
    made = subjects(count, np.random.default_rng([seed, 0]))

    def encode(images: np.ndarray) -> torch.Tensor:
        return policy.encode_images(list(images)).cpu()

    return [partial(drawn_pool, s, encode, np.random.default_rng([seed, 1, i])) for i, s in enumerate(made)]


def _own(prompts: Sequence[str], policy: Backbone, seed: int) -> list[Callable[[], Pool]]:
    """A function for each pool of the model's images."""
    return [partial(own_pool, policy, p, np.random.default_rng([seed, 2, i])) for i, p in enumerate(prompts)]


def _write(trial: Trial, folder: Path) -> None:
    write_figure(folder / "trial.png", figure.draw(trial))
    frame(trial).to_csv(folder / "trial.csv", index=False)
    (folder / "trial.json").write_text(trial.model_dump_json(indent=2) + "\n", encoding="utf-8")


def frame(trial: Trial) -> pd.DataFrame:
    """A row for each metric, source, condition, degree, number of images and number of prompts."""
    rows = [
        {
            **s.model_dump(include={"metric", "source", "condition", "kind", "degree", "images"}),
            "prompts": prompts,
            "effect": s.effect.value,
            "falls": falls.value,
            "falls_lower": falls.lower,
            "falls_upper": falls.upper,
            "rises": s.rises[prompts].value if s.rises else None,
        }
        for s in trial.seen
        for prompts, falls in s.falls.items()
    ]
    return pd.DataFrame(rows)
