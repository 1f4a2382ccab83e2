"""Collecting: rolls out the sampler's plan on the next prompts, decodes and scores the images, and fills in the rewards."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import TypeVar

import numpy as np
import torch

from alignbench import groups
from alignbench.backbone import Backbone
from alignbench.config.run_config import RunConfig
from alignbench.errors import ScorerError
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.keepers.bonuses import Bonuses, concentrated
from alignbench.records.record import Budget
from alignbench.rollouts.executor import decode, predict, rollout
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.noise import Key, group_keys, seed_of
from alignbench.rollouts.plan import Plan
from alignbench.runtime.micro_batch import GRAPH_SHARE, MicroBatch, rows_within_memory
from alignbench.runtime.processes import Processes
from alignbench.sampler import Sampler

Item = TypeVar("Item")
BONUS = "bonus of "
"""What the names of bonuses begin with among scores."""
Scores = dict[str, np.ndarray]
"""Reward -> its score of each image, float64 [N]."""


def next_items(available: Sequence[Item], count: int, seed: int, iteration: int) -> list[Item]:
    """The items of one iteration, from an endless series of shuffles; a pure function of the seed and the iteration."""
    size = len(available)
    first, end = iteration * count, (iteration + 1) * count
    prompt_seed = seed_of("prompts", seed)
    epochs = range(first // size, (end - 1) // size + 1)
    order = np.concatenate([np.random.default_rng([prompt_seed, epoch]).permutation(size) for epoch in epochs])
    return [available[i] for i in order[first - epochs.start * size :][:count]]


@contextmanager
def timed(budget: Budget, phase: str) -> Iterator[None]:
    """Adds the seconds spent inside to a phase of the budget."""
    began = time.perf_counter()
    yield
    budget.seconds_by_phase[phase] += time.perf_counter() - began


class Collector:
    """Rolls out, decodes and scores the prompts of each iteration; it never changes a weight.

    Attributes:
        micro_batch: rows in one model call, shared with the updates.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[str],
        policy: Backbone,
        sampler: Sampler,
        suite: MetricSuite,
        processes: Processes,
        micro_batch: MicroBatch,
    ) -> None:
        self.config, self.prompts, self.policy, self.sampler = config, prompts, policy, sampler
        self.suite, self.processes, self.micro_batch = suite, processes, micro_batch
        self.keepers, self.bonuses = config.keepers, Bonuses(config.keepers)

    def collect(
        self,
        iteration: int,
        progress: float,
        budget: Budget,
        behaviour: Callable[[], AbstractContextManager[None]],
        graph_serves: Callable[[Plan, int], bool] = lambda plan, groups: False,
    ) -> RolloutForest:
        """Rolls out the iteration's prompts and scores the images; the sampler chooses the leaves to train on.

        Args:
            progress: of the training, from 0 to 1.
            budget: rows, images, reward calls and seconds are added to it.
            behaviour: while entered, the policy has the weights that draw rollouts.
            graph_serves: whether the first update can use the graph of the scored rows of a plan for so many groups. It is
                kept where these rows fit into one micro-batch.

        Returns:
            The forest of all ranks' groups, with rewards.

        Raises:
            ScorerError: a reward failed, or scored no image at all.
        """
        plan = self.sampler.plan(progress, np.random.default_rng([self.config.seed, 1, iteration]))
        groups = self.config.prompts_per_iteration
        keep_graph = (
            self.config.overlap == 1
            and type(self.sampler).trained_leaves is Sampler.trained_leaves
            and graph_serves(plan, groups)
        )
        forest, scores = self._rollout_and_score(plan, iteration, progress, budget, behaviour, keep_graph=keep_graph)

        def finish() -> None:
            self._fill_rewards(forest, scores, budget)
            trained = self.sampler.trained_leaves(forest)
            if trained is not None:
                forest.train_only(trained)

        self.processes.on_all_ranks(finish)
        return forest

    def _rollout_and_score(
        self,
        plan: Plan,
        iteration: int,
        progress: float,
        budget: Budget,
        behaviour: Callable[[], AbstractContextManager[None]],
        *,
        keep_graph: bool,
    ) -> tuple[RolloutForest, Scores]:
        """The forest of all ranks, and the scores of each reward for its images.

        Each rank rolls out its share of the prompts. With several `overlap` parts, the images of one part are scored while the
        next part is rolled out.
        """
        on_all_ranks = self.processes.on_all_ranks
        prompts = next_items(self.prompts, self.config.prompts_per_iteration, self.config.seed, iteration)
        keys = group_keys(prompts)
        own = self.processes.share(range(len(prompts)))
        parts = np.array_split(own, min(self.config.overlap, len(own)))
        forests: list[RolloutForest] = []
        pending: list[Future[Scores]] = []
        for part in parts:
            with timed(budget, "rollout"), behaviour():
                own_prompts, own_keys = [prompts[g] for g in part], [keys[g] for g in part]
                forest = self._rollout(plan, own_prompts, own_keys, iteration, progress, keep_graph=keep_graph)
            with timed(budget, "decode"):
                images = self._decode(forest)
            score = partial(self._scores, images, forest, f"in iteration {iteration}")
            with timed(budget, "score"):
                if pending:
                    on_all_ranks(lambda: self._result(pending[-1], iteration))  # a scorer has one request at a time
                pending.append(on_all_ranks(partial(_submit, score, in_thread=len(parts) > 1)))
            forests.append(forest)
        with timed(budget, "score"):
            results = on_all_ranks(lambda: [self._result(future, iteration) for future in pending])
        budget.model_rows_rollout += plan.model_rows(len(prompts))
        own_scores = {name: np.concatenate([part[name] for part in results]) for name in results[0]}
        return (
            RolloutForest.joined(forests).gathered(self.processes),
            {name: torch.cat(self.processes.all_gather(torch.from_numpy(s))).numpy() for name, s in own_scores.items()},
        )

    def _scores(self, images: np.ndarray, forest: RolloutForest, when: str) -> Scores:
        """The scores of each reward, and the bonuses of keepers under names of their own."""
        bonuses = self.bonuses.measure(images, forest.leaf_latents, forest.prompts, when=when)
        return self.suite.score(images, forest.leaf_prompts, when=when) | {BONUS + name: v for name, v in bonuses.items()}

    def _result(self, future: "Future[Scores]", iteration: int) -> Scores:
        limit = self.config.scorer_timeout
        try:
            return future.result(limit)
        except TimeoutError:
            raise ScorerError(
                f"the rewards took more than {limit:g} s in iteration {iteration}; if they only need longer, raise "
                "scorer_timeout"
            ) from None

    def _rollout(
        self, plan: Plan, prompts: list[str], keys: list[Key], iteration: int, progress: float, *, keep_graph: bool
    ) -> RolloutForest:
        replay_rows = plan.replay_rows(len(prompts))

        def within(micro_batch: int | None) -> RolloutForest:
            return rollout(
                self.policy,
                prompts,
                plan,
                self.config.seed,
                iteration,
                reduction=self.config.log_prob_reduction,
                micro_batch=micro_batch,
                progress=progress,
                keys=keys,
                keep_graph=keep_graph and replay_rows <= (micro_batch or replay_rows),
            )

        rows = max(replay_rows, len(prompts) * max(plan.rows_of_calls))
        if self.micro_batch.most is None:
            self.micro_batch.most = cache(partial(self._rows_that_fit, prompts))
        forest = self.micro_batch.fit(
            lambda limit: self.processes.on_all_ranks(partial(within, limit), calls_model=True), lambda: rows
        )
        if self.policy.device.type == "cuda" and not _memory_is_ample(self.policy.device):
            forest.take_live_velocity()  # decoder and scorers need the rest
        return forest

    def _rows_that_fit(self, prompts: list[str]) -> int | None:
        """How many rows with a graph fit into the memory of a CPU; None on GPUs, whose errors can be caught.

        Args:
            prompts: those of a rollout. They are encoded together, as it does, since what a text encoder gives a prompt depends
                on its batch in the last bits.
        """
        policy = self.policy
        if policy.device.type != "cpu" or self.processes.sharded:
            return None
        x, group, conditioning = torch.zeros(1, *policy.latent_shape), torch.zeros(1, dtype=torch.long), policy.encode(prompts)
        share = GRAPH_SHARE / self.processes.count
        return rows_within_memory(policy.device, lambda: predict(policy, x, 0.5, conditioning, group), share)

    def _decode(self, forest: RolloutForest) -> np.ndarray:
        latents = forest.leaf_latents
        on_all_ranks = self.processes.on_all_ranks
        halvings = self.micro_batch.halvings

        def within(rows: int | None) -> np.ndarray:
            if self.micro_batch.halvings > halvings:
                forest.take_live_velocity()  # its graph may be what fills the memory
            return on_all_ranks(partial(decode, self.policy, latents, rows))

        return self.micro_batch.fit(within, lambda: len(latents))

    def _fill_rewards(self, forest: RolloutForest, results: Scores, budget: Budget) -> None:
        """Fills `forest.scores` with the scores of rewards, and `forest.rewards` with their weighted sum and bonuses."""
        every = {name: forest.by_group(torch.from_numpy(score)) for name, score in results.items()}
        scores = {name: every[name] for name in self.suite.rewards}
        bonuses = {name.removeprefix(BONUS): values for name, values in every.items() if name.startswith(BONUS)}
        weights, normalise = self.suite.weights, self.config.normalise_rewards
        total = groups.total(scores, weights, normalise=normalise)
        budget.decoded += len(forest.leaves)
        budget.reward_calls += len(forest.leaves) * len(scores)
        budget.failed_scores += int(sum(raw.isnan().sum() for raw in scores.values()))
        if bool(total.isnan().all()):
            raise ScorerError(f"no image of iteration {forest.iteration} could be scored")
        shaped = self.bonuses.added(total, bonuses)
        if self.keepers.reward_share < 1:
            shaped = concentrated(shaped, self.keepers.reward_share)
        forest.left_out = int(shaped.isnan().sum() - total.isnan().sum())
        forest.set_rewards(shaped, scores, weights, normalise=normalise)
        forest.bonuses = {name: values.flatten().to(self.policy.device) for name, values in bonuses.items()}


