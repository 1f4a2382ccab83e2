"""The training of one (objective, sampler) pair: the body of the loop, and the state that survives an interruption.

One iteration:

    prompts -> sampler.plan -> rollout -> decode -> scorer -> forest.rewards -> engine.backward -> optimizer step
"""

import copy
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from alignbench import groups
from alignbench.backbone import Backbone, temporarily_set
from alignbench.config.run_config import RunConfig
from alignbench.errors import NonFiniteError, RunError, ScorerError
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.objective import Objective
from alignbench.records.environment import now
from alignbench.records.record import Budget
from alignbench.rollouts.executor import decode, rollout
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.noise import Key, group_keys, seed_generators, seed_of
from alignbench.rollouts.plan import Plan
from alignbench.rollouts.terms import log_ratio
from alignbench.runtime import launch
from alignbench.runtime.micro_batch import MicroBatch
from alignbench.runtime.processes import SINGLE_PROCESS, Processes, full_tensor, is_sharded
from alignbench.sampler import Sampler
from alignbench.training import engine
from alignbench.training.checkpoint import EMA, Checkpoint, load_checkpoint, save_checkpoint
from alignbench.training.pairs import Pair, pair_forest, read_pairs
from alignbench.training.pairs import fingerprint as pairs_fingerprint

Item = TypeVar("Item", str, Pair)
Answers = dict[str, np.ndarray]
"""Reward -> what it answers for each picture, float64 [N]."""


