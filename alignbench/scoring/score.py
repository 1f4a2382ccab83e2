"""What `eval` does: judge a model or a folder of pictures, in the way that a run judges, and write down what was found."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from alignbench.config.run_config import RunConfig
from alignbench.evaluation.evaluate import Evaluation, MetricSuite, estimates, evaluate, evaluate_images, evaluation_prompts
from alignbench.figures import plots
from alignbench.files.writing import claimed, fill
from alignbench.load import load_configured_backbone, threads_of
from alignbench.records.environment import environment, now
from alignbench.records.record import EvalProtocol, EvalRecord, ScoredMetric
from alignbench.tasks import Task, load_task
from alignbench.tasks.prompts import read_pictures
from alignbench.training.checkpoint import judged_weights, policy_weights

Advance = Callable[[str], None]


def score_model(
    config: RunConfig,
    out: Path | None,
    *,
    run: Path | None = None,
    evals: Sequence[str] = (),
    settings: Mapping[str, dict[str, Any]] | None = None,
    advance: Advance = lambda what: None,
) -> EvalRecord:
    """MetricSuite a backbone on the task's evaluation prompts, as a run with this configuration does.

    Args:
        config: which backbone, task and protocol.
        out: a new folder for `eval.json`, `evals.parquet` and a sheet of samples; None to write nothing.
        run: the folder of a run whose newest checkpoint is judged; None for the backbone as it is.
        evals: names; the task's own where there are none.
        settings: of evals by name, over those of the task.

    Raises:
        UserError: an unknown name or setting, no checkpoint, too few prompts, or a folder that is taken.
        RunError: a scorer failed.
    """
    with claimed(out):
        task = _task(config, evals, settings or {})
        prompts = evaluation_prompts(task, config.evaluation)
        weights = policy_weights(run / "checkpoints") if run else None
        judges = MetricSuite(task, config.scorer_timeout)
        advance("loading models")
        judges.prepare()
        judges.check_prompts(prompts)
        policy = load_configured_backbone(config)
        e = config.evaluation
        with judged_weights(policy, weights):
            found = evaluate(policy, task, judges, e, micro_batch=config.micro_batch or 64, advance=advance)
        protocol = EvalProtocol(
            source="checkpoint" if run else "pipeline",
            path=str(run or config.backbone.name),
            iteration=weights.iteration if weights else None,
            task=task.name,
            prompts=len(found.prompts),
            pictures=len(found.images),
            steps=e.steps or policy.default_steps,
            guidance=policy.guidance,
            weights=weights.kind if weights else "raw",
            noise_seed=e.seed,
            evals=judges.describe(),
        )
        sheet = None if out is None else plots.grid(found.images, e.images_per_prompt)
        return _recorded(found, protocol, environment(str(policy.device), threads_of(config)), out, sheet)


def score_pictures(
    folder: Path,
    prompts: Path,
    config: RunConfig,
    out: Path | None,
    *,
    evals: Sequence[str] = (),
    settings: Mapping[str, dict[str, Any]] | None = None,
    advance: Advance = lambda what: None,
) -> EvalRecord:
    """MetricSuite pictures that were made elsewhere; `read_pictures` says which prompt each belongs to.

    Raises:
        UserError: pictures and prompts do not fit, one cannot be opened, or an eval cannot take them.
        RunError: a scorer failed.
    """
    with claimed(out):
        task = _task(config, evals, settings or {})
        judges = MetricSuite(task, config.scorer_timeout)
        judges.require()
        advance("reading pictures")
        pictures = read_pictures(folder, prompts)
        advance("loading models")
        judges.prepare()
        judges.check_prompts(pictures.prompts)
        found = evaluate_images(pictures.images, None, pictures.prompts, pictures.owners, judges, advance=advance)
        protocol = EvalProtocol(
            source="images",
            path=str(folder),
            task=task.name,
            prompts=len(pictures.prompts),
            pictures=len(pictures.images),
            evals=judges.describe(),
        )
        return _recorded(found, protocol, environment(config.device, threads_of(config)), out)


def _task(config: RunConfig, evals: Sequence[str], settings: Mapping[str, dict[str, Any]]) -> Task:
    task = load_task(config.task)
    if not evals and not settings:
        return task
    own = [choice.label or choice.eval for choice in [*task.config.reward, *task.config.judges]]
    return task.judged_by(task.choices(evals or own, settings))


def _recorded(
    found: Evaluation,
    protocol: EvalProtocol,
    surroundings: dict[str, Any],
    out: Path | None,
    sheet: Image.Image | None = None,
) -> EvalRecord:
    metrics = {
        name: ScoredMetric(**estimate.model_dump(), higher_is_better=found.directions[name], role=found.roles[name])
        for name, estimate in estimates(found).items()
    }
    whole = found.table[found.table.metric.map(lambda m: found.roles[m] != "part")]
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
        found.table.to_parquet(folder / "evals.parquet", index=False)
        (folder / "eval.json").write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")

    if out is not None:
        fill(out, write, last="eval.json")
    return record
