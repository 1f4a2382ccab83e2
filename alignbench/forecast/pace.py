"""The pace of this machine, measured with the model, the scorers and, if it is short, the iteration of a run itself."""

import io
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from alignbench.backbone import Backbone
from alignbench.config.run_config import RunConfig
from alignbench.evaluation import curve
from alignbench.evaluation.evaluate import (
    PATH_STEPS,
    PATHS,
    MetricSuite,
    evaluate,
    evaluation_prompts,
    validation_prompts,
)
from alignbench.figures.style import STYLE
from alignbench.forecast.expected_rows import (
    ExpectedRows,
    data_passes,
    model_rows,
    passes_without_gradient,
    rows_per_iteration,
    trains_guided,
)
from alignbench.inference.drawing import Drawing
from alignbench.load import load_configured_objective, load_configured_sampler
from alignbench.objective import Needs
from alignbench.rollouts.executor import predict, sample
from alignbench.rollouts.noise import normal
from alignbench.tasks import Task, configured_task
from alignbench.training.trainer import Trainer

TIMED_IMAGES = 4
"""Largest number of images that are decoded and scored to measure the time."""
TIMED_STEPS = 8
"""Denoising steps of these images."""
TIMED_ROWS = 32
"""Largest number of rows in a model call that is timed."""
TIMED_PROMPTS = 4
"""Number of prompts whose evaluation is timed, if that of one is short."""
SHORT = 1.0
"""Seconds of a first call up to which a longer or second one is made."""
SHORT_ITERATION = 4.0
"""Estimated seconds of an iteration up to which two are run."""


class Pace(NamedTuple):
    """The speed of this machine, as measured."""

    forward_row: float
    """Seconds of one model row without a gradient."""
    train_row: float
    """Seconds of one model row, forward and backward."""
    unscored_row: float
    """Seconds of one model row at a step that is not scored, which may be computed in a lower precision."""
    image: float
    """Seconds to decode and score one image."""
    rewards: int
    """The number of scores of each image."""
    evaluated_image: float
    """Seconds to draw one image of an evaluation, decode it and score it with all metrics."""
    unguided: tuple[float, float] | None = None
    """`forward_row` and `train_row` without guidance; None if they are the same."""
    correction: float = 1.0
    """Seconds of a whole iteration over the sum of its rows and images; 1 if iterations are too long to be run."""
    loading: float = 0.0
    """Seconds to load the scorers and judges."""


def measure_pace(config: RunConfig, policy: Backbone) -> Pace:
    """Times model rows, images, an evaluation and, if it is short, an iteration of the run. The policy's weights may change.

    Scores are timed with the task's own rewards; a service at `scorer_url` is not asked.

    Args:
        config: the configuration of the run.
        policy: its backbone, with weights.
    """
    began = time.perf_counter()
    task = configured_task(config)
    suite, prompts = MetricSuite(task, config.scorer_timeout), task.train_prompts[:TIMED_IMAGES]
    suite.prepare()  # or the first call would load models
    loading = time.perf_counter() - began
    guided = policy.encode(prompts)
    many = normal([("pace", i) for i in range(TIMED_ROWS)], policy.latent_shape, policy.device)
    with torch.no_grad():
        one_row = _seconds(lambda: predict(policy, many[:1], 0.5, guided, _groups(many[:1], prompts)), policy.device)
    is_slow = one_row > SHORT / 4  # then a row costs about the same alone
    x = many[: 1 if is_slow else config.micro_batch or TIMED_ROWS]
    rows, group = len(x), _groups(x, prompts)

    def timed(conditioning: Any) -> tuple[float, float]:
        def forward() -> Tensor:
            return predict(policy, x, 0.5, conditioning, group)

        with torch.no_grad():
            forward_row = _seconds(forward, policy.device) / rows
        train_row = _seconds(lambda: forward().square().mean().backward(), policy.device) / rows
        return forward_row, train_row

    pace, own = timed(guided), policy.without_guidance(guided)
    with torch.no_grad(), policy.unscored():
        unscored_row = _seconds(lambda: predict(policy, x, 0.5, guided, group), policy.device) / rows
    unguided = None if own is guided else timed(own)
    policy.trainable().zero_grad(set_to_none=True)
    prompts, steps = (prompts[:1], 2) if is_slow else (prompts, TIMED_STEPS)
    latents = sample(policy, prompts, 1, steps, 0, micro_batch=config.micro_batch)

    def decode_and_score(count: int) -> None:
        suite.score(policy.decode(latents[:count]), prompts[:count], when="while it was timed")

    image = _seconds(lambda: decode_and_score(1), policy.device, calls=1)
    if is_slow or image > SHORT:  # the judges are taken to need as long as the rewards
        evaluated = (config.evaluation.steps or policy.default_steps) * unscored_row + 2 * image
    else:
        image = _seconds(lambda: decode_and_score(len(latents)), policy.device) / len(latents)
        evaluated = _seconds_per_evaluated_image(config, policy, task, suite)
    found = Pace(*pace, unscored_row, image, len(suite.rewards), evaluated, unguided, loading=loading)
    return found._replace(correction=_correction(config, policy, task, suite, found))


