"""The training of one (objective, sampler) pair: the body of the loop, and the state that survives an interruption.

One iteration:

    prompts -> sampler.plan -> rollout -> decode -> scorer -> forest.rewards -> engine.backward -> optimizer step
"""

import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from alignbench import engine, groups
from alignbench.backbone import Backbone
from alignbench.checkpoint import EMA, Checkpoint, load_checkpoint, save_checkpoint
from alignbench.config import RunConfig
from alignbench.errors import NonFiniteError, RunError
from alignbench.evaluation import Judges
from alignbench.executor import rollout
from alignbench.forest import RolloutForest
from alignbench.noise import group_keys, seed_of
from alignbench.objective import Objective
from alignbench.pairs import Pair, pair_forest, read_pairs
from alignbench.record import Budget, now
from alignbench.sampler import Sampler

Item = TypeVar("Item", str, Pair)


class Trainer:
    """Trains `policy` in place.

    Attributes:
        iteration: how many iterations are done.
        budget: what they spent.
        metrics: one row of numbers for each of them.
        reference: the parameters of a reference that has been refreshed; None while it is the base model.
        ratio_deviation: the largest |ratio - 1| that any first update after a rollout has seen.
        started: when the training began, across interruptions.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: list[str],
        policy: Backbone,
        objective: Objective,
        sampler: Sampler,
        judges: Judges,
    ) -> None:
        self.config, self.prompts, self.policy = config, prompts, policy
        self.objective, self.sampler, self.judges = objective, sampler, judges
        self.pairs = read_pairs(config.pairs) if config.pairs else []
        objective.prepare(policy.latent_shape, policy.device)
        self.parameters = [*policy.parameters(), *objective.parameters()]
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(self.parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        self.ema = EMA(list(policy.parameters()), config.ema.decay, config.ema.every) if config.ema else None
        self.reference: list[Tensor] | None = None
        self.iteration = 0
        self.budget = Budget(seconds_by_phase=dict.fromkeys(("rollout", "decode", "score", "train"), 0.0))
        self.metrics: list[dict[str, Any]] = []
        self.ratio_deviation = 0.0
        self.started = now()

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

        Returns:
            The row of numbers that went to `metrics`.
        """
        budget = self.budget.model_copy(deep=True)
        began = time.perf_counter()
        try:
            forest = self._given() if self.pairs else self._rolled_out()
        except BaseException:
            self.budget = budget
            raise
        with deferred_interrupt():
            splits = ",".join(map(str, forest.plan.splits))
            row = {"iteration": self.iteration, "splits": splits, **_reward_numbers(forest)}
            with self._phase("train"):
                row |= self._updates(forest)
            seconds = time.perf_counter() - began
            self.budget.seconds += seconds
            self.budget.peak_memory_bytes = max(self.budget.peak_memory_bytes, _peak_memory(self.policy.device))
            row |= {
                "seconds": seconds,
                "model_rows_rollout": self.budget.model_rows_rollout,
                "model_rows_train": self.budget.model_rows_train,
                "model_rows": self.budget.model_rows_rollout + self.budget.model_rows_train,
                "reward_calls": self.budget.reward_calls,
            }
            self.metrics.append(row)
            self.iteration += 1
            if self.objective.needs.reference and self._reference_is_stale(row):
                self.reference = [p.detach().clone() for p in self.policy.parameters()]
        return row

    def _reference_is_stale(self, row: dict[str, Any]) -> bool:
        every, limit = self.config.reference_refresh, self.config.reference_refresh_kl
        return (every is not None and self.iteration % every == 0) or (
            limit is not None and row.get("kl_reference", 0.0) > limit
        )

    def save(self, folder: Path) -> None:
        """Writes a checkpoint; see `save_checkpoint`."""
        checkpoint = Checkpoint(
            iteration=self.iteration,
            config=self.config.resolved(),
            budget=self.budget.model_dump(),
            metrics=self.metrics,
            objective=self.objective.state(),
            sampler=self.sampler.state(),
            ratio_deviation=self.ratio_deviation,
            started=self.started,
        )
        model = self.policy.trainable()
        save_checkpoint(folder, checkpoint, model, self.optimizer, self.ema, self.objective, self.reference)

    def restore(self, folder: Path) -> None:
        """Goes back to the newest checkpoint; see `load_checkpoint`."""
        model = self.policy.trainable()
        checkpoint, self.reference = load_checkpoint(
            folder, self.config.resolved(), model, self.optimizer, self.ema, self.objective
        )
        self.sampler.load_state(checkpoint.sampler)
        self.iteration, self.metrics = checkpoint.iteration, checkpoint.metrics
        self.budget = Budget.model_validate(checkpoint.budget)
        self.ratio_deviation, self.started = checkpoint.ratio_deviation, checkpoint.started

    # ------------------------------------------------------------------------------------------------ one iteration

    def _given(self) -> RolloutForest:
        """The next fixed pairs; nothing is rolled out or scored."""
        chosen = self._next(self.pairs)
        return pair_forest(self.policy, chosen, self.config.seed, self.iteration, self.config.log_prob_reduction)

    def _rolled_out(self) -> RolloutForest:
        forest, answers = self._scored()
        self._reward(forest, answers)
        kept = self.sampler.trained_leaves(forest)
        if kept is not None:
            forest.train_only(kept)
        return forest

    def _scored(self) -> tuple[RolloutForest, dict[str, np.ndarray]]:
        """A rollout of the next prompts, and what each reward answers, float64 [G * K].

        With `overlap` parts, one part's pictures are scored while the next is rolled out.
        """
        config, i = self.config, self.iteration
        progress = self.progress()
        plan = self.sampler.plan(progress, np.random.default_rng([config.seed, 1, i]))
        prompts = self._next(self.prompts)
        keys = group_keys(prompts)
        parts = np.array_split(np.arange(len(prompts)), min(config.overlap, len(prompts)))
        forests: list[RolloutForest] = []
        pending: list[Future[dict[str, np.ndarray]]] = []
        with ThreadPoolExecutor(1) as scoring:
            for part in parts:
                with self._phase("rollout"):
                    forest = rollout(
                        self.policy,
                        [prompts[g] for g in part],
                        plan,
                        config.seed,
                        i,
                        reduction=config.log_prob_reduction,
                        micro_batch=config.micro_batch,
                        progress=progress,
                        keys=[keys[g] for g in part],
                    )
                with self._phase("decode"):
                    images = self.policy.decode(forest.leaf_latents)
                forests.append(forest)
                score = partial(self.judges.score, images, forest.leaf_prompts, when=f"in iteration {i}")
                with self._phase("score"):
                    pending.append(scoring.submit(score) if len(parts) > 1 else _done(score()))
            with self._phase("score"):
                answers = [answer.result() for answer in pending]
        self.budget.model_rows_rollout += plan.model_rows(len(prompts))
        return RolloutForest.joined(forests), {name: np.concatenate([part[name] for part in answers]) for name in answers[0]}

    def _next(self, available: list[Item]) -> list[Item]:
        """The next ones of an endless series of shuffles; a pure function of the seed and the iteration."""
        count = self.config.prompts_per_iteration
        chosen = []
        for position in range(self.iteration * count, (self.iteration + 1) * count):
            epoch, place = divmod(position, len(available))
            order = np.random.default_rng([seed_of("prompts", self.config.seed), epoch]).permutation(len(available))
            chosen.append(available[order[place]])
        return chosen

    def _reward(self, forest: RolloutForest, answers: dict[str, np.ndarray]) -> None:
        """Fills `forest.scores` with what each reward answers, and `forest.rewards` with their weighted sum."""
        scores = {name: forest.by_group(torch.from_numpy(answer).float()) for name, answer in answers.items()}
        weights = self.judges.weights
        several = len(weights) > 1 and self.config.normalise_rewards
        total = torch.zeros(forest.groups, forest.group_size)
        for name, weight in weights.items():
            raw = scores[name]
            total = total + weight * (groups.standardise(raw).masked_fill(raw.isnan(), torch.nan) if several else raw)
        self.budget.reward_calls += len(forest.leaves) * len(scores)
        self.budget.failed_scores += int(sum(raw.isnan().sum() for raw in scores.values()))
        if bool(total.isnan().all()):
            raise RunError(f"no picture of iteration {forest.iteration} could be scored")
        forest.rewards = total.flatten().to(self.policy.device)
        forest.scores = {name: raw.flatten().to(self.policy.device) for name, raw in scores.items()}

    def _updates(self, forest: RolloutForest) -> dict[str, float]:
        numbers: dict[str, float] = {}
        deviation = 0.0
        self.objective.observe(forest)
        self.sampler.observe(forest)
        keep = self.objective.needs.old and self.config.updates_per_rollout > 1
        at_rollout = [p.detach().clone() for p in self.policy.parameters()] if keep else None
        for update in range(self.config.updates_per_rollout):
            self.optimizer.zero_grad(set_to_none=True)
            found = engine.backward(
                self.policy,
                self.objective,
                forest,
                update=update,
                micro_batch=self.config.micro_batch,
                old=at_rollout if update else None,
                reference=self.reference,
            )
            self.budget.model_rows_train += found.forward_rows
            self.budget.replay_rows += found.rows
            if "log_prob" in found.terms and len(found.terms["log_prob"]):
                deviation = float((torch.exp(found.terms["log_prob"] - forest.old_log_prob) - 1).abs().max())
                if update == 0:
                    self.ratio_deviation = max(self.ratio_deviation, deviation)
            numbers |= self._step() | {"loss": found.loss}
            if update == 0:
                numbers |= {"ratio_abs_dev_first": deviation, **self.objective.diagnostics(found.terms, forest)}
        updates = self.config.updates_per_rollout
        return numbers | {"ratio_abs_dev_max": deviation, "off_policy_share": (updates - 1) / updates}

    def _step(self) -> dict[str, float]:
        o = self.config.optimizer
        factor = 0.1 + 0.45 * (1 + np.cos(np.pi * self.progress())) if o.schedule == "cosine" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = o.lr * float(factor)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, o.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise NonFiniteError(f"the gradient is not finite in iteration {self.iteration} ({self.policy.dtype})")
        before = [p.detach().clone() for p in self.parameters]
        self.optimizer.step()
        self.budget.optimizer_steps += 1
        with torch.no_grad():
            moved = torch.stack([(p - b).square().sum() for p, b in zip(self.parameters, before, strict=True)]).sum().sqrt()
        if self.ema:
            self.ema.update(self.budget.optimizer_steps)
        return {"grad_norm": float(norm), "policy_update_norm": float(moved), "lr": o.lr * float(factor)}

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.budget.seconds_by_phase[name] += time.perf_counter() - began


def _done(answer: dict[str, np.ndarray]) -> Future[dict[str, np.ndarray]]:
    """Without a thread, which would have arithmetic threads of its own beside the model's."""
    future: Future[dict[str, np.ndarray]] = Future()
    future.set_result(answer)
    return future


def _reward_numbers(forest: RolloutForest) -> dict[str, float]:
    rewards = forest.by_group(forest.rewards)
    latents = forest.leaf_latents.reshape(forest.groups, forest.group_size, -1)
    centred = groups.standardise(rewards, std="none")
    return {
        **{f"reward_{name}": float(raw.nanmean()) for name, raw in forest.scores.items()},
        "reward": float(rewards.nanmean()),
        "reward_std_in_group": float(centred.square().mean(1).sqrt().mean()),
        "zero_std_ratio": float((~groups.spread(rewards)).float().mean()),
        "failed_scores": int(rewards.isnan().sum()),
        "rollout_lgmd": float(torch.stack([groups.lgmd(z) for z in latents]).mean()),
    }


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Holds back Ctrl-C and SIGTERM until the block is done; raises KeyboardInterrupt then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []
    former = {s: signal.signal(s, lambda number, frame: pressed.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if pressed:
        raise KeyboardInterrupt


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator on CUDA, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
