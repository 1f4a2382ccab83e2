"""Estimates what a run will cost: model rows, parameters, memory, and the time at the pace of this machine."""

import torch
from pydantic import BaseModel, ConfigDict

from alignbench.backbone import Backbone, device_named
from alignbench.config.run_config import RunConfig
from alignbench.errors import UserError
from alignbench.evaluation.evaluate import evaluation_prompts
from alignbench.forecast.expected_rows import data_rows, model_rows, rows_per_iteration, trains_guided
from alignbench.forecast.memory import Memory, estimate_memory
from alignbench.forecast.pace import Pace, measure_pace, seconds_of_evaluations, seconds_per_iteration
from alignbench.load import load_configured_backbone, load_configured_objective, opens_on_meta_device
from alignbench.tasks import configured_task

CPU_LIMIT = 2 * 2**30
"""Size of the weights in bytes above which nothing is timed on a CPU."""


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
    data_rows: float
    """Model rows of one iteration for the data term of keepers: of drawing the data, and of training on them."""
    double_passes: int
    """Passes in which each row is first evaluated without a gradient, because they take several micro-batches."""
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
    seconds_evaluation: float | None
    """Seconds of all evaluations: of the base model, the trained model and along the training; None if nothing was timed."""
    not_measured: str | None
    """Why nothing was timed; None if times were measured."""


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
    iterations = config.iterations if needs.training else 0
    return Forecast(
        parameters=parameters,
        trained=trained,
        iterations=iterations,
        updates=config.updates_per_rollout,
        rollout_rows=rows.rollout,
        replay_rows=rows.replay,
        data_rows=data_rows(config, rows),
        double_passes=rows.double_passes,
        reference=needs.reference,
        behaviour=needs.behaviour and (needs.behaviour_is_ema or config.updates_per_rollout > 1),
        rows=model_rows(config, rows, needs),
        images=rows.images,
        call_rows=round(min(config.micro_batch or rows.widest, rows.widest)),
        memory=needed,
        device=str(device_named(config.device)),
        seconds_iteration=None if pace is None else seconds_per_iteration(config, rows, pace, needs, guided=guided),
        seconds_evaluation=None if pace is None else seconds_of_evaluations(config, pace, iterations, bases=1),
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
