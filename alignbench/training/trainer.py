"""Trains one (objective, sampler) pair: one iteration at a time, with state that survives an interruption.

One iteration:

    prompts -> sampler.plan -> rollout -> decode -> scorer -> forest.rewards -> engine.backward -> optimizer step

`Collector` does everything up to the rewards, `Updater` everything after them.
"""

import copy
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignbench.backbone import Backbone, checksum, temporarily_set
from alignbench.config.run_config import RunConfig
from alignbench.errors import RunError
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.objective import Objective
from alignbench.records.environment import now
from alignbench.records.record import Budget
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.noise import seed_generators
from alignbench.runtime import launch
from alignbench.runtime.micro_batch import MicroBatch
from alignbench.runtime.processes import SINGLE_PROCESS, Processes, is_sharded
from alignbench.sampler import Sampler
from alignbench.training.checkpoint import Checkpoint, load_checkpoint, load_tensors, save_checkpoint
from alignbench.training.collector import Collector, next_items, reward_numbers, timed
from alignbench.training.pairs import fingerprint as pairs_fingerprint
from alignbench.training.pairs import pair_forest, read_pairs
from alignbench.training.updater import Updater


class Trainer:
    """Trains `policy` in place.

    Attributes:
        iteration: how many iterations are complete.
        budget: what they cost.
        metrics: one row of numbers for each of them.
        reference_since: how many iterations were complete when the reference was last refreshed.
        started: the time at which the training began, before any interruption.
        micro_batch: rows in one model call.
        saved: the iteration of the newest checkpoint, and what `best` was in it; None before there is one.
        changes: sentences about what differs from before an interruption.
        kept: iterations whose checkpoints a rule of the run may still need.
        best: the iteration with the best validation metric, where `best_by` names one.
        weights_from: the iteration to which a stop rule returned; None while the weights are those of `iteration`.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: list[str],
        policy: Backbone,
        objective: Objective,
        sampler: Sampler,
        suite: MetricSuite,
        processes: Processes = SINGLE_PROCESS,
        fingerprint: Mapping[str, str] | None = None,
    ) -> None:
        launch.check_share(config.prompts_per_iteration, processes.count)
        self.config, self.policy, self.processes = config, policy, processes
        self.objective, self.sampler = objective, sampler
        self.pairs = read_pairs(config.pairs) if config.pairs else []
        self.fingerprint = {**(fingerprint or {}), **({"pairs": pairs_fingerprint(self.pairs)} if self.pairs else {})}
        self.micro_batch = MicroBatch(config.micro_batch)
        self.collector = Collector(config, prompts, policy, sampler, suite, processes, self.micro_batch)
        self.updater = Updater(config, policy, objective, processes, self.micro_batch)
        self.reference_since = 0
        self.iteration = 0
        self.budget = Budget(seconds_by_phase=dict.fromkeys(("rollout", "decode", "score", "train"), 0.0))
        self.metrics: list[dict[str, Any]] = []
        self.started = now()
        self.changes: list[str] = []
        self.saved: tuple[int, int | None] | None = None
        self.kept: set[int] = set()
        self.best: int | None = None
        self.weights_from: int | None = None

    @property
    def reference(self) -> list[Tensor] | None:
        """The parameters of a reference that has been refreshed; None while it is the base model."""
        return self.updater.tensors.reference

    @property
    def ratio_deviation(self) -> float:
        """The largest |ratio - 1| of any first update after a rollout."""
        return self.updater.ratio_deviation

    @property
    def weights_partially_updated(self) -> bool:
        """Whether an iteration failed during its updates; checkpoints are refused until one is restored."""
        return self.updater.partially_updated

    @property
    def is_saved(self) -> bool:
        """Whether the newest checkpoint is of the present iteration."""
        return self.saved is not None and self.saved[0] == self.iteration

    def budget_share(self) -> float:
        """The share of the budget that is spent, by the limit that is nearest; 0 without a limit, 1 or more at the end."""
        limit, spent = self.config.budget, self.budget
        shares = [
            amount / most
            for amount, most in (
                (spent.model_rows_rollout + spent.model_rows_train, limit.model_rows),
                (spent.reward_calls, limit.reward_calls),
                (spent.seconds, limit.seconds),
            )
            if most is not None
        ]
        return max(shares, default=0.0)

    def progress(self) -> float:
        """The progress of the training from 0 to 1: the share of its iterations or of its budget, whichever is larger."""
        iterations = self.config.iterations
        by_iterations = 0.0 if iterations is None else self.iteration / iterations if iterations else 1.0
        return min(max(by_iterations, self.budget_share()), 1.0)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """While entered, the policy has its averaged weights, if the run keeps an average."""
        ema = self.updater.tensors.ema
        return nullcontext() if ema is None else ema.applied()

    @contextmanager
    def behaviour_weights(self) -> Iterator[None]:
        """While entered, the policy has the weights that draw the rollouts."""
        tensors, needs = self.updater.tensors, self.objective.needs
        from_reference = needs.rollouts_from_reference
        values = tensors.reference if from_reference else tensors.behaviour
        if needs.policy_draws_rollouts:
            context: AbstractContextManager[None] = nullcontext()
        elif values is not None:
            context = temporarily_set(list(self.policy.parameters()), values)
        else:
            context = self.policy.reference()
        with context:
            yield

    # ------------------------------------------------------------------------------------------------ one iteration

    def iterate(self, complete: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
        """Does one iteration; an interrupt takes effect before any weight has changed, or after the iteration is complete.

        A failure before the first update leaves everything as it was; a later one sets `weights_partially_updated`.

        Args:
            complete: what belongs to the iteration beyond its updates, called with its row; it may add numbers.

        Returns:
            The row of numbers that was added to `metrics`.
        """
        number, budget = self.iteration, self.budget.model_copy(deep=True)
        memories = copy.deepcopy((self.objective.state(), self.sampler.state()))
        deviation = self.updater.ratio_deviation
        began = time.perf_counter()
        seed_generators(self.config.seed, number)
        try:
            forest = self._load_pairs() if self.pairs else self._collect()
            with self.processes.deferred_interrupt():
                row = self._learn(forest, began)
                complete(row)
        except BaseException:
            if self.iteration == number:
                self.budget, self.updater.ratio_deviation = budget, deviation
                self.objective.load_state(memories[0])
                self.sampler.load_state(memories[1])
            raise
        return row

    def _load_pairs(self) -> RolloutForest:
        """The forest of the iteration's fixed pairs; nothing is rolled out or scored."""
        c = self.config
        chosen = next_items(self.pairs, c.prompts_per_iteration, c.seed, self.iteration)
        return self.processes.on_all_ranks(
            lambda: pair_forest(self.policy, chosen, c.seed, self.iteration, c.log_prob_reduction)
        )

    def _collect(self) -> RolloutForest:
        collector, serves = self.collector, self.updater.trains_on_rollout_rows
        return collector.collect(self.iteration, self.progress(), self.budget, self.behaviour_weights, serves)

    def _learn(self, forest: RolloutForest, began: float) -> dict[str, Any]:
        """Takes all updates of a rollout and completes the iteration; returns its row of numbers."""
        splits = ",".join(map(str, forest.plan.splits))
        row = {"iteration": self.iteration, "splits": splits, **reward_numbers(forest)}
        with timed(self.budget, "train"):
            self.objective.observe(forest)
            self.sampler.observe(forest)
            row |= self.updater.update(forest, self.progress, self.budget)
        if self.objective.needs.reference and self._reference_is_stale(row):
            self.updater.tensors.reference, self.reference_since = self.updater.policy_values(), self.iteration + 1
        # All ranks must see the same clock, since what is left of a budget in seconds decides on the next plan.
        seconds = self.processes.all_gather_object(time.perf_counter() - began)[0]
        peaks = self.processes.all_gather_object(_peak_memory(self.policy.device))
        self.budget.seconds += seconds
        self.budget.peak_memory_bytes = max(self.budget.peak_memory_bytes, *peaks)
        row |= {
            "seconds": seconds,
            "model_rows_rollout": self.budget.model_rows_rollout,
            "model_rows_train": self.budget.model_rows_train,
            "model_rows": self.budget.model_rows_rollout + self.budget.model_rows_train,
            "reward_calls": self.budget.reward_calls,
        }
        self.metrics.append(row)
        self.iteration += 1
        self.updater.partially_updated = False
        return row

    def _reference_is_stale(self, row: dict[str, Any]) -> bool:
        every, limit = self.config.reference_refresh, self.config.reference_refresh_kl
        return (every is not None and self.iteration + 1 - self.reference_since >= every) or (
            limit is not None and row.get("kl_reference", 0.0) > limit
        )

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self, folder: Path, *, replace: bool = False) -> None:
        """Writes a checkpoint, see `save_checkpoint`; an interrupt waits for its end.

        Args:
            replace: whether it replaces one of the same iteration; one that names another best checkpoint is always replaced.

        Raises:
            RunError: the ranks' weights are not the same.
        """
        config = self.config
        is_outdated = self.is_saved and self.saved != (self.iteration, self.best)
        self.check_together()
        checkpoint = Checkpoint(
            iteration=self.iteration,
            config=config.resolved(),
            task=self.fingerprint,
            changes=self.changes,
            budget=self.budget.model_dump(),
            metrics=self.metrics,
            objective=self.objective.state(),
            sampler=self.sampler.state(),
            ratio_deviation=self.ratio_deviation,
            started=self.started,
            reference_since=self.reference_since,
            micro_batch=self.micro_batch.rows,
            micro_batch_halvings=self.micro_batch.halvings,
            best=self.best,
            weights_from=self.weights_from,
            gradients=self.updater.gradients,
        )
        with self.processes.deferred_interrupt():
            save_checkpoint(
                folder,
                checkpoint,
                self.updater.tensors,
                keep=config.checkpoints_kept,
                best_window=None if config.best_by else config.best_window,
                also=self.kept | ({self.best} if self.best is not None else set()),
                replace=replace or is_outdated,
                processes=self.processes,
            )
            self.saved = self.iteration, self.best

    def return_to(self, folder: Path, iteration: int) -> None:
        """Takes the weights of an earlier checkpoint and saves them as the run's last; what was spent since stays counted."""
        if self.weights_from != iteration:
            with self.processes.deferred_interrupt():
                self.processes.on_all_ranks(lambda: load_tensors(folder, iteration, self.updater.tensors))
                self.weights_from = iteration
            self.save(folder, replace=True)

    def check_together(self) -> None:
        """Raises RunError where a rank has other weights than rank 0, or is at another iteration."""
        if self.processes.count == 1:
            return  # saves reading every weight
        state = [self.iteration, *(0 if is_sharded(p) else checksum(p) for p in self.updater.parameters)]
        first, *others = self.processes.all_gather_object(state)
        for rank, other in enumerate(others, 1):
            if other != first:
                raise RunError(f"process {rank} has other weights than process 0 at iteration {self.iteration}")

    def restore(self, folder: Path) -> list[str]:
        """Restores the newest undamaged checkpoint, see `load_checkpoint`; returns a sentence for each damaged one."""
        restored = self.processes.on_all_ranks(
            lambda: load_checkpoint(folder, self.config.resolved(), self.updater.tensors, self.fingerprint)
        )
        checkpoint = restored.checkpoint
        self.reference_since = checkpoint.reference_since
        self.sampler.load_state(checkpoint.sampler)
        self.iteration, self.metrics = checkpoint.iteration, checkpoint.metrics
        self.budget, self.changes = Budget.model_validate(checkpoint.budget), checkpoint.changes
        self.updater.ratio_deviation, self.started = checkpoint.ratio_deviation, checkpoint.started
        if checkpoint.config.get("micro_batch") == self.config.micro_batch:
            self.micro_batch.rows = checkpoint.micro_batch
        self.micro_batch.halvings = checkpoint.micro_batch_halvings
        self.best, self.weights_from = checkpoint.best, checkpoint.weights_from
        self.updater.gradients = checkpoint.gradients
        self.saved, self.updater.partially_updated = (checkpoint.iteration, checkpoint.best), False
        self.check_together()
        return restored.passed_over


def _peak_memory(device: torch.device) -> int:
    """The peak in bytes: of the device's allocator on CUDA, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