def _memory_is_ample(device: torch.device) -> bool:
    """Whether at most half of a GPU's memory is allocated."""
    return 2 * torch.cuda.memory_allocated(device) <= torch.cuda.get_device_properties(device).total_memory


def _submit(work: Callable[[], Scores], *, in_thread: bool) -> "Future[Scores]":
    """Does the work at once, or starts it in a thread.

    A thread uses arithmetic threads of its own beside the model's, and has no time limit.
    """
    future: Future[Scores] = Future()

    def go() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    if in_thread:
        threading.Thread(target=go, daemon=True).start()  # one that hangs must not keep the process from ending
    else:
        future.set_result(work())
    return future


def reward_numbers(forest: RolloutForest) -> dict[str, float]:
    """Numbers for an iteration's row: means of the rewards, their deviation within groups, and the LGMD of the latents."""
    rewards = forest.by_group(forest.rewards)
    latents = forest.leaf_latents.reshape(forest.groups, forest.group_size, -1)
    return {
        **{f"reward_{name}": float(raw.nanmean()) for name, raw in forest.scores.items()},
        **{name: float(values.abs().mean()) for name, values in forest.bonuses.items()},
        "reward": float(rewards.nanmean()),
        "reward_std_in_group": float(groups.deviation(rewards).mean()),
        "zero_std_ratio": float((~groups.has_distinct_rewards(rewards)).float().mean()),
        "failed_scores": int(rewards.isnan().sum()) - forest.left_out,
        "rollout_lgmd": float(torch.stack([groups.lgmd(z) for z in latents]).mean()),
    }