class Trainer:
    """Trains `policy` in place.

    Attributes:
        iteration: how many iterations are done.
        budget: what they spent.
        metrics: one row of numbers for each of them.
        reference: the parameters of a reference that has been refreshed; None while it is the base model.
        reference_since: how many iterations were done when it was.
        behaviour: those of an behaviour policy that lags, for an objective that wants one.
        ratio_deviation: the largest |ratio - 1| that any first update after a rollout has seen.
        started: when the training began, across interruptions.
        micro_batch: rows in one model call.
        saved: the iteration of the newest checkpoint; None before there is one.
        torn: an iteration failed after it had changed weights; there is nothing to save until a checkpoint is restored.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: list[str],
        policy: Backbone,
        objective: Objective,
        sampler: Sampler,
        judges: MetricSuite,
        processes: Processes = SINGLE_PROCESS,
        fingerprint: Mapping[str, str] | None = None,
    ) -> None:
        launch.check_share(config.prompts_per_iteration, processes.count)
        self.config, self.prompts, self.policy, self.processes = config, prompts, policy, processes
        self.objective, self.sampler, self.judges = objective, sampler, judges
        self.pairs = read_pairs(config.pairs) if config.pairs else []
        self.fingerprint = {**(fingerprint or {}), **({"pairs": pairs_fingerprint(self.pairs)} if self.pairs else {})}
        objective.prepare(policy.latent_shape, policy.device)
        self.parameters = [*policy.parameters(), *objective.parameters()]
        o = config.optimizer
        # AdamW takes no list in which some tensors are spread over processes and some are not.
        alike = [[p for p in self.parameters if is_sharded(p) == spread] for spread in (True, False)]
        groups_of = [{"params": parameters} for parameters in alike if parameters]
        self.optimizer = torch.optim.AdamW(groups_of, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        self.ema = EMA(list(policy.parameters()), config.ema.decay, config.ema.every) if config.ema else None
        self.reference: list[Tensor] | None = None
        self.reference_since = 0
        self.behaviour = self._parameters_now() if objective.needs.behaviour_is_ema else None
        self.iteration = 0
        self.budget = Budget(seconds_by_phase=dict.fromkeys(("rollout", "decode", "score", "train"), 0.0))
        self.metrics: list[dict[str, Any]] = []
        self.ratio_deviation = 0.0
        self.started = now()
        self.micro_batch = MicroBatch(config.micro_batch)
        self.changes: list[str] = []
        self.saved: int | None = None
        self.weights_partially_updated = False

    def budget_share(self) -> float:
        """How much of the budget is spent, of whichever limit is nearest; 0 without one, and 1 or more at the end."""
        limit, spent = self.config.budget, self.budget
        shares = [
            spent_of / limit_of
            for spent_of, limit_of in (
                (spent.model_rows_rollout + spent.model_rows_train, limit.model_rows),
                (spent.reward_calls, limit.reward_calls),
                (spent.seconds, limit.seconds),
            )
            if limit_of is not None
        ]
        return max(shares, default=0.0)

    def progress(self) -> float:
        """0 at the start and 1 at the end of the run: the share of its iterations or of its budget, the larger one."""
        wanted = self.config.iterations
        of_iterations = 0.0 if wanted is None else self.iteration / wanted if wanted else 1.0
        return min(max(of_iterations, self.budget_share()), 1.0)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """While entered, the policy has its averaged weights, if the run keeps any."""
        if self.ema is None:
            yield
        else:
            with self.ema.applied():
                yield

    def iterate(self) -> dict[str, Any]:
        """One whole iteration, or none: an interrupt comes before any weight has changed, or after all is booked.

        What fails before that leaves everything as it was; what fails later leaves the trainer `torn`.

        Returns:
            The row of numbers that went to `metrics`.
        """
        number, budget = self.iteration, self.budget.model_copy(deep=True)
        memories = copy.deepcopy((self.objective.state(), self.sampler.state()))
        began = time.perf_counter()
        seed_generators(self.config.seed, number)
        try:
            forest = self._load_pairs() if self.pairs else self._collect_rollout()
            with self.processes.deferred_interrupt():
                row = self._learn(forest, began)
        except BaseException:
            if self.iteration == number:
                self.budget = budget
                self.objective.load_state(memories[0])
                self.sampler.load_state(memories[1])
            raise
        return row

    def _learn(self, forest: RolloutForest, began: float) -> dict[str, Any]:
        """All updates on a rollout, and what they were like; after it the iteration is done."""
        splits = ",".join(map(str, forest.plan.splits))
        row = {"iteration": self.iteration, "splits": splits, **_reward_numbers(forest)}
        with self._phase("train"):
            row |= self._updates(forest)
        if self.objective.needs.reference and self._reference_is_stale(row):
            self.reference, self.reference_since = self._parameters_now(), self.iteration + 1
        # All must see the same clock: what is left of a budget in seconds decides on the next plan.
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
        self.weights_partially_updated = False
        return row

    def _reference_is_stale(self, row: dict[str, Any]) -> bool:
        every, limit = self.config.reference_refresh, self.config.reference_refresh_kl
        return (every is not None and self.iteration + 1 - self.reference_since >= every) or (
            limit is not None and row.get("kl_reference", 0.0) > limit
        )

    def save(self, folder: Path) -> None:
        """Writes a checkpoint, which a request to end waits for; see `save_checkpoint`.

        Raises:
            RunError: the processes' weights are not the same.
        """
        config = self.config
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
        )
        with self.processes.deferred_interrupt():
            save_checkpoint(
                folder,
                checkpoint,
                self.policy.trainable(),
                self.optimizer,
                self.ema,
                self.objective,
                self.reference,
                self.behaviour,
                keep=config.checkpoints_kept,
                best_window=config.best_window,
                processes=self.processes,
            )
            self.saved = self.iteration

    def check_together(self) -> None:
        """Raises RunError where a process has come to other weights, or stands at another iteration, than the first."""
        if self.processes.count == 1:
            return  # a fingerprint reads every weight
        first, *others = self.processes.all_gather_object([self.iteration, *map(_fingerprint, self.parameters)])
        for rank, other in enumerate(others, 1):
            if other != first:
                raise RunError(f"process {rank} has other weights than process 0 at iteration {self.iteration}")

    def restore(self, folder: Path) -> list[str]:
        """Goes back to the newest checkpoint that is whole; returns a sentence for each damaged one. See `load_checkpoint`."""
        model = self.policy.trainable()
        found = self.processes.on_all_ranks(
            lambda: load_checkpoint(
                folder, self.config.resolved(), model, self.optimizer, self.ema, self.objective, self.fingerprint
            )
        )
        checkpoint, self.reference, self.behaviour = found.checkpoint, found.reference, found.behaviour
        self.reference_since = checkpoint.reference_since
        self.sampler.load_state(checkpoint.sampler)
        self.iteration, self.metrics = checkpoint.iteration, checkpoint.metrics
        self.budget, self.changes = Budget.model_validate(checkpoint.budget), checkpoint.changes
        self.ratio_deviation, self.started = checkpoint.ratio_deviation, checkpoint.started
        if checkpoint.config.get("micro_batch") == self.config.micro_batch:
            self.micro_batch.rows = checkpoint.micro_batch
        self.micro_batch.halvings = checkpoint.micro_batch_halvings
        self.saved, self.weights_partially_updated = checkpoint.iteration, False
        self.check_together()
        return found.passed_over

    # ------------------------------------------------------------------------------------------------ one iteration

    def _load_pairs(self) -> RolloutForest:
        """The next fixed pairs; nothing is rolled out or scored."""
        chosen = self._next(self.pairs)
        c = self.config
        return self.processes.on_all_ranks(
            lambda: pair_forest(self.policy, chosen, c.seed, self.iteration, c.log_prob_reduction)
        )

    def _collect_rollout(self) -> RolloutForest:
        forest, answers = self._rollout_and_score()

        def finish() -> None:
            self._reward(forest, answers)
            kept = self.sampler.trained_leaves(forest)
            if kept is not None:
                forest.train_only(kept)

        self.processes.on_all_ranks(finish)
        return forest

    def _rollout_and_score(self) -> tuple[RolloutForest, Answers]:
        """A rollout of the next prompts, and what each reward answers, float64 [G * K].

        With `overlap` parts, one part's pictures are scored while the next is rolled out. Each process has its share of the
        prompts; all get all of them back.
        """
        config, i, on_all_ranks = self.config, self.iteration, self.processes.on_all_ranks
        plan = self.sampler.plan(self.progress(), np.random.default_rng([config.seed, 1, i]))
        prompts = self._next(self.prompts)
        keys = group_keys(prompts)
        own = self.processes.share(range(len(prompts)))
        parts = np.array_split(own, min(config.overlap, len(own)))
        forests: list[RolloutForest] = []
        pending: list[Future[Answers]] = []
        for part in parts:
            with self._phase("rollout"):
                forest = self._rollout(plan, [prompts[g] for g in part], [keys[g] for g in part])
            with self._phase("decode"):
                images = self._decode(forest)
            score = partial(self.judges.score, images, forest.leaf_prompts, when=f"in iteration {i}")
            with self._phase("score"):
                if pending:
                    on_all_ranks(lambda: self._answer(pending[-1]))  # a scorer is asked one thing at a time
                pending.append(on_all_ranks(partial(_submit, score, beside=len(parts) > 1)))
            forests.append(forest)
        with self._phase("score"):
            answers = on_all_ranks(lambda: [self._answer(future) for future in pending])
        self.budget.model_rows_rollout += plan.model_rows(len(prompts))
        together = {name: np.concatenate([part[name] for part in answers]) for name in self.judges.rewards}
        return (
            RolloutForest.joined(forests).gathered(self.processes),
            {name: torch.cat(self.processes.all_gather(torch.from_numpy(answer))).numpy() for name, answer in together.items()},
        )

    def _answer(self, future: "Future[Answers]") -> Answers:
        limit = self.config.scorer_timeout
        try:
            return future.result(limit)
        except TimeoutError:
            raise ScorerError(
                f"the rewards took more than {limit:g} s in iteration {self.iteration}; if they only need longer, raise "
                "scorer_timeout"
            ) from None

    def _rollout(self, plan: Plan, prompts: list[str], keys: list[Key]) -> RolloutForest:
        def drawn(micro_batch: int | None) -> RolloutForest:
            return rollout(
                self.policy,
                prompts,
                plan,
                self.config.seed,
                self.iteration,
                reduction=self.config.log_prob_reduction,
                micro_batch=micro_batch,
                progress=self.progress(),
                keys=keys,
            )

        rows = len(prompts) * plan.branches_before(len(plan.steps) - 1)
        with self._behaviour():
            return self.micro_batch.fit(
                lambda limit: self.processes.on_all_ranks(partial(drawn, limit), calls_model=True), lambda: rows
            )

    def _behaviour(self) -> AbstractContextManager[None]:
        """While entered, the policy has the weights that draw the rollouts."""
        weights = self.reference if self.objective.needs.rollouts_from_reference else self.behaviour
        if weights is not None:
            return temporarily_set(list(self.policy.parameters()), weights)
        return self.policy.reference() if self.objective.needs.rollouts_from_reference else nullcontext()

    def _decode(self, forest: RolloutForest) -> np.ndarray:
        latents = forest.leaf_latents
        on_all_ranks = self.processes.on_all_ranks
        return self.micro_batch.fit(
            lambda rows: on_all_ranks(partial(decode, self.policy, latents, rows)), lambda: len(latents)
        )

    def _next(self, available: list[Item]) -> list[Item]:
        """The next ones of an endless series of shuffles; a pure function of the seed and the iteration."""
        count, size = self.config.prompts_per_iteration, len(available)
        first, end = self.iteration * count, (self.iteration + 1) * count
        seed = seed_of("prompts", self.config.seed)
        epochs = range(first // size, (end - 1) // size + 1)
        order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(size) for epoch in epochs])
        return [available[i] for i in order[first - epochs.start * size :][:count]]

    def _reward(self, forest: RolloutForest, answers: Answers) -> None:
        """Fills `forest.scores` with what each reward answers, and `forest.rewards` with their weighted sum."""
        scores = {name: forest.by_group(torch.from_numpy(answer)) for name, answer in answers.items()}
        weights, normalise = self.judges.weights, self.config.normalise_rewards
        total = groups.total(scores, weights, normalise=normalise)
        self.budget.decoded += len(forest.leaves)
        self.budget.reward_calls += len(forest.leaves) * len(scores)
        self.budget.failed_scores += int(sum(raw.isnan().sum() for raw in scores.values()))
        if bool(total.isnan().all()):
            raise ScorerError(f"no picture of iteration {forest.iteration} could be scored")
        forest.rewards = total.flatten().to(self.policy.device)
        forest.standardised = groups.standardises(weights, normalise=normalise)
        forest.scores = {name: raw.flatten().to(self.policy.device) for name, raw in scores.items()}

    def _updates(self, forest: RolloutForest) -> dict[str, float]:
        numbers: dict[str, float] = {}
        deviation = 0.0
        self.objective.observe(forest)
        self.sampler.observe(forest)
        behaviour = self.behaviour
        if behaviour is None and self.objective.needs.behaviour and self.config.updates_per_rollout > 1:
            behaviour = self._parameters_now()
        for update in range(self.config.updates_per_rollout):
            found = self._backward(forest, update, behaviour if update or self.behaviour else None)
            self.budget.model_rows_train += found.forward_rows
            self.budget.replay_rows += found.rows
            if "log_prob" in found.terms and len(found.terms["log_prob"]):
                deviation = float(torch.expm1(log_ratio(found.terms, forest)).abs().max())
                if update == 0:
                    self.ratio_deviation = max(self.ratio_deviation, deviation)
            numbers |= self._step() | {"loss": found.loss}
            if update == 0:
                numbers |= {"ratio_abs_dev_first": deviation, **self.objective.diagnostics(found.terms, forest)}
        if self.behaviour is not None:
            decay = self.objective.behaviour_ema_decay(self.budget.optimizer_steps)
            numbers["behaviour_ema_decay"] = decay
            with torch.no_grad():
                for before, now in zip(self.behaviour, self.policy.parameters(), strict=True):
                    before.lerp_(now, 1 - decay)
        updates = self.config.updates_per_rollout
        return numbers | {"ratio_abs_dev_max": deviation, "off_policy_share": (updates - 1) / updates}

    def _backward(self, forest: RolloutForest, update: int, behaviour: list[Tensor] | None) -> engine.Backward:
        def passed(micro_batch: int | None) -> engine.Backward:
            self.optimizer.zero_grad(set_to_none=True)
            return engine.backward(
                self.policy,
                self.objective,
                forest,
                update=update,
                micro_batch=micro_batch,
                behaviour=behaviour,
                reference=self.reference,
                processes=self.processes,
            )

        return self.micro_batch.fit(passed, lambda: len(self.objective.rows(forest, update)))

    def _step(self) -> dict[str, float]:
        o = self.config.optimizer
        factor = 0.1 + 0.45 * (1 + np.cos(np.pi * self.progress())) if o.schedule == "cosine" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = o.lr * float(factor)
        norm = _clip(self.parameters, o.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise NonFiniteError(f"the gradient is not finite in iteration {self.iteration} ({self.policy.dtype})")
        before = [p.detach().clone() for p in self.parameters]
        self.weights_partially_updated = True  # until the iteration is booked
        self.optimizer.step()
        self.budget.optimizer_steps += 1
        with torch.no_grad():
            squares = [full_tensor((p - b).square().sum()) for p, b in zip(self.parameters, before, strict=True)]
            moved = torch.stack(squares).sum().sqrt()
            finite = torch.stack([_all_finite(p) for p in self.parameters]).all()
        if not bool(finite):
            raise NonFiniteError(
                f"the weights are not finite after the update of iteration {self.iteration}; lower optimizer.lr. "
                "They were not saved: the last checkpoint is from before"
            )
        if self.ema:
            self.ema.update(self.budget.optimizer_steps)
        return {"grad_norm": float(norm), "policy_update_norm": float(moved), "lr": o.lr * float(factor)}

    def _parameters_now(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.policy.parameters()]

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.budget.seconds_by_phase[name] += time.perf_counter() - began


def _submit(work: Callable[[], Answers], *, beside: bool) -> "Future[Answers]":
    """Done at once, or in a thread; a thread costs arithmetic threads of its own beside the model's, and has no time limit."""
    future: Future[Answers] = Future()

    def go() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    if beside:
        threading.Thread(target=go, daemon=True).start()  # one that hangs must not keep the process from ending
    else:
        future.set_result(work())
    return future