def _groups(x: Tensor, prompts: list[str]) -> Tensor:
    return torch.arange(len(x), device=x.device) % len(prompts)


def _seconds_per_evaluated_image(config: RunConfig, policy: Backbone, task: Task, suite: MetricSuite) -> float:
    prompts, images = evaluation_prompts(task, config.evaluation), config.evaluation.images_per_prompt

    def measure(count: int) -> float:
        def work() -> None:
            evaluate(
                policy,
                task,
                suite,
                config.evaluation,
                prompts=prompts[:count],
                images_per_prompt=images,
                micro_batch=config.micro_batch,
            )

        return _seconds(work, policy.device, calls=1) / (count * images)

    first = measure(1)
    return first if first * images > SHORT else measure(min(TIMED_PROMPTS, len(prompts)))


def _correction(config: RunConfig, policy: Backbone, task: Task, suite: MetricSuite, pace: Pace) -> float:
    objective = load_configured_objective(config)
    rows = rows_per_iteration(config, objective)
    expected = seconds_per_iteration(config, rows, pace, objective.needs, guided=trains_guided(objective))
    if not objective.needs.training or config.pairs or expected > SHORT_ITERATION:
        return 1.0
    policy.prepare(task.train_prompts)
    trainer = Trainer(config, task.train_prompts, policy, objective, load_configured_sampler(config), suite)
    first, second = trainer.iterate(), trainer.iterate()
    spent = second["model_rows"] - first["model_rows"]
    # A sampler whose plans change costs other numbers of rows later.
    return float(second["seconds"] / (expected * spent / model_rows(config, rows, objective.needs)))


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
    own_forward, own_train = pace.unguided or (pace.forward_row, pace.train_row)
    of_data = config.updates_per_rollout * rows.data * (own_train + (data_passes(config, rows) - 1) * own_forward)
    drawn = rows.scored * pace.forward_row + (rows.rollout - rows.scored + rows.data_drawn) * pace.unscored_row
    return pace.correction * (drawn + trained + of_data + rows.images * pace.image)


def seconds_of_evaluations(config: RunConfig, pace: Pace, iterations: float | None, *, bases: float) -> float:
    """Computes the seconds of all evaluations of a run.

    Args:
        config: the configuration of the run.
        pace: the speed of this machine.
        iterations: the iterations of the run, 0 for an objective that trains nothing; None counts no evaluations along the
            training.
        bases: how often the base model is evaluated; runs of a comparison share these evaluations.
    """
    e, drawing = config.evaluation, Drawing(config.inference)
    finals = drawing.cost(1, "euler").model_rows  # an image of several candidates or particles is drawn and read as often
    seconds = _seconds_of_path_kl(PATHS, e.prompts, pace)
    if iterations == 0:
        finals, seconds = 0 if drawing.is_plain else finals, 0.0  # the base model's images serve, and no path differs
    seconds += (finals + bases) * e.prompts * e.images_per_prompt * pace.evaluated_image
    if e.every is None or iterations is None:
        return seconds
    prompts = len(validation_prompts(configured_task(config), e))
    once = prompts * e.validation_images * pace.evaluated_image
    times = -(-iterations // e.every) + bases
    return seconds + times * (once + _seconds_of_path_kl(curve.PATHS, prompts, pace))


def _seconds_of_path_kl(paths: int, prompts: int, pace: Pace) -> float:
    """Rollouts with the policy, whose rows the base model evaluates as well."""
    return max(paths, prompts) * (2 * PATH_STEPS - 1) * pace.forward_row


def seconds_of_a_figure() -> float:
    """Times the drawing of a figure with four panels, which is the unit of the time that plots and reports take."""

    def draw() -> None:
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(2, 2, figsize=(8, 6), layout="constrained")
            for axis in axes.flat:
                axis.plot([0, 1], [0, 1], label="line")
                axis.legend()
            figure.savefig(io.BytesIO(), format="png")
            plt.close(figure)

    return _seconds(draw, torch.device("cpu"))


def _seconds(work: Callable[[], Any], device: torch.device, calls: int = 2) -> float:
    """The seconds of the last of several calls, or of a first one that is not short: only short calls need a warm-up."""
    seconds = 0.0
    for _ in range(calls):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
        if seconds > SHORT:
            break
    return seconds
