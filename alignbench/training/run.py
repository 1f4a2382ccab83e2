"""A run: evaluates the base model, trains it with one (objective, sampler) pair, evaluates it again and writes the record."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from alignbench.backbone import Backbone, KnownDistributions, device_named
from alignbench.config.run_config import PLUGINS, RunConfig, load_config
from alignbench.errors import DiskError, NonFiniteError, RunError, ScorerError, UserError, first_line
from alignbench.evaluation import curve
from alignbench.evaluation.alarm import alarms, mode_alarms
from alignbench.evaluation.evaluate import (
    Evaluation,
    MetricSuite,
    check_scores_vary,
    joined_phases,
    metric_changes,
    too_faint,
)
from alignbench.evaluation.onset import onsets
from alignbench.figures.rollout_tree import NOTHING, RolloutTree, predictions
from alignbench.load import (
    every_setting,
    load_configured_backbone,
    load_configured_objective,
    load_configured_sampler,
    threads_of,
)
from alignbench.objective import Objective
from alignbench.records.environment import environment, git_revision
from alignbench.records.record import (
    CONFIG,
    GradientRecord,
    MetricRecord,
    OnsetRecord,
    Protocol,
    Result,
    RunInfo,
    StopRecord,
)
from alignbench.rollouts.builder import planned_forest
from alignbench.rollouts.executor import rollout
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.plan import Plan
from alignbench.runtime import launch
from alignbench.runtime.processes import Processes, join
from alignbench.sampler import Sampler
from alignbench.tasks import Task, configured_task, with_remote_reward
from alignbench.training import dead_terms, engine
from alignbench.training.checkpoint import has_checkpoint
from alignbench.training.length import StopRules, check_extension
from alignbench.training.pairs import check_pairs
from alignbench.training.progress import Console, Silent
from alignbench.training.run_evaluation import PromptSets, RunEvaluator
from alignbench.training.run_folder import RunFolder, check_free
from alignbench.training.tracking import Tracking, check_trackers
from alignbench.training.trainer import Trainer

TREE_CANDIDATES = 4
"""Prompts for the drawing of a tree: the one whose images by the base model differ most in reward is drawn, so that the runs of
a comparison draw the same."""


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
        resume: continue from the newest checkpoint in `out`. With more iterations than the run had, it is extended if its
            schedules allow; its former record stays in the folder as `result_at_N_iterations.json`.
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
        self.config = config = every_setting(config.anchored())
        self.console, self.processes = console, processes
        git_revision()  # before somebody commits while the run goes on
        self.folder = RunFolder(out, processes, console.warn)
        task = configured_task(config)
        self.fingerprint = task.fingerprint()
        self.task = with_remote_reward(task, config)
        self.objective = load_configured_objective(config)
        self.sampler = load_configured_sampler(config)
        self.plan = self.sampler.plan(0.0, np.random.default_rng(0))
        _check_fit(self.objective, self.sampler, self.plan)
        _check_keepers(config, self.objective)
        self.prompts = PromptSets(self.task, config)
        _check_validation(config, self.objective, self.task, self.prompts)
        self.stop: StopRecord | None = None
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
        data_prompts = trainer.updater.data.prompts if trainer.updater.data else []
        self.policy.prepare([*training_prompts, *self.prompts.evaluation, *self.prompts.validation, *data_prompts])

    def run(self, resume: bool) -> Result:
        """The whole run, in a folder that this process has claimed; returns its record."""
        trainer, folder = self.trainer, self.folder
        trainer.check_together()
        if resume and has_checkpoint(folder.checkpoints):
            self._restore()
        folder.write_config(self.config)
        self.console.begin(self.config, self.policy, self.sampler.plan(0.0, np.random.default_rng(0)), threads_of(self.config))
        for sentence in self._ineffective():
            self.console.warn(sentence)
        base = self.evaluator.base(trainer.budget)
        check_scores_vary(self.suite, base)
        self.rules = self._rules({**base.directions, curve.PATH_KL: None})
        for sentence in too_faint(self.suite, base):
            self.console.warn(sentence)
        folder.write_evaluations(base=base)
        if isinstance(self.policy, KnownDistributions):
            folder.add_target_distribution(self.policy.target_distribution(base.prompts[0]))
        folder.add_distribution(base.distribution, 0)
        with self._tracking() as tracking, self._explained_divergence():
            if trainer.iteration == 0:
                self._log_images(tracking, "base", base, self.config.evaluation.images_per_prompt)
            self._read_rules()
            self._evaluate_along_training(tracking)
            self._train(tracking)
            with trainer.averaged_weights():
                result = self._finish(base, tracking)
            tracking.log_result(result)
        folder.write_result(result)
        if self.config.save_images:
            folder.draw_plots()
        self.console.end(result, folder.path)
        return result

    @contextmanager
    def _explained_divergence(self) -> Iterator[None]:
        """Adds the likely cause to the error of a value that became infinite or NaN after updates."""
        try:
            yield
        except NonFiniteError as error:
            updates = self.trainer.budget.optimizer_steps
            if not updates or "optimizer.lr" in str(error):
                raise
            after = f"after {updates} optimizer step{'s' * (updates != 1)}"
            lr = f"optimizer.lr={self.config.optimizer.lr:g}"
            raise NonFiniteError(f"{error}; {after} with {lr} the training has probably diverged: lower it") from error

    def _ineffective(self) -> list[str]:
        """A sentence for each chosen setting and each part of the loss that cannot act in this run."""
        return [
            *_ineffective_choices(self.config, self.objective),
            *_without_effect(self.config, "backbone", self.policy, self.policy.ineffective_settings()),
            *_ineffective_parts(self.config, self.objective),
            *self.config.keepers.without_effect(),
        ]

    def _restore(self) -> None:
        trainer, folder = self.trainer, self.folder
        former = load_config(file=folder.path / CONFIG) if (folder.path / CONFIG).is_file() else self.config
        extended = former.iterations != self.config.iterations
        if extended:
            check_extension(former, self.config, self.objective, self.sampler, self.policy, str(folder.path))
        for damage in trainer.restore(folder.checkpoints):
            self.console.warn(f"{damage}; going on from iteration {trainer.iteration}")
        for change in trainer.changes:
            self.console.warn(change)
        folder.read_tables(trainer.iteration)
        if extended:
            folder.keep_record(trainer.iteration)
            folder.forget_end(trainer.iteration, self.config.evaluation.every)
            self.console.status(
                f"extending the run from {former.iterations} to {self.config.iterations} iterations; it ends as a run "
                f"of {self.config.iterations} iterations from the start"
            )

    def _train(self, tracking: Tracking) -> None:
        """Trains up to the last iteration or the end of the budget; whatever ends it, what was measured is in the folder."""
        trainer, folder = self.trainer, self.folder
        try:
            if self.objective.needs.training:
                self._iterate(tracking)
            if self.stop is not None and self.stop.restored:
                trainer.return_to(folder.checkpoints, self.stop.names)
            trainer.save(folder.checkpoints)
        except BaseException as error:
            if self.processes.raised_on_all_ranks(error):
                try:
                    if not (trainer.weights_partially_updated or trainer.is_saved):
                        trainer.save(folder.checkpoints)
                finally:
                    folder.write_metrics(trainer.metrics)
            raise
        folder.write_metrics(trainer.metrics)

    def _iterate(self, tracking: Tracking) -> None:
        config, trainer, folder = self.config, self.trainer, self.folder
        with self.console.training(config.iterations, trainer.progress()) as report:
            while trainer.progress() < 1 and self.stop is None:
                row = trainer.iterate(partial(self._complete, tracking, trainer.progress()))
                self._evaluate_along_training(tracking)
                self._warn_of_dead_terms()
                report(row, trainer.progress())
                if trainer.iteration % config.checkpoint_every == 0 and trainer.progress() < 1 and self.stop is None:
                    trainer.save(folder.checkpoints)
                    folder.write_metrics(trainer.metrics)
        if self.stop is not None:
            self.status = "stopped"
        elif config.iterations is None or trainer.iteration < config.iterations:
            self.status = "budget spent"
            self._warn_of_small_budget()

    def _complete(self, tracking: Tracking, progress_before: float, row: dict[str, Any]) -> None:
        """Adds the numbers of a snapshot to an iteration's row where one is due, and logs the row."""
        if self._is_snapshot_due(progress_before):
            row |= self._snapshot()
        tracking.log(row)

    def _warn_of_small_budget(self) -> None:
        """Tells of a limit that the first iteration alone exceeded, since every run makes one iteration."""
        limit, spent = self.config.budget.model_rows, self.trainer.budget
        rows = spent.model_rows_rollout + spent.model_rows_train
        if self.trainer.iteration == 1 and limit is not None and rows > limit:
            taken = f"took {rows:,} model evaluations"
            self.console.warn(f"budget.model_rows={limit} is too small for one iteration, which {taken}; the run ends after it")

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

    def _warn_of_dead_terms(self) -> None:
        """After the iterations in which the loss's parts are measured: a sentence for each that had no gradient."""
        trainer = self.trainer
        ended = trainer.progress() == 1 or self.stop is not None
        if trainer.iteration == dead_terms.ITERATIONS or (ended and trainer.iteration < dead_terms.ITERATIONS):
            found = dead_terms.unexplained(trainer.updater.gradients, self.objective, self.config.updates_per_rollout)
            for name, reason in found.items():
                self.console.warn(f"objective {self.config.objective.title}: {name}: {reason}")

    def _rules(self, directions: dict[str, bool | None]) -> StopRules | None:
        """The run's stop rules and `best_by`; None where it has neither, or does not train."""
        if not self.objective.needs.training or not (self.config.stop.is_on or self.config.best_by):
            return None
        return StopRules(self.config, directions)

    def _evaluate_along_training(self, tracking: Tracking) -> None:
        """Evaluates the policy on the validation prompts if that is due, and applies the rules that read the evaluations."""
        trainer, every = self.trainer, self.config.evaluation.every
        if every is None or not self.prompts.validation or not self.objective.needs.training:
            return
        if trainer.iteration % every == 0 or trainer.progress() == 1:
            self._add_to_curve(tracking)
            self._apply_rules()

    def _apply_rules(self) -> None:
        """Decides whether the training ends, and saves the checkpoint that a rule may need later."""
        self._read_rules()
        if self.rules is not None and self.rules.needs_checkpoints and (self.stop is None or not self.stop.restored):
            self.trainer.save(self.folder.checkpoints)

    def _read_rules(self) -> None:
        """Decides by the curve of rank 0 whether the training ends, and which checkpoints are still needed."""
        trainer, table, rules = self.trainer, self.folder.curve, self.rules
        if rules is None or table is None:
            return
        points = pd.DataFrame(self.processes.all_gather_object(curve.means(table).to_dict("list"))[0])
        self.stop = rules.broken(points)
        trainer.best = rules.best(points)
        trainer.kept = rules.may_return_to(points) if self.stop is None else {self.stop.names} if self.stop.restored else set()

    def _add_to_curve(self, tracking: Tracking) -> None:
        """Evaluates the policy on the validation prompts if the curve does not have this iteration."""
        trainer, table = self.trainer, self.folder.curve
        if table is not None and (table["iteration"] == trainer.iteration).any():
            return
        if trainer.iteration == 0:
            evaluation = self.evaluator.validation_base(trainer.budget)
        else:
            with trainer.averaged_weights():
                evaluation = self.evaluator.validation(trainer.budget)
        spent = trainer.budget
        model_rows = spent.model_rows_rollout + spent.model_rows_train
        self.folder.add_to_curve(evaluation, trainer.iteration, model_rows, spent.seconds)
        self._log_images(tracking, "validation", evaluation, self.config.evaluation.validation_images)

    def _log_images(self, tracking: Tracking, name: str, evaluation: Evaluation, images_per_prompt: int) -> None:
        """Logs example images of an evaluation, unless images are not saved or only encode points."""
        if self.config.save_images and not isinstance(self.policy, KnownDistributions):
            tracking.log_images(name, evaluation.images, images_per_prompt, self.trainer.iteration)

    def _tracking(self) -> Tracking:
        config = self.config if self.processes.is_rank_zero else self.config.model_copy(update={"trackers": ()})
        return Tracking(config, self.folder.path, self.trainer.iteration)

    def _finish(self, base: Evaluation, tracking: Tracking) -> Result:
        """Evaluates the trained model and writes the tables and images of it; returns the record."""
        config, trainer, folder = self.config, self.trainer, self.folder
        is_base = not trainer.iteration and self.evaluator.drawing.is_plain
        final = base if is_base else self.evaluator.final(trainer.budget)
        folder.write_evaluations(base=base, final=final)
        if trainer.iteration:  # else it would replace the base model's
            folder.add_distribution(final.distribution, trainer.iteration)
        self._log_images(tracking, "trained", final, config.evaluation.images_per_prompt)
        result = self._result(base, final)
        if config.save_images and not isinstance(self.policy, KnownDistributions):
            reward = next(iter(self.suite.rewards))
            folder.write_samples(base, final, reward, config.evaluation.images_per_prompt)
            self._write_tree(_tree_prompt(base, reward), reward)
        return result

    def _write_tree(self, prompt: str, reward: str) -> None:
        """Rolls the trained model out once and writes the tree with its images and their scores of one reward."""
        config, trainer = self.config, self.trainer
        plan = self.sampler.plan(1.0, np.random.default_rng([config.seed, 2]))
        if plan.sides:
            return  # the drawing has one line of steps

        def roll_out() -> RolloutForest:
            return rollout(
                self.policy,
                [prompt],
                plan,
                config.seed,
                trainer.iteration,
                reduction=config.log_prob_reduction,
                micro_batch=trainer.micro_batch.rows,
                progress=1.0,
            )

        def draw() -> RolloutTree:
            images = self.policy.decode(forest.leaf_latents)
            scores = self.suite.score(images, forest.leaf_prompts, when="for the drawing of a tree")[reward]
            forest.rewards = torch.from_numpy(scores).to(forest.leaf_latents.device)
            beta = self.objective.target_beta(trainer.iteration)
            at = float("nan") if beta is None else float(beta)
            at_splits = predictions(forest)
            predicted = self.policy.decode(at_splits) if len(at_splits) else NOTHING
            target = self.objective.target_reward(forest)
            return RolloutTree.of(forest, images, reward, at, target_reward=target, predicted=predicted)

        forest = self.processes.on_all_ranks(roll_out, calls_model=True)
        self.folder.write_tree(draw)

    def _gradient(self) -> GradientRecord | None:
        if not self.objective.needs.training:
            return None
        return dead_terms.gradient_record(self.trainer.updater.gradients, self.objective, self.config.updates_per_rollout)

    def _onsets(self, metrics: Mapping[str, MetricRecord]) -> list[OnsetRecord]:
        """Where independent metrics turned along the training; nothing without evaluations along it."""
        table = self.folder.curve
        if table is None:
            return []
        return onsets(table, list(self.suite.weights), {n: m.higher_is_better for n, m in metrics.items() if m.role == "judge"})

    def _result(self, base: Evaluation, final: Evaluation) -> Result:
        config, trainer, evaluation = self.config, self.trainer, self.config.evaluation
        metrics = metric_changes(base, final)
        sentences = [
            *alarms(metrics, list(self.suite.weights)),
            *mode_alarms(joined_phases(base=base, final=final)),
            *trainer.changes,
        ]
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
                solver=evaluation.solver,
                evals=self.suite.describe(),
            ),
            environment=environment(str(self.policy.device), threads_of(config), self.processes.count),
            config=config.resolved(),
            inference=self.evaluator.inference_record(base, final),
            stop=self.stop,
            onsets=self._onsets(metrics),
            gradient=self._gradient(),
            task=trainer.fingerprint,
        )


