"""A run: judge the base model, train it with one (objective, sampler) pair, judge it again, write the record."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from alignbench import groups
from alignbench.backbone import PointDistribution, device_named
from alignbench.backbones.mixture import distributions
from alignbench.config.run_config import RunConfig
from alignbench.errors import DiskError, RunError, ScorerError, UserError
from alignbench.evaluation import curve
from alignbench.evaluation.evaluate import (
    PATHS,
    Evaluation,
    MetricSuite,
    alarms,
    check_scores_vary,
    evaluate,
    evaluation_prompts,
    metric_changes,
    path_kl,
    too_faint,
    validation_prompts,
    with_measured,
)
from alignbench.figures import plots
from alignbench.files.writing import exclusive, refuse_links, refuse_taken, write_atomically
from alignbench.files.yaml_files import to_yaml
from alignbench.load import load_configured_backbone, load_objective, load_sampler, threads_of
from alignbench.objective import Objective
from alignbench.records.record import CONFIG, Protocol, Result, RunInfo, environment, write_result
from alignbench.rollouts.executor import rollout
from alignbench.rollouts.forest import RolloutForest
from alignbench.runtime import launch
from alignbench.runtime.micro_batch import first_line
from alignbench.runtime.processes import Processes, join
from alignbench.tasks import RewardChoice, load_task
from alignbench.training import engine
from alignbench.training.checkpoint import has_checkpoint
from alignbench.training.pairs import check_pairs
from alignbench.training.progress import Console, Silent
from alignbench.training.tracking import Tracking, check_trackers
from alignbench.training.trainer import Trainer

SUBFOLDERS = ("checkpoints", "plots", "samples", "tensorboard", "wandb")
"""Folders that a run writes below its own."""
EVALUATION_ROWS = 64
"""Rows in one model call of an evaluation, where `micro_batch` does not say."""
TREE_CANDIDATES = 4
"""Prompts that are rolled out for the tree drawing; the one whose rewards differ most is drawn."""


def run(
    config: RunConfig,
    out: Path,
    *,
    console: Console | None = None,
    resume: bool = False,
    bases: dict[str, Evaluation] | None = None,
) -> Result:
    """Trains and evaluates one pair; everything lands in the folder `out`.

    Args:
        out: a new or empty folder; with `resume`, the folder of an interrupted run.
        bases: evaluations of base models, kept between runs: one that is judged alike is not judged again.

    Where a launcher started several processes, each calls this with the same arguments. They share the work; the first one
    writes the folder, and all return the record.

    Raises:
        UserError: the configuration is wrong or the folder is taken, also by another process; nothing has been written.
        RunError: the run failed; what was measured until then is in the folder.
        KeyboardInterrupt: after a checkpoint has been written.
    """
    processes = join(device_named(config.device), sharded=config.sharded or launch.asks_for_sharding())
    out = Path(processes.all_gather_object(str(out))[0])
    if not resume:
        processes.on_all_ranks(lambda: _refuse_taken(out))
    shown = console if console and processes.is_rank_zero else Silent()
    try:
        made = processes.on_all_ranks(lambda: _PairRun(config, out, shown, {} if bases is None else bases, processes))
        if processes.sharded:
            made.policy.shard()
        processes.on_all_ranks(made.prepare)
        return made.run(resume)
    except (ScorerError, DiskError) as error:
        if not (out / CONFIG).is_file():
            raise
        raise type(error)(f"{error}; once it works, go on with: alignbench run --resume {out}") from error
    except torch.OutOfMemoryError as error:
        raise RunError(f"out of memory: {first_line(error)}") from error


def _chosen_clip(objective: Objective) -> bool:
    """Whether the objective has a clip range, and another one than its default: a choice that is expected to act."""
    clip = type(objective.settings).model_fields.get("clip")
    return clip is not None and objective.settings.clip != clip.default


def _refuse_taken(out: Path) -> None:
    refuse_taken(out, f"choose another --out, or continue it with --resume {out}")


class _PairRun:
    def __init__(
        self, config: RunConfig, out: Path, console: Console, bases: dict[str, Evaluation], processes: Processes
    ) -> None:
        self.config = config = config.anchored()
        self.out, self.console, self.bases, self.processes = out, console, bases, processes
        self.checkpoints = out / "checkpoints"
        self.task = load_task(config.task)
        fingerprint = self.task.fingerprint()
        if config.scorer_url:
            token = {"token_file": str(config.scorer_token_file)} if config.scorer_token_file else {}
            service = RewardChoice(eval="remote", settings={"url": config.scorer_url, **token})
            self.task = self.task.rewarded_by(service)
        self.fingerprint = fingerprint
        self.objective = objective = load_objective(config.objective.name, **config.objective.settings)
        self.sampler = load_sampler(config.sampler.name, **config.sampler.settings)
        plan = self.sampler.plan(0.0, np.random.default_rng(0))  # an impossible plan is refused before anything is loaded
        if objective.needs.training and objective.replays and not plan.stochastic_steps:
            raise UserError(
                f"objective {objective.name} trains on stochastic steps and the plan of sampler {self.sampler.name} has none; "
                "choose another sampler, or an objective that trains on pictures (dpo, raft, nft)"
            )
        self.judged = evaluation_prompts(self.task, config.evaluation)  # likewise
        self.validated = validation_prompts(self.task, config.evaluation) if config.evaluation.every else []
        check_trackers(config.trackers)
        console.status("loading models")
        self.judges = MetricSuite(self.task, config.scorer_timeout)
        self.judges.require()
        self.policy = load_configured_backbone(config)
        self.judges.prepare()
        self.judges.check_prompts(
            [*self.judged, *self.validated], self.task.train_prompts if objective.needs.training and not config.pairs else ()
        )
        self.distributions: list[pd.DataFrame] = []
        self.curve: pd.DataFrame | None = None
        self.status = "complete"

    def prepare(self) -> None:
        """What comes once weights are where they will be."""
        config, prompts = self.config, self.task.train_prompts
        made = (self.policy, self.objective, self.sampler, self.judges)
        self.trainer = Trainer(config, prompts, *made, self.processes, self.fingerprint)
        if self.trainer.pairs:
            self.console.status(f"checking the images of {len(self.trainer.pairs)} pairs")
            check_pairs(self.processes.share(self.trainer.pairs), self.policy.check_image)
        self.policy.prepare([*([pair.prompt for pair in self.trainer.pairs] or prompts), *self.judged, *self.validated])

    def run(self, resume: bool) -> Result:
        with ExitStack() as stack:

            def take() -> None:
                stack.enter_context(exclusive(self.out))
                if not resume:
                    _refuse_taken(self.out)  # while the models were loaded another process may have come and gone
                refuse_links(self.out, *SUBFOLDERS)

            self.processes.on_rank_zero(take)
            return self._run(resume)

    def _run(self, resume: bool) -> Result:
        config, trainer = self.config, self.trainer
        trainer.check_together()
        if resume and has_checkpoint(self.checkpoints):
            for damage in trainer.restore(self.checkpoints):
                self.console.warn(f"{damage}; going on from iteration {trainer.iteration}")
            for change in trainer.changes:
                self.console.warn(change)
            self.curve = curve.up_to(curve.read_curve(self.out), trainer.iteration)
            kept = distributions.read_distributions(self.out)
            self.distributions = [] if kept is None else [kept[kept["iteration"] <= trainer.iteration]]
        self._write(CONFIG, to_yaml(config.resolved()))
        self.console.begin(config, self.policy, self.sampler.plan(0.0, np.random.default_rng(0)), threads_of(config))
        if config.updates_per_rollout == 1 and _chosen_clip(trainer.objective):
            self.console.warn("objective.clip has no effect: with updates_per_rollout=1 every importance ratio is 1")
        base = self._base()
        check_scores_vary(self.judges, base)
        for sentence in too_faint(self.judges, base):
            self.console.warn(sentence)
        self._write_evaluations(base=base)
        self._keep_distribution(self.policy.target_distribution(base.prompts[0]), distributions.TARGET)
        self._keep_distribution(base.distribution, 0)
        with self._tracking() as tracking:
            self._validate()
            self._train(tracking)
            with trainer.averaged_weights():
                final = self._final() if trainer.iteration else base
                self._write_evaluations(base=base, final=final)
                self._keep_distribution(final.distribution, trainer.iteration)
                result = self._result(base, final)
                if config.save_images and self.policy.decodes_to_images:
                    self._write_pictures(base, final)
            tracking.log_result(result)
        self.processes.on_rank_zero(lambda: write_result(result, self.out))
        if config.save_images:
            self.processes.on_rank_zero(lambda: plots.plot_run(self.out, self.console.warn))
        self.console.end(result, self.out)
        return result

    def _train(self, tracking: Tracking) -> None:
        """To the last iteration or the end of the budget; whatever ends it, what was measured is in the folder."""
        config, trainer = self.config, self.trainer
        try:
            if trainer.objective.needs.training:
                with self.console.training(config.iterations, trainer.progress()) as report:
                    while trainer.progress() < 1:
                        began = trainer.progress()
                        row = trainer.iterate()
                        if int(began * (config.snapshots + 1)) < int(trainer.progress() * (config.snapshots + 1)):
                            self._snapshot(row)
                        self._validate()
                        tracking.log(row)
                        report(row, trainer.progress())
                        if trainer.iteration % config.checkpoint_every == 0 and trainer.progress() < 1:
                            trainer.save(self.checkpoints)
                            self._write_metrics()
                if config.iterations is None or trainer.iteration < config.iterations:
                    self.status = "budget spent"
            trainer.save(self.checkpoints)
        except BaseException as error:
            if self.processes.raised_on_all_ranks(error):
                try:
                    if not trainer.weights_partially_updated and trainer.saved != trainer.iteration:
                        trainer.save(self.checkpoints)
                finally:
                    self._write_metrics()
            raise
        self._write_metrics()

    def _base(self) -> Evaluation:
        """The base model's evaluation. It depends on nothing but what the key is made of."""
        key = self._base_key()
        if key not in self.bases:
            with self.policy.reference():
                found = self._evaluate("base model")
            self.bases[key] = with_measured(found, "path_kl", np.zeros(len(found.prompts)))
        return self.bases[key]

    def _base_key(self) -> str:
        parts = {"backbone", "task", "scorer_url", "guidance", "evaluation", "threads", "device"}
        return json.dumps(self.config.model_dump(mode="json", include=parts), sort_keys=True)

    def _final(self) -> Evaluation:
        evaluation = self._evaluate("trained model")
        return with_measured(evaluation, "path_kl", self._path_kl(evaluation.prompts, PATHS))

    def _path_kl(self, prompts: Sequence[str], paths: int) -> np.ndarray:
        began = time.perf_counter()

        def measure(micro_batch: int | None) -> np.ndarray:
            rows, seed = micro_batch or EVALUATION_ROWS, self.config.evaluation.seed
            return path_kl(self.policy, prompts, seed, paths=paths, micro_batch=rows, processes=self.processes)

        distance = self.trainer.micro_batch.fit(measure, lambda: EVALUATION_ROWS)
        self.trainer.budget.seconds_evaluation += time.perf_counter() - began
        return distance

    def _validate(self) -> None:
        """Evaluates the policy on the validation prompts where the curve wants it and has not got it yet."""
        trainer, config = self.trainer, self.config.evaluation
        if config.every is None or not self.validated or not trainer.objective.needs.training:
            return
        is_due = trainer.iteration % config.every == 0 or trainer.progress() == 1
        if not is_due or (self.curve is not None and (self.curve["iteration"] == trainer.iteration).any()):
            return
        key = json.dumps(["validation", self._base_key()])
        if trainer.iteration == 0 and key in self.bases:
            evaluation = self.bases[key]
        else:
            started = self.policy.reference() if trainer.iteration == 0 else trainer.averaged_weights()
            with started:
                evaluation = self._evaluate("policy on the validation prompts", self.validated, config.validation_images)
                distance = self._path_kl(self.validated, curve.PATHS) if trainer.iteration else np.zeros(len(self.validated))
            evaluation = with_measured(evaluation, "path_kl", distance)
            if trainer.iteration == 0:
                self.bases[key] = evaluation
        spent = trainer.budget
        model_rows = spent.model_rows_rollout + spent.model_rows_train
        self.curve = curve.added(self.curve, curve.curve_rows(evaluation, trainer.iteration, model_rows, spent.seconds))
        table = self.curve
        self._put(curve.FILE, lambda p: table.to_parquet(p, index=False))

    def _snapshot(self, row: dict[str, Any]) -> None:
        """Adds to an iteration's row what the backbone knows of itself, and keeps its distribution."""
        if self.trainer.progress() == 1:
            return  # the judged model comes
        began = time.perf_counter()
        with self.trainer.averaged_weights():
            row |= {f"measured_{name}": float(m.values.mean()) for name, m in self.policy.measure(self.judged).items()}
            self._keep_distribution(self.policy.distribution(self.judged[0]), self.trainer.iteration)
        self.trainer.budget.seconds_evaluation += time.perf_counter() - began

    def _keep_distribution(self, distribution: PointDistribution | None, iteration: int) -> None:
        if distribution is not None:
            self.distributions = [kept[kept["iteration"] != iteration] for kept in self.distributions] + [
                distributions.as_rows(distribution, iteration)
            ]
            table = pd.concat(self.distributions).sort_values("iteration", kind="stable", ignore_index=True)
            self._put(distributions.FILE, lambda p: table.to_parquet(p, index=False))

    def _evaluate(self, what: str, prompts: Sequence[str] | None = None, images: int | None = None) -> Evaluation:
        began = time.perf_counter()
        with self.console.activity(what) as advance:

            def judged(micro_batch: int | None) -> Evaluation:
                return evaluate(
                    self.policy,
                    self.task,
                    self.judges,
                    self.config.evaluation,
                    prompts=prompts,
                    images_per_prompt=images,
                    micro_batch=micro_batch or EVALUATION_ROWS,
                    advance=advance,
                    processes=self.processes,
                )

            found = self.trainer.micro_batch.fit(judged, lambda: EVALUATION_ROWS)
        self.trainer.budget.seconds_evaluation += time.perf_counter() - began
        return found

    # ------------------------------------------------------------------------------------------------ files

    def _tracking(self) -> Tracking:
        config = self.config if self.processes.is_rank_zero else self.config.model_copy(update={"trackers": ()})
        return Tracking(config, self.out, self.trainer.iteration)

    def _put(self, name: str, write: Callable[[Path], Any]) -> None:
        """One file of the run's folder, by the first process."""
        self.processes.on_rank_zero(lambda: write_atomically(self.out / name, write))

    def _write(self, name: str, text: str) -> None:
        self._put(name, lambda p: p.write_text(text, encoding="utf-8"))

    def _write_metrics(self) -> None:
        if self.trainer.metrics:
            table = pd.DataFrame(self.trainer.metrics)
            self._put("metrics.parquet", lambda p: table.to_parquet(p, index=False))

    def _write_evaluations(self, **phases: Evaluation) -> None:
        table = pd.concat([found.table.assign(phase=phase) for phase, found in phases.items()], ignore_index=True)
        self._put("evals.parquet", lambda p: table.to_parquet(p, index=False))

    def _write_pictures(self, base: Evaluation, final: Evaluation) -> None:
        n = self.config.evaluation.images_per_prompt
        reward = next(iter(self.judges.rewards))

        def sheets() -> None:
            write_atomically(self.out / "samples" / "base.png", _saver(plots.grid(base.images, n)))
            write_atomically(self.out / "samples" / "final.png", _saver(plots.grid(final.images, n)))
            with plots.left_out("samples/before_after.png", self.console.warn):
                plots.write_figure(self.out / "samples" / "before_after.png", plots.before_after(base, final, reward, n))

        self.processes.on_rank_zero(sheets)
        self._write_tree(base.prompts[:TREE_CANDIDATES], reward)

    def _write_tree(self, prompts: list[str], reward: str) -> None:
        """One rollout of the trained model, with the pictures at its leaves."""
        config, trainer = self.config, self.trainer
        plan = self.sampler.plan(1.0, np.random.default_rng([config.seed, 2]))

        def draw() -> RolloutForest:
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

        def write() -> None:
            images = self.policy.decode(forest.leaf_latents)
            scores = self.judges.score(images, forest.leaf_prompts, when="for the drawing of a tree")[reward]
            forest.rewards = torch.from_numpy(scores).to(forest.leaf_latents.device)
            spread = groups.deviation(forest.by_group(forest.rewards))
            beta = getattr(trainer.objective, "beta", None)
            at = float(beta(trainer.iteration)) if callable(beta) else 2.0
            plots.RolloutTree.of(forest, images, reward, at, group=int(spread.argmax())).write(self.out / plots.TREE)

        forest = self.processes.on_all_ranks(draw, calls_model=True)
        self.processes.on_rank_zero(write)

    def _result(self, base: Evaluation, final: Evaluation) -> Result:
        config, trainer, e = self.config, self.trainer, self.config.evaluation
        metrics = metric_changes(base, final)
        found = alarms(metrics, list(self.judges.weights)) + trainer.changes
        tolerance = engine.RATIO_TOLERANCE.get(self.policy.dtype, 1e-5)
        if trainer.ratio_deviation > tolerance:
            off = f"{trainer.ratio_deviation:.1e} on a first update (at most {tolerance:.0e} is rounding)"
            found.append(f"the importance ratio was off 1 by {off}")
        return Result(
            run=RunInfo(
                id=self.out.resolve().name,
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
            alarms=found,
            checks={"first_update_ratio_abs_dev_max": trainer.ratio_deviation},
            protocol=Protocol(
                prompts=len(base.prompts),
                images_per_prompt=e.images_per_prompt,
                steps=e.steps or self.policy.default_steps,
                guidance=self.policy.guidance,
                weights="ema" if trainer.updater.tensors.ema else "raw",
                noise_seed=e.seed,
                evals=self.judges.describe(),
            ),
            environment=environment(str(self.policy.device), threads_of(config), self.processes.count),
            config=config.resolved(),
            task=trainer.fingerprint,
        )


def _saver(image: Image.Image) -> Callable[[Path], Any]:
    return lambda path: image.save(path)
