"""The evaluations of a run: of the base model, of the trained model, and of the policy along the training."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from alignbench.backbone import Backbone
from alignbench.config.run_config import RunConfig
from alignbench.evaluation import curve
from alignbench.evaluation.evaluate import (
    PATHS,
    Evaluation,
    MetricSuite,
    evaluate,
    evaluation_prompts,
    path_kl,
    validation_prompts,
    with_measured,
)
from alignbench.inference.drawing import PLAIN, Drawing
from alignbench.records.record import Budget, InferenceRecord
from alignbench.runtime.micro_batch import MicroBatch
from alignbench.runtime.processes import Processes
from alignbench.tasks import Task
from alignbench.training.progress import Console

ROWS = 64
"""Rows in one model call of an evaluation, where `micro_batch` does not say."""
DETERMINES_BASE = {"backbone", "task", "scorer_url", "evals", "guidance", "evaluation", "threads", "device"}
"""Keys of the configuration on which the evaluation of a base model depends."""


class PromptSets:
    """The held-out prompts of a run.

    Attributes:
        evaluation: the prompts of the record's evaluations.
        validation: those of the evaluations along the training; empty where there are none.
    """

    def __init__(self, task: Task, config: RunConfig) -> None:
        """Raises UserError where more prompts are asked for than the task has."""
        self.evaluation = evaluation_prompts(task, config.evaluation)
        self.validation = validation_prompts(task, config.evaluation) if config.evaluation.every else []


class RunEvaluator:
    """Evaluates the policy as it is at the time of a call.

    Attributes:
        cache: evaluations of base models by what they depend on; runs that share it evaluate a base model once.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        prompts: PromptSets,
        policy: Backbone,
        suite: MetricSuite,
        micro_batch: MicroBatch,
        processes: Processes,
        console: Console,
        cache: dict[str, Evaluation],
    ) -> None:
        self.config, self.task, self.prompts, self.policy, self.suite = config, task, prompts, policy, suite
        self.micro_batch, self.processes, self.console, self.cache = micro_batch, processes, console, cache
        self.drawing = Drawing(config.inference, suite.reward(normalise=config.normalise_rewards))

    def base(self, budget: Budget) -> Evaluation:
        """The base model on the evaluation prompts."""
        key = self._base_key()
        if key not in self.cache:
            with self.policy.reference():
                evaluation = self.evaluate("base model", budget)
            self.cache[key] = with_measured(evaluation, curve.PATH_KL, np.zeros(len(evaluation.prompts)))
        return self.cache[key]

    def final(self, budget: Budget) -> Evaluation:
        """The policy on the evaluation prompts, drawn by the run's method of inference, with its path KL to the base model.

        Where the method chooses among images they have no such KL, and the metric is left out.
        """
        evaluation = self.evaluate("trained model", budget, drawing=self.drawing)
        if not self.drawing.keeps_paths:
            return evaluation
        with self.drawing.model(self.policy) as model:
            return with_measured(evaluation, curve.PATH_KL, self._path_kl(evaluation.prompts, PATHS, budget, model))

    def inference_record(self, base: Evaluation, final: Evaluation) -> InferenceRecord | None:
        """What an image of the final evaluation took, beside one of the base model."""
        if base.cost is None or final.cost is None:
            return None
        return InferenceRecord(
            method=self.drawing.config.method,
            model_rows_per_image=final.cost.model_rows,
            base_model_rows_per_image=base.cost.model_rows,
            reward_calls_per_image=final.cost.reward_calls,
            kl_bound=self.drawing.kl_bound,
        )

    def validation_base(self, budget: Budget) -> Evaluation:
        """The base model on the validation prompts."""
        key = json.dumps(["validation", self._base_key()])
        if key not in self.cache:
            with self.policy.reference():
                evaluation = self._evaluate_validation(budget)
            self.cache[key] = with_measured(evaluation, curve.PATH_KL, np.zeros(len(self.prompts.validation)))
        return self.cache[key]

    def validation(self, budget: Budget) -> Evaluation:
        """The policy as it is on the validation prompts, with its path KL to the base model."""
        evaluation = self._evaluate_validation(budget)
        return with_measured(evaluation, curve.PATH_KL, self._path_kl(self.prompts.validation, curve.PATHS, budget))

    def evaluate(
        self,
        what: str,
        budget: Budget,
        prompts: Sequence[str] | None = None,
        images_per_prompt: int | None = None,
        drawing: Drawing = PLAIN,
    ) -> Evaluation:
        """Evaluates the policy with every metric.

        Args:
            what: a name for what is evaluated, as the user sees it.
            budget: the seconds are added to it.
            prompts, images_per_prompt: in place of the evaluation prompts and the configured number.
            drawing: the method by which images are drawn.
        """
        with _evaluation_time(budget), self.console.activity(what) as advance:

            def evaluate_within(micro_batch: int | None) -> Evaluation:
                return evaluate(
                    self.policy,
                    self.task,
                    self.suite,
                    self.config.evaluation,
                    prompts=prompts,
                    images_per_prompt=images_per_prompt,
                    micro_batch=micro_batch or ROWS,
                    drawing=drawing,
                    advance=advance,
                    processes=self.processes,
                )

            return self._fit(evaluate_within)

    def _evaluate_validation(self, budget: Budget) -> Evaluation:
        images = self.config.evaluation.validation_images
        return self.evaluate("policy on the validation prompts", budget, self.prompts.validation, images)

    def _path_kl(self, prompts: Sequence[str], paths: int, budget: Budget, model: Backbone | None = None) -> np.ndarray:
        seed, measured = self.config.evaluation.seed, model or self.policy

        def measure(micro_batch: int | None) -> np.ndarray:
            rows = micro_batch or ROWS
            return path_kl(measured, prompts, seed, paths=paths, micro_batch=rows, processes=self.processes)

        with _evaluation_time(budget):
            return self._fit(measure)

    def _fit(self, work: Callable[[int | None], Any]) -> Any:
        return self.micro_batch.fit(work, lambda: ROWS)

    def _base_key(self) -> str:
        return json.dumps(self.config.model_dump(mode="json", include=DETERMINES_BASE), sort_keys=True)


@contextmanager
def _evaluation_time(budget: Budget) -> Iterator[None]:
    began = time.perf_counter()
    yield
    budget.seconds_evaluation += time.perf_counter() - began
