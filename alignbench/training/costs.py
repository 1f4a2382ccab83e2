"""What a run will cost, told before it runs: model rows, parameters, memory, and time from rows that are timed now."""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, computed_field
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from alignbench.backbone import Backbone, device_named
from alignbench.config.run_config import RunConfig
from alignbench.errors import UserError
from alignbench.evaluation.evaluate import MetricSuite, evaluation_prompts
from alignbench.load import load_configured_backbone, load_objective, load_sampler, opens_on_meta_device
from alignbench.objective import Needs, Objective
from alignbench.rollouts.executor import predict, sample
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.noise import normal
from alignbench.rollouts.terms import Rows
from alignbench.tasks import load_task
from alignbench.testing import hand_made_forest

PROGRESS_POINTS = 25
"""Points of a training at which a sampler's plans are drawn to tell what its rollouts cost on average."""
TIMED_PICTURES = 4
TIMED_ROWS = 32
"""At most this many rows are timed at once."""
WEIGHED_LATENTS = 64
"""At most this many are decoded to tell what decoding needs."""
CPU_LIMIT = 2 * 2**30
"""Bytes of weights above which nothing is timed on a CPU."""


class ExpectedRows(NamedTuple):
    """Of one iteration, on average over the training, for samplers that learn as at its start."""

    rollout: float
    replay: float
    """Of one training pass."""
    asked: float
    """Those of them that the policy is asked about, for rewards that differ within each group."""
    widest: float
    """Most rows that one denoising step of a rollout has."""
    pictures: int
    double_passes: int = 0
    """Updates of a rollout whose rows are evaluated twice, since a pass takes several microbatches; see `training.engine`."""


class Pace(NamedTuple):
    """Seconds, measured on this machine."""

    forward_row: float
    """One model row without a gradient."""
    train_row: float
    """One with its way back."""
    picture: float
    """Decoding and scoring one."""
    rewards: int
    """Scores of each picture."""
    steps: int
    """Of the model's own call."""
    unguided: tuple[float, float] | None = None
    """`forward_row` and `train_row` without guidance; None where they are the same."""


class Memory(BaseModel):
    """Bytes of the model and its training; scorers, the libraries and gaps between tensors come on top."""

    model_config = ConfigDict(extra="forbid")

    weights: int
    text_encoders: int
    """Only while prompts are encoded, before the training."""
    gradients: int
    optimizer: int
    ema: int
    rollout: int
    """Of what one model call without a gradient makes."""
    training: int
    """Of what one micro-batch makes on its way there and back."""
    decoding: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def peak(self) -> int:
        """The most that is alive at one time."""
        trained = self.gradients + self.optimizer + self.ema
        return self.weights + max(self.text_encoders, trained + max(self.rollout, self.training, self.decoding))


class Forecast(BaseModel):
    """What a run would do."""

    model_config = ConfigDict(extra="forbid")

    parameters: dict[str, int]
    """Component -> all its parameters."""
    trained: int
    iterations: int | None
    updates: int
    """Passes over each rollout."""
    rollout_rows: float
    replay_rows: float
    """Of one pass; the next three say what comes with each row of it."""
    double_passes: int
    """Passes in which each row is evaluated once more without a gradient, since they take several microbatches."""
    reference: bool
    """And once by the frozen base model."""
    behaviour: bool
    """And once, after the first update, by the policy of the rollout."""
    rows: float
    """Of one iteration, all of these together."""
    pictures: int
    call_rows: int
    """Most rows of one model call."""
    memory: Memory
    device: str
    seconds_iteration: float | None
    seconds_judging: float | None
    """Of base and trained model together."""
    not_measured: str | None
    """Why no time is told."""


# ---------------------------------------------------------------------------------------------------- rows and time


def rows_per_iteration(config: RunConfig, objective: Objective | None = None) -> ExpectedRows:
    """Model rows as the plans tell them.

    Args:
        objective: some ask the model about final pictures, and not about the steps of the rollout; their replay rows are
            then told for rewards that differ within each group.
    """
    sampler = load_sampler(config.sampler.name, **config.sampler.settings)
    groups = config.prompts_per_iteration
    plans = [
        sampler.plan(i / (PROGRESS_POINTS - 1), np.random.default_rng([config.seed, 1, i])) for i in range(PROGRESS_POINTS)
    ]
    replay = float(np.mean([p.replay_rows(groups) for p in plans]))
    k = plans[0].leaves
    if objective is not None and not objective.replays:
        replay = len(_own_rows(objective, groups, k))
    leaves = objective.trained_leaves(_hand_made(groups, k)) if objective is not None and objective.replays else None
    return ExpectedRows(
        float(np.mean([p.model_rows(groups) for p in plans])),
        replay,
        replay if leaves is None else replay * float(leaves.float().mean()),
        groups * max(p.branches_before(t) for p in plans for t in range(len(p.steps))),
        groups * k,
        0 if objective is None else _double_passes(config, objective, replay),
    )