def _reward_numbers(forest: RolloutForest) -> dict[str, float]:
    rewards = forest.by_group(forest.rewards)
    latents = forest.leaf_latents.reshape(forest.groups, forest.group_size, -1)
    return {
        **{f"reward_{name}": float(raw.nanmean()) for name, raw in forest.scores.items()},
        "reward": float(rewards.nanmean()),
        "reward_std_in_group": float(groups.deviation(rewards).mean()),
        "zero_std_ratio": float((~groups.has_distinct_rewards(rewards)).float().mean()),
        "failed_scores": int(rewards.isnan().sum()),
        "rollout_lgmd": float(torch.stack([groups.lgmd(z) for z in latents]).mean()),
    }


def _clip(parameters: list[nn.Parameter], most: float) -> Tensor:
    """Scales all gradients down to the norm `most`; returns the norm they had."""
    if not any(map(is_sharded, parameters)):
        return torch.nn.utils.clip_grad_norm_(parameters, most)
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([full_tensor(torch.linalg.vector_norm(g)) for g in gradients]).norm()
    for gradient in gradients:
        gradient.mul_(float((most / (norm + 1e-6)).clamp(max=1.0)))
    return norm


def _all_finite(parameter: Tensor) -> Tensor:
    """bool; of one that is spread, its sum tells: no process sees the others' part."""
    return torch.isfinite(full_tensor(parameter.sum()) if is_sharded(parameter) else parameter).all()


def _fingerprint(parameter: Tensor) -> int:
    """Differs where a bit does, the same in whichever order it is summed; of one that is spread there is one copy alone."""
    return 0 if is_sharded(parameter) else int(parameter.detach().float().view(torch.int32).sum())


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator on CUDA, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
