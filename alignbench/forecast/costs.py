"""Estimates what a run will cost: model rows, parameters, memory, and the time, from model rows that are timed now."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from alignbench.backbone import Backbone, device_named
from alignbench.config.run_config import RunConfig
from alignbench.errors import UserError
from alignbench.evaluation.evaluate import MetricSuite, evaluation_prompts
from alignbench.forecast.expected_rows import (
    ExpectedRows,
    model_rows,
    passes_without_gradient,
    rows_per_iteration,
    trains_guided,
)
from alignbench.forecast.memory import Memory, estimate_memory
from alignbench.load import load_configured_backbone, load_configured_objective, opens_on_meta_device
from alignbench.objective import Needs
from alignbench.rollouts.executor import predict, sample
from alignbench.rollouts.noise import normal
from alignbench.tasks import configured_task

TIMED_IMAGES = 4
"""Largest number of images that are decoded and scored to measure the time."""
TIMED_ROWS = 32
"""Largest number of rows in a model call that is timed."""
CPU_LIMIT = 2 * 2**30
"""Size of the weights in bytes above which nothing is timed on a CPU."""


class Pace(NamedTuple):
    """The speed of this machine, as measured."""

    forward_row: float
    """Seconds of one model row without a gradient."""
    train_row: float
    """Seconds of one model row, forward and backward."""
    image: float
    """Seconds to decode and score one image."""
    rewards: int
    """The number of scores of each image."""
    steps: int
    """Denoising steps of the model's own call."""
    unguided: tuple[float, float] | None = None
    """`forward_row` and `train_row` without guidance; None if they are the same."""


class Forecast(BaseModel):
    """The estimated costs of a run."""

    model_config = ConfigDict(extra="forbid")

    parameters: dict[str, int]
    """The number of parameters of each component."""
    trained: int
    """The number of parameters that are trained."""
    iterations: int | None
    """Iterations of the run; None if only a budget ends it."""
    updates: int
    """Updates of each rollout; each is one training pass."""
    rollout_rows: float
    """Model rows of one rollout."""
    replay_rows: float
    """Model rows of one training pass of the policy."""
    double_passes: int
    """Passes in which each row is first evaluated without a gradient, because they take several microbatches."""
    reference: bool
    """Whether the frozen base model evaluates each row of a pass as well."""
    behaviour: bool
    """Whether the behaviour policy does so; if it is the policy of the rollout, only from the second update on."""
    rows: float
    """All model rows of one iteration."""
    images: int
    """Images of one iteration."""
    call_rows: int
    """Largest number of rows in one model call."""
    memory: Memory
    device: str
    """The device for which times are estimated."""
    seconds_iteration: float | None
    """Seconds of one iteration; None if nothing was timed."""
    seconds_judging: float | None
    """Seconds to evaluate the base model and the trained model, in total; None if nothing was timed."""
    not_measured: str | None
    """Why nothing was timed; None if times were measured."""


def measure_pace(config: RunConfig, policy: Backbone) -> Pace:
    """Times model rows and images of the task's first prompts. The first call of each kind warms up and does not count.

    Args:
        config: the configuration of the run.
        policy: its backbone, with weights.
    """
    task = configured_task(config)
    suite, prompts = MetricSuite(task, config.scorer_timeout), task.train_prompts[:TIMED_IMAGES]
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

    def decode_and_score() -> None:
        suite.score(policy.decode(latents), prompts, when="while it was timed")

    image = _second_time(decode_and_score, policy.device) / len(latents)
    return Pace(*pace, image, len(suite.rewards), policy.default_steps, unguided)


def seconds_per_iteration(config: RunConfig, rows: ExpectedRows, pace: Pace, needs: Needs, *, guided: bool = True) -> float:
    """Computes the seconds of an iteration: rollout, decoding, scoring and training.

    Args:
        config: the configuration of the run.
        rows: the model rows of an iteration.
        pace: the speed of this machine.
        needs: what the objective needs.
        guided: whether the rows of training are evaluated with guidance.
    """
    forward_row, train_row = (pace.forward_row, pace.train_row) if guided or pace.unguided is None else pace.unguided
    of_policy = rows.asked * (config.updates_per_rollout * train_row + rows.double_passes * forward_row)
    trained = of_policy + rows.replay * passes_without_gradient(config, needs) * forward_row
    return rows.rollout * pace.forward_row + trained + rows.images * pace.image


def seconds_per_evaluation(config: RunConfig, pace: Pace) -> float:
    """Computes the seconds of the evaluation of one model."""
    e = config.evaluation
    return e.prompts * e.images_per_prompt * ((e.steps or pace.steps) * pace.forward_row + pace.image)


def _second_time(work: Callable[[], Any], device: torch.device) -> float:
    """Calls `work` twice, and returns the seconds of the second call."""
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return seconds


def forecast(config: RunConfig) -> Forecast:
    """Estimates the costs of a run with this configuration. Nothing is trained or written.

    The memory of a backbone that opens without its weights is estimated without them. Times need the weights.

    Raises:
        UserError: `run` would refuse the configuration.
    """
    task = configured_task(config)
    objective = load_configured_objective(config)
    rows = rows_per_iteration(config, objective)
    evaluation_prompts(task, config.evaluation)
    on_meta = opens_on_meta_device(config)
    policy = load_configured_backbone(config, device="meta" if on_meta else None)
    guided = trains_guided(objective)
    needed = estimate_memory(config, policy, task.train_prompts[0], rows, guided=guided)
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
        images=rows.images,
        call_rows=round(min(config.micro_batch or rows.widest, rows.widest)),
        memory=needed,
        device=str(device_named(config.device)),
        seconds_iteration=None if pace is None else seconds_per_iteration(config, rows, pace, needs, guided=guided),
        seconds_judging=None if pace is None else 2 * seconds_per_evaluation(config, pace),
        not_measured=why,
    )


def _pace_or_reason(config: RunConfig, policy: Backbone, needed: Memory) -> tuple[Pace | None, str | None]:
    """The pace of the model on its device, or the reason why it was not measured."""
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
