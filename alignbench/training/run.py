"""A run: evaluates the base model, trains it with one (objective, sampler) pair, evaluates it again and writes the record."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignbench import groups
from alignbench.backbone import KnownDistributions, device_named
from alignbench.config.run_config import PLUGINS, RunConfig, load_config
from alignbench.errors import DiskError, RunError, ScorerError, UserError
from alignbench.evaluation.evaluate import (
    Evaluation,
    MetricSuite,
    alarms,
    check_scores_vary,
    metric_changes,
    too_faint,
)
from alignbench.figures import plots
from alignbench.load import load_configured_backbone, load_objective, load_sampler, threads_of
from alignbench.objective import Objective
from alignbench.records.environment import environment
from alignbench.records.record import CONFIG, Protocol, Result, RunInfo
from alignbench.rollouts.executor import rollout
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.plan import Plan
from alignbench.runtime import launch
from alignbench.runtime.micro_batch import first_line
from alignbench.runtime.processes import Processes, join
from alignbench.sampler import Sampler
from alignbench.tasks import RewardChoice, Task, load_task
from alignbench.training import engine
from alignbench.training.checkpoint import has_checkpoint
from alignbench.training.pairs import check_pairs
from alignbench.training.progress import Console, Silent
from alignbench.training.run_evaluation import PromptSets, RunEvaluator
from alignbench.training.run_folder import RunFolder, check_free
from alignbench.training.tracking import Tracking, check_trackers
from alignbench.training.trainer import Trainer

TREE_CANDIDATES = 4
"""Prompts that are rolled out for the tree drawing; the one whose rewards differ most is drawn."""
DRAWN_BETA = 2.0
"""Inverse temperature of the target in that drawing, for an objective that has none of its own."""


def run(
    config: RunConfig,
    out: Path,
    *,
    console: Console | None = None,
    resume: bool = False,
    bases: dict[str, Evaluation] | None = None,
) -> Result:
    """Trains and evaluates one pair, and writes everything into the folder `out`.

    If a launcher started several ranks, each calls this with the same arguments. They share the work; rank 0 writes the
    folder, and all return the record.

    Args:
        config: every setting of the run.
        out: a new or empty folder; with `resume`, the folder of an interrupted run.
        console: shows the progress; by default nothing is shown.
        resume: continue from the newest checkpoint in `out`.
        bases: evaluations of base models, to be shared between runs: a base model that would be evaluated in the same way
            again is not.

    Returns:
        The record, as in `result.json`.

    Raises:
        UserError: the configuration is wrong or the folder is taken, also by another process; nothing has been written.
        RunError: the run failed; what was measured until then is in the folder.
        KeyboardInterrupt: after a checkpoint has been written.
    """
    processes = join(device_named(config.device), sharded=config.sharded or launch.asks_for_sharding())
    out = Path(processes.all_gather_object(str(out))[0])
    if not resume:
        processes.on_all_ranks(lambda: check_free(out))
    view = console if console and processes.is_rank_zero else Silent()
    try:
        pair_run = processes.on_all_ranks(lambda: _PairRun(config, out, view, processes))
        if processes.sharded:
            pair_run.policy.shard()
        processes.on_all_ranks(lambda: pair_run.prepare({} if bases is None else bases))
        with pair_run.folder.claimed(resume=resume):
            return pair_run.run(resume)
    except (ScorerError, DiskError) as error:
        if not (out / CONFIG).is_file():
            raise
        raise type(error)(f"{error}; once it works, go on with: alignbench run --resume {out}") from error
    except torch.OutOfMemoryError as error:
        raise RunError(f"out of memory: {first_line(error)}") from error


class _PairRun:
    """One run: what it loads, and its course from the first evaluation to the record."""

    def __init__(self, config: RunConfig, out: Path, console: Console, processes: Processes) -> None:
        """Loads task, objective, sampler, metrics and model; what can be refused is refused before anything large is loaded."""
        self.config = config = config.anchored()
        self.console, self.processes = console, processes
        self.folder = RunFolder(out, processes, console.warn)
        task = load_task(config.task)
        self.fingerprint = task.fingerprint()
        self.task = _with_remote_reward(task, config)
        self.objective = load_objective(config.objective.name, **config.objective.settings)
        self.sampler = load_sampler(config.sampler.name, **config.sampler.settings)
        self.plan = self.sampler.plan(0.0, np.random.default_rng(0))
        _check_fit(self.objective, self.sampler, self.plan)
        self.prompts = PromptSets(self.task, config)
        check_trackers(config.trackers)
        console.status("loading models")
        self.suite = MetricSuite(self.task, config.scorer_timeout)
        self.suite.require()
        self.policy = load_configured_backbone(config)
        self.suite.prepare()
        rewarded = self.task.train_prompts if self.objective.needs.training and not config.pairs else ()
        self.suite.check_prompts([*self.prompts.evaluation, *self.prompts.validation], rewarded)
        self.status = "complete"

    def prepare(self, bases: dict[str, Evaluation]) -> None:
        """Builds what holds weights or refers to them, once these are on their devices.

        Args:
            bases: the cache of base models' evaluations.
        """
        config, prompts = self.config, self.task.train_prompts
        loaded = (self.policy, self.objective, self.sampler, self.suite)
        self.trainer = trainer = Trainer(config, prompts, *loaded, self.processes, self.fingerprint)
        self.evaluator = RunEvaluator(
            config, self.task, self.prompts, self.policy, self.suite, trainer.micro_batch, self.processes, self.console, bases
        )
        if trainer.pairs:
            self.console.status(f"checking the images of {len(trainer.pairs)} pairs")
            check_pairs(self.processes.share(trainer.pairs), self.policy.check_image)
        training_prompts = [pair.prompt for pair in trainer.pairs] or prompts
        self.policy.prepare([*training_prompts, *self.prompts.evaluation, *self.prompts.validation])

    def run(self, resume: bool) -> Result:
        """The whole run, in a folder that this process has claimed; returns its record."""
        trainer, folder = self.trainer, self.folder
        trainer.check_together()
        if resume and has_checkpoint(folder.checkpoints):
            self._restore()
        folder.write_config(self.config)
        self.console.begin(self.config, self.policy, self.sampler.plan(0.0, np.random.default_rng(0)), threads_of(self.config))
        for sentence in _ineffective_choices(self.config, self.objective):
            self.console.warn(sentence)
        base = self.evaluator.base(trainer.budget)
        check_scores_vary(self.suite, base)
        for sentence in too_faint(self.suite, base):
            self.console.warn(sentence)
        folder.write_evaluations(base=base)
        if isinstance(self.policy, KnownDistributions):
            folder.add_target_distribution(self.policy.target_distribution(base.prompts[0]))
        folder.add_distribution(base.distribution, 0)
        with self._tracking() as tracking:
            self._add_to_curve()
            self._train(tracking)
            with trainer.averaged_weights():
                result = self._finish(base)
            tracking.log_result(result)
        folder.write_result(result)
        if self.config.save_images:
            folder.draw_plots()
        self.console.end(result, folder.path)
        return result

    def _restore(self) -> None:
        trainer, folder = self.trainer, self.folder
        for damage in trainer.restore(folder.checkpoints):
            self.console.warn(f"{damage}; going on from iteration {trainer.iteration}")
        for change in trainer.changes:
            self.console.warn(change)
        folder.read_tables(trainer.iteration)

    def _train(self, tracking: Tracking) -> None:
        """Trains up to the last iteration or the end of the budget; whatever ends it, what was measured is in the folder."""
        trainer, folder = self.trainer, self.folder
        try:
            if self.objective.needs.training:
                self._iterate(tracking)
            trainer.save(folder.checkpoints)
        except BaseException as error:
            if self.processes.raised_on_all_ranks(error):
                try:
                    if not trainer.weights_partially_updated and trainer.saved != trainer.iteration:
                        trainer.save(folder.checkpoints)
                finally:
                    folder.write_metrics(trainer.metrics)
            raise
        folder.write_metrics(trainer.metrics)

    def _iterate(self, tracking: Tracking) -> None:
        config, trainer, folder = self.config, self.trainer, self.folder
        with self.console.training(config.iterations, trainer.progress()) as report:
            while trainer.progress() < 1:
                progress_before = trainer.progress()
                row = trainer.iterate()
                if self._is_snapshot_due(progress_before):
                    row |= self._snapshot()
                self._add_to_curve()
                tracking.log(row)
                report(row, trainer.progress())
                if trainer.iteration % config.checkpoint_every == 0 and trainer.progress() < 1:
                    trainer.save(folder.checkpoints)
                    folder.write_metrics(trainer.metrics)
        if config.iterations is None or trainer.iteration < config.iterations:
            self.status = "budget spent"

    def _is_snapshot_due(self, progress_before: float) -> bool:
        """Whether the iteration passed one of the evenly spaced points of the training; its end is evaluated in any case."""
        parts, progress = self.config.snapshots + 1, self.trainer.progress()
        return int(progress_before * parts) < int(progress * parts) and progress < 1

    def _snapshot(self) -> dict[str, float]:
        """Numbers for the iteration's row that a model with known distributions computes itself; its distribution is kept."""
        if not isinstance(self.policy, KnownDistributions):
            return {}
        began, prompts = time.perf_counter(), self.prompts.evaluation
        with self.trainer.averaged_weights():
            measured = self.policy.measure(prompts)
            self.folder.add_distribution(self.policy.distribution(prompts[0]), self.trainer.iteration)
        self.trainer.budget.seconds_evaluation += time.perf_counter() - began
        return {f"measured_{name}": float(metric.values.mean()) for name, metric in measured.items()}

    def _add_to_curve(self) -> None:
        """Evaluates the policy on the validation prompts if that is due and has not been done at this iteration."""
        trainer, every, curve = self.trainer, self.config.evaluation.every, self.folder.curve
        if every is None or not self.prompts.validation or not self.objective.needs.training:
            return
        is_due = trainer.iteration % every == 0 or trainer.progress() == 1
        if not is_due or (curve is not None and (curve["iteration"] == trainer.iteration).any()):
            return
        if trainer.iteration == 0:
            evaluation = self.evaluator.validation_base(trainer.budget)
        else:
            with trainer.averaged_weights():
                evaluation = self.evaluator.validation(trainer.budget)
        spent = trainer.budget
        model_rows = spent.model_rows_rollout + spent.model_rows_train
        self.folder.add_to_curve(evaluation, trainer.iteration, model_rows, spent.seconds)

    def _tracking(self) -> Tracking:
        config = self.config if self.processes.is_rank_zero else self.config.model_copy(update={"trackers": ()})
        return Tracking(config, self.folder.path, self.trainer.iteration)

    def _finish(self, base: Evaluation) -> Result:
        """Evaluates the trained model and writes the tables and images of it; returns the record."""
        config, trainer, folder = self.config, self.trainer, self.folder
        final = self.evaluator.final(trainer.budget) if trainer.iteration else base
        folder.write_evaluations(base=base, final=final)
        folder.add_distribution(final.distribution, trainer.iteration)
        result = self._result(base, final)
        if config.save_images and not isinstance(self.policy, KnownDistributions):
            reward = next(iter(self.suite.rewards))
            folder.write_samples(base, final, reward, config.evaluation.images_per_prompt)
            self._write_tree(base.prompts[:TREE_CANDIDATES], reward)
        return result

    def _write_tree(self, prompts: list[str], reward: str) -> None:
        """Rolls the trained model out once and writes the tree with its images and their scores of one reward."""
        config, trainer = self.config, self.trainer
        plan = self.sampler.plan(1.0, np.random.default_rng([config.seed, 2]))

        def roll_out() -> RolloutForest:
            return rollout(
                self.policy,
                prompts,
                plan,
                config.seed,
                trainer.iteration,
                reduction=config.log_prob_reduction,
                micro_batch=trainer.micro_batch.rows,
                progress=1.0,
            )

        def draw() -> plots.RolloutTree:
            images = self.policy.decode(forest.leaf_latents)
            scores = self.suite.score(images, forest.leaf_prompts, when="for the drawing of a tree")[reward]
            forest.rewards = torch.from_numpy(scores).to(forest.leaf_latents.device)
            deviations = groups.deviation(forest.by_group(forest.rewards))
            beta = self.objective.target_beta(trainer.iteration)
            at = DRAWN_BETA if beta is None else float(beta)
            target = self.objective.target_reward(forest)
            return plots.RolloutTree.of(forest, images, reward, at, int(deviations.argmax()), target)

        forest = self.processes.on_all_ranks(roll_out, calls_model=True)
        self.folder.write_tree(draw)

    def _result(self, base: Evaluation, final: Evaluation) -> Result:
        config, trainer, evaluation = self.config, self.trainer, self.config.evaluation
        metrics = metric_changes(base, final)
        sentences = [*alarms(metrics, list(self.suite.weights)), *trainer.changes]
        tolerance = engine.RATIO_TOLERANCE.get(self.policy.dtype, 1e-5)
        if trainer.ratio_deviation > tolerance:
            deviation = f"{trainer.ratio_deviation:.1e} (at most {tolerance:.0e} is rounding)"
            sentences.append(f"on the first update after a rollout the importance ratio deviated from 1 by {deviation}")
        return Result(
            run=RunInfo(
                id=self.folder.path.resolve().name,
                objective=config.objective.name,
                sampler=config.sampler.name,
                backbone=config.backbone.name,
                task=self.task.name,
                seed=config.seed,
                preset=config.preset,
                started=trainer.started,
                iterations=trainer.iteration,
                status=self.status,
            ),
            budget=trainer.budget.model_copy(
                update={"micro_batch": trainer.micro_batch.rows, "micro_batch_halvings": trainer.micro_batch.halvings}
            ),
            metrics=metrics,
            alarms=sentences,
            checks={"first_update_ratio_abs_dev_max": trainer.ratio_deviation},
            protocol=Protocol(
                prompts=len(base.prompts),
                images_per_prompt=evaluation.images_per_prompt,
                steps=evaluation.steps or self.policy.default_steps,
                guidance=self.policy.guidance,
                weights="ema" if trainer.updater.tensors.ema else "raw",
                noise_seed=evaluation.seed,
                evals=self.suite.describe(),
            ),
            environment=environment(str(self.policy.device), threads_of(config), self.processes.count),
            config=config.resolved(),
            task=trainer.fingerprint,
        )