def _double_passes(config: RunConfig, objective: Objective, replay: float) -> int:
    """Updates in which the terms of a microbatch are not known before its backward pass."""
    if config.micro_batch is None or config.micro_batch >= replay:
        return 0
    if not objective.replays:
        return config.updates_per_rollout
    needs = objective.needs
    off_policy = needs.behaviour_is_ema or needs.rollouts_from_reference
    later = 0 if objective.separable else config.updates_per_rollout - 1
    return later + (off_policy and not objective.separable)


def trains_guided(objective: Objective) -> bool:
    """Whether the rows that it trains on are asked with guidance."""
    return objective.replays or _own_rows(objective, 1, 2).guided


def _own_rows(objective: Objective, groups: int, k: int) -> Rows:
    """What an objective that does not replay the path asks about, for rewards that differ within each group."""
    return objective.rows(_hand_made(groups, k), 0)


def _hand_made(groups: int, k: int) -> RolloutForest:
    """Chains of one step, whose rewards differ within each group and from its mean."""
    return hand_made_forest([[i**0.5 for i in range(k)]] * groups, [[i] for i in range(groups * k)], [0.0] * groups * k)


def measure_pace(config: RunConfig, policy: Backbone) -> Pace:
    """Times some rows and pictures of the task's first prompts, each after a first time that does not count."""
    task = load_task(config.task)
    judges, prompts = MetricSuite(task, config.scorer_timeout), task.train_prompts[:TIMED_PICTURES]
    rows = min(TIMED_ROWS, config.micro_batch or TIMED_ROWS)
    guided = policy.encode(prompts)
    x = normal([("pace", i) for i in range(rows)], policy.latent_shape, policy.device)
    group = torch.arange(rows, device=policy.device) % len(prompts)

    def timed(conditioning: Any) -> tuple[float, float]:
        def forward() -> Tensor:
            return predict(policy, x, 0.5, conditioning, group)

        with torch.no_grad():
            forward_row = _second_time(forward, policy.device) / rows
        train_row = _second_time(lambda: forward().square().mean().backward(), policy.device) / rows
        return forward_row, train_row

    pace, own = timed(guided), policy.without_guidance(guided)
    unguided = None if own is guided else timed(own)
    policy.trainable().zero_grad(set_to_none=True)
    latents = sample(policy, prompts, 1, policy.default_steps, 0, micro_batch=config.micro_batch)

    def judge() -> None:
        judges.score(policy.decode(latents), prompts, when="while it was timed")

    picture = _second_time(judge, policy.device) / len(latents)
    return Pace(*pace, picture, len(judges.rewards), policy.default_steps, unguided)


def model_rows(config: RunConfig, rows: ExpectedRows, needs: Needs) -> float:
    """All rows of an iteration, as a run's record counts them: with those that are evaluated twice, and those of a reference
    and a behaviour policy."""
    passes = config.updates_per_rollout + rows.double_passes
    return rows.rollout + rows.asked * passes + rows.replay * _other_passes(config, needs)


def seconds_per_iteration(config: RunConfig, rows: ExpectedRows, pace: Pace, needs: Needs, *, guided: bool = True) -> float:
    """Of rollout, decoding, scoring and training.

    Args:
        guided: whether the rows of training are asked with guidance.
    """
    forward_row, train_row = (pace.forward_row, pace.train_row) if guided or pace.unguided is None else pace.unguided
    of_policy = rows.asked * (config.updates_per_rollout * train_row + rows.double_passes * forward_row)
    trained = of_policy + rows.replay * _other_passes(config, needs) * forward_row
    return rows.rollout * pace.forward_row + trained + rows.pictures * pace.picture


def seconds_of_judging(config: RunConfig, pace: Pace) -> float:
    """Of one model."""
    e = config.evaluation
    return e.prompts * e.images_per_prompt * ((e.steps or pace.steps) * pace.forward_row + pace.picture)


def _other_passes(config: RunConfig, needs: Needs) -> int:
    """Of the reference and the behaviour policy over all replay rows, without a gradient."""
    updates = config.updates_per_rollout
    behaviour = (updates if needs.behaviour_is_ema else updates - 1) * needs.behaviour
    return updates * needs.reference + behaviour


def _second_time(work: Callable[[], Any], device: torch.device) -> float:
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return seconds