def _tree_prompt(base: Evaluation, reward: str) -> str:
    """The prompt, of the first ones, whose images by the base model differ most in reward."""
    scores = base.table[(base.table["metric"] == reward) & (base.table["prompt_index"] < TREE_CANDIDATES)]
    deviations = scores.groupby("prompt_index")["value"].std(ddof=0).fillna(0.0)
    return base.prompts[int(str(deviations.idxmax())) if len(deviations) else 0]


def _check_validation(config: RunConfig, objective: Objective, task: Task, prompts: PromptSets) -> None:
    """Raises UserError where rules read evaluations on validation prompts and the task has none."""
    rules = {"stop": config.stop.is_on, "best_by": config.best_by is not None}
    reading = [name for name, is_on in rules.items() if is_on]
    if reading and objective.needs.training and not prompts.validation:
        raise UserError(
            f"{' and '.join(reading)} needs evaluations along the training, and task {task.name!r} has no validation prompts; "
            "add validation_prompts to the task"
        )


def _check_fit(objective: Objective, sampler: Sampler, plan: Plan) -> None:
    """Raises UserError where the objective cannot train on the steps of the sampler's plan."""
    if not (objective.needs.training and objective.replays):
        return
    if not plan.stochastic_steps:
        raise UserError(
            f"objective {objective.name} trains on stochastic steps and the plan of sampler {sampler.name} has none; "
            "choose another sampler, an objective that trains on final images, or likelihood=elbo"
        )
    objective.trained_leaves(planned_forest(plan, 1))