def _with_remote_reward(task: Task, config: RunConfig) -> Task:
    """The task, rewarded by the scorer at `scorer_url` where the configuration names one."""
    if not config.scorer_url:
        return task
    token: dict[str, Any] = {"token_file": str(config.scorer_token_file)} if config.scorer_token_file else {}
    return task.rewarded_by(RewardChoice(eval="remote", settings={"url": config.scorer_url, **token}))


def _check_fit(objective: Objective, sampler: Sampler, plan: Plan) -> None:
    """Raises UserError where the objective trains on stochastic steps and the sampler's plan has none."""
    if objective.needs.training and objective.replays and not plan.stochastic_steps:
        raise UserError(
            f"objective {objective.name} trains on stochastic steps and the plan of sampler {sampler.name} has none; "
            "choose another sampler, or an objective that trains on final images"
        )


def _ineffective_choices(config: RunConfig, objective: Objective) -> list[str]:
    """A sentence for each setting of the objective that somebody chose and that cannot act in this run.

    A value counts as chosen if it is neither the default nor what the run's preset ships for these plug-ins.
    """
    reasons = objective.ineffective_settings(config.updates_per_rollout)
    if not reasons:
        return []
    names = {kind: getattr(config, kind).name for kind in PLUGINS}
    shipped = load_config(preset=config.preset, options=names).objective.settings
    fields = type(objective.settings).model_fields
    return [
        f"objective.{name} has no effect: {reason}"
        for name, reason in reasons.items()
        if getattr(objective.settings, name) not in (fields[name].default, shipped.get(name, fields[name].default))
    ]