# ---------------------------------------------------------------------------------------------------- memory


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive at one time; tensors without values (meta) count as if they had them.

    Attributes:
        now: alive at present.
        most: alive at any one time.
    """

    def __init__(self, device: torch.device) -> None:
        """Counts tensors on this device alone."""
        super().__init__()
        self.device = device
        self.now = self.most = 0
        self._seen: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tree_map_only(Tensor, lambda t: self._seen.setdefault(t.untyped_storage(), True), (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._made, result)
        return result

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type == self.device.type and storage not in self._seen:
            self._seen[storage] = True
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.now -= size


@contextmanager
def _fused_attention() -> Iterator[None]:
    """While entered, attention on `meta` is as GPUs and CPUs compute it; torch makes the matrix of all pairs of tokens there.

    A TorchFunctionMode would not do: it is left on the way back, where checkpointed blocks are computed again.
    """
    own = nn.functional.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        if not query.is_meta:
            return own(query, key, value, attn_mask, dropout_p, is_causal, **options)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        answer: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask)[0]
        return answer

    with mock.patch.object(nn.functional, "scaled_dot_product_attention", attention):
        yield


def memory(config: RunConfig, policy: Backbone, prompt: str, rows: ExpectedRows, *, guided: bool = True) -> Memory:
    """What a run needs, from one call of each kind; a policy without values (device `meta`) computes nothing for it.

    Args:
        guided: whether the rows of training are asked with guidance.
    """
    components = policy.components()
    trained = list(policy.parameters())
    size = _bytes(trained)
    calls = max(1, round(min(config.micro_batch or rows.widest, rows.widest)))
    replayed = max(1, round(min(config.micro_batch or rows.replay, rows.replay)))

    def answer(count: int, conditioning: Any) -> Tensor:
        x = torch.zeros(count, *policy.latent_shape, device=policy.device)
        group = torch.zeros(count, dtype=torch.long, device=policy.device)
        return predict(policy, x, 0.5, conditioning, group)

    def most(work: Callable[[], Any]) -> int:
        with LiveBytes(policy.device) as live:
            work()
        return live.most

    conditioning = policy.encode([prompt])
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with _fused_attention():
        with torch.no_grad():
            rollout = most(lambda: answer(calls, conditioning))
            latents = torch.zeros(min(rows.pictures, WEIGHED_LATENTS), *policy.latent_shape, device=policy.device)
            decoding = most(lambda: policy.decode(latents))
        asked = conditioning if guided else policy.without_guidance(conditioning)
        training = most(lambda: answer(replayed, asked).square().mean().backward())
    for parameter in trained:
        parameter.grad = None
    return Memory(
        weights=sum(_bytes(c.module.parameters()) for c in components.values() if c.training),
        text_encoders=sum(_bytes(c.module.parameters()) for c in components.values() if not c.training),
        gradients=size,
        optimizer=2 * size,
        ema=size if config.ema else 0,
        rollout=rollout,
        training=training,
        decoding=decoding,
    )


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


# ---------------------------------------------------------------------------------------------------- both


def forecast(config: RunConfig) -> Forecast:
    """What a run with this configuration would do; nothing is trained and nothing written.

    A backbone that opens without its weights is weighed that way, and only timed where it can be opened with them.

    Raises:
        UserError: what `run` would refuse.
    """
    task = load_task(config.task)
    objective = load_objective(config.objective.name, **config.objective.settings)
    rows = rows_per_iteration(config, objective)
    evaluation_prompts(task, config.evaluation)
    on_meta = opens_on_meta_device(config)
    policy = load_configured_backbone(config, device="meta" if on_meta else None)
    guided = trains_guided(objective)
    needed = memory(config, policy, task.train_prompts[0], rows, guided=guided)
    parameters = {name: sum(p.numel() for p in c.module.parameters()) for name, c in policy.components().items()}
    trained = sum(p.numel() for p in policy.parameters())
    pace, why = _pace_or_reason(config, policy, needed)
    needs = objective.needs
    return Forecast(
        parameters=parameters,
        trained=trained,
        iterations=config.iterations if needs.training else 0,
        updates=config.updates_per_rollout,
        rollout_rows=rows.rollout,
        replay_rows=rows.replay,
        double_passes=rows.double_passes,
        reference=needs.reference,
        behaviour=needs.behaviour and (needs.behaviour_is_ema or config.updates_per_rollout > 1),
        rows=model_rows(config, rows, needs),
        pictures=rows.pictures,
        call_rows=round(min(config.micro_batch or rows.widest, rows.widest)),
        memory=needed,
        device=str(device_named(config.device)),
        seconds_iteration=None if pace is None else seconds_per_iteration(config, rows, pace, needs, guided=guided),
        seconds_judging=None if pace is None else 2 * seconds_of_judging(config, pace),
        not_measured=why,
    )


def _pace_or_reason(config: RunConfig, policy: Backbone, needed: Memory) -> tuple[Pace | None, str | None]:
    device = device_named(config.device)
    if policy.device.type != "meta":
        return measure_pace(config, policy), None
    if device.type == "cpu" and needed.weights > CPU_LIMIT:
        return None, "no GPU here, and the model is too large for a CPU"
    if device.type == "cuda" and needed.peak > (free := torch.cuda.mem_get_info(device)[0]):
        return None, f"it needs more than the {free / 2**30:.1f} GiB that are free on {device}"
    try:
        return measure_pace(config, load_configured_backbone(config)), None
    except UserError as error:
        return None, str(error)