def _check_keepers(config: RunConfig, objective: Objective) -> None:
    """Raises UserError where a keeper of diversity has nothing to act on."""
    keepers = config.keepers
    if not (keepers.shape_rewards or keepers.data):
        return
    if not objective.needs.training:
        raise UserError(f"objective {objective.name} does not train, so keepers have no effect; leave them out")
    if keepers.shape_rewards and config.pairs:
        raise UserError("keepers of rewards have no effect on fixed pairs, which have no rewards; leave out pairs or keepers")


def _ineffective_choices(config: RunConfig, objective: Objective) -> list[str]:
    """A sentence for each setting of the objective that somebody chose and that cannot act in this run."""
    return _without_effect(config, "objective", objective, objective.ineffective_settings(config.updates_per_rollout))


def _without_effect(config: RunConfig, kind: str, plugin: Objective | Backbone, reasons: Mapping[str, str]) -> list[str]:
    """A sentence for each of a plug-in's settings that somebody chose although it cannot act.

    A value counts as chosen if it is neither the default nor what the run's preset ships for these plug-ins.

    Args:
        kind: objective or backbone.
        reasons: setting -> why it cannot act.
    """
    if not reasons:
        return []
    names = {each: getattr(config, each).name for each in PLUGINS}
    shipped = getattr(load_config(preset=config.preset, options=names), kind).settings
    fields = type(plugin.settings).model_fields
    return [
        f"{kind}.{name} has no effect: {reason}"
        for name, reason in reasons.items()
        if getattr(plugin.settings, name) not in (fields[name].default, shipped.get(name, fields[name].default))
    ]


def _ineffective_parts(config: RunConfig, objective: Objective) -> list[str]:
    """A sentence for each model or part of the loss that cannot act in this run, whoever chose the settings."""
    parts = objective.ineffective_parts(config.updates_per_rollout)
    sentences = [f"objective {config.objective.title}: the {name} has no effect: {reason}" for name, reason in parts.items()]
    if config.likelihood == "elbo" and not objective.on_paths:
        title = config.objective.title
        sentences.append(f"likelihood=elbo has no effect on objective {title}, which asks for no log-probabilities of paths")
    return sentences
