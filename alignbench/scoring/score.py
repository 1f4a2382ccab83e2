"""Does the work of `eval`: evaluates a model or a folder of images as a run does, and writes the results."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from alignbench.config.run_config import RunConfig
from alignbench.evaluation.evaluate import Evaluation, MetricSuite, estimates, evaluate, evaluate_images, evaluation_prompts
from alignbench.figures import sheets
from alignbench.files.writing import claimed, fill
from alignbench.load import load_configured_backbone, threads_of
from alignbench.records.environment import environment, now
from alignbench.records.record import EvalProtocol, EvalRecord, ScoredMetric
from alignbench.tasks import Task, load_task
from alignbench.tasks.prompts import read_image_folder
from alignbench.training.checkpoint import judged_weights, policy_weights

Advance = Callable[[str], None]
"""Is told what happens next, for a progress display."""


def score_model(
    config: RunConfig,
    out: Path | None,
    *,
    run: Path | None = None,
    evals: Sequence[str] = (),
    settings: Mapping[str, dict[str, Any]] | None = None,
    advance: Advance = lambda what: None,
) -> EvalRecord:
    """Evaluates a backbone on the task's evaluation prompts, as a run with this configuration does.

    Args:
        config: the configuration, with the backbone, the task and the protocol.
        out: a new folder for `eval.json`, `evals.parquet` and a sheet of samples; None to write nothing.
        run: the folder of a run whose newest checkpoint is evaluated; None for the backbone as it is.
        evals: the names of the metrics; empty for those of the task.
        settings: metric -> settings that override those of the task.
        advance: is told what happens next.

    Raises:
        UserError: a name or setting is unknown, there is no checkpoint, there are too few prompts, or the folder exists
            already.
        RunError: a scorer failed.
    """
    with claimed(out):
        task = _task(config, evals, settings or {})
        prompts = evaluation_prompts(task, config.evaluation)
        weights = policy_weights(run / "checkpoints") if run else None
        suite = MetricSuite(task, config.scorer_timeout)
        advance("loading models")
        suite.prepare()
        suite.check_prompts(prompts)
        policy = load_configured_backbone(config)
        e = config.evaluation
        with judged_weights(policy, weights):
            evaluation = evaluate(policy, task, suite, e, micro_batch=config.micro_batch or 64, advance=advance)
        protocol = EvalProtocol(
            source="checkpoint" if run else "pipeline",
            path=str(run or config.backbone.name),
            iteration=weights.iteration if weights else None,
            task=task.name,
            prompts=len(evaluation.prompts),
            images=len(evaluation.images),
            steps=e.steps or policy.default_steps,
            guidance=policy.guidance,
            weights=weights.kind if weights else "raw",
            noise_seed=e.seed,
            evals=suite.describe(),
        )
        sheet = None if out is None else sheets.grid(evaluation.images, e.images_per_prompt)
        return _record(evaluation, protocol, environment(str(policy.device), threads_of(config)), out, sheet)


def score_images(
    folder: Path,
    prompts: Path,
    config: RunConfig,
    out: Path | None,
    *,
    evals: Sequence[str] = (),
    settings: Mapping[str, dict[str, Any]] | None = None,
    advance: Advance = lambda what: None,
) -> EvalRecord:
    """Evaluates images that were made elsewhere.

    Args:
        folder: the folder of the images.
        prompts: the file of their prompts; `read_image_folder` decides which prompt each image belongs to.
        config: the configuration, with the task whose metrics are used.
        out: a new folder for `eval.json` and `evals.parquet`; None to write nothing.
        evals: the names of the metrics; empty for those of the task.
        settings: metric -> settings that override those of the task.
        advance: is told what happens next.

    Raises:
        UserError: images and prompts do not fit together, an image cannot be opened, or a metric does not accept them.
        RunError: a scorer failed.
    """
    with claimed(out):
        task = _task(config, evals, settings or {})
        suite = MetricSuite(task, config.scorer_timeout)
        suite.require()
        advance("reading images")
        inputs = read_image_folder(folder, prompts)
        advance("loading models")
        suite.prepare()
        suite.check_prompts(inputs.prompts)
        evaluation = evaluate_images(inputs.images, None, inputs.prompts, inputs.owners, suite, advance=advance)
        protocol = EvalProtocol(
            source="images",
            path=str(folder),
            task=task.name,
            prompts=len(inputs.prompts),
            images=len(inputs.images),
            evals=suite.describe(),
        )
        return _record(evaluation, protocol, environment(config.device, threads_of(config)), out)


def _task(config: RunConfig, evals: Sequence[str], settings: Mapping[str, dict[str, Any]]) -> Task:
    """The configuration's task, with other metrics or settings if there are any."""
    task = load_task(config.task)
    if not evals and not settings:
        return task
    own = [choice.label or choice.eval for choice in [*task.config.reward, *task.config.judges]]
    return task.judged_by(task.choices(evals or own, settings))


def _record(
    evaluation: Evaluation,
    protocol: EvalProtocol,
    surroundings: dict[str, Any],
    out: Path | None,
    sheet: Image.Image | None = None,
) -> EvalRecord:
    """Makes the record of an evaluation, and writes it with its tables into a folder, if there is one."""
    directions, roles = evaluation.directions, evaluation.roles
    metrics = {
        name: ScoredMetric(**estimate.model_dump(), higher_is_better=directions[name], role=roles[name])
        for name, estimate in estimates(evaluation).items()
    }
    whole = evaluation.table[evaluation.table.metric.map(lambda m: roles[m] != "part")]
    record = EvalRecord(
        judged=now(),
        metrics=metrics,
        failed_scores=int(whole.value.isna().sum()),
        protocol=protocol,
        environment=surroundings,
    )

    def write(folder: Path) -> None:
        if sheet is not None:
            sheet.save(folder / "samples.png")
        evaluation.table.to_parquet(folder / "evals.parquet", index=False)
        (folder / "eval.json").write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")

    if out is not None:
        fill(out, write, last="eval.json")
    return record
