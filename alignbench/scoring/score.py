"""Does the work of `eval`: evaluates a model or a folder of images as a run does, and writes the results."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from alignbench.backbone import Backbone, device_named
from alignbench.config.run_config import RunConfig
from alignbench.errors import UserError
from alignbench.evaluation.evaluate import Evaluation, MetricSuite, estimates, evaluate, evaluate_images, evaluation_prompts
from alignbench.figures import sheets
from alignbench.files.writing import claimed, fill
from alignbench.inference.drawing import Drawing
from alignbench.load import load_configured_backbone, threads_of
from alignbench.records.environment import environment, now
from alignbench.records.record import EvalProtocol, EvalRecord, ScoredMetric
from alignbench.tasks import Task, check_backbone, load_task, trained_task
from alignbench.tasks.prompts import read_image_folder
from alignbench.training.checkpoint import judged_weights, policy_weights

Advance = Callable[[str], None]
"""Called with what happens next, for a progress display."""


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
        advance: called with what happens next.

    Raises:
        UserError: a name or setting is unknown, there is no checkpoint, there are too few prompts, or the folder exists
            already.
        RunError: a scorer failed.
    """
    with claimed(out):
        return Loaded(evals, settings or {}, advance).score(config, run, out)[0]


class Loaded:
    """What evaluations of several models or protocols share: the metrics of a task, and the model that was loaded last."""

    def __init__(self, evals: Sequence[str], settings: Mapping[str, dict[str, Any]], advance: Advance) -> None:
        self.evals, self.settings, self.advance = evals, settings, advance
        self._suites: dict[str, tuple[Task, MetricSuite]] = {}
        self._rewards: dict[str, MetricSuite] = {}
        self._model: tuple[str, Backbone] | None = None

    def score(self, config: RunConfig, run: Path | None, out: Path | None) -> tuple[EvalRecord, Evaluation]:
        """Evaluates one model by one protocol, with the arguments and errors of `score_model`; returns record and values."""
        weights = policy_weights(run / "checkpoints") if run else None
        if run is None and config.inference.method == "interpolation":
            raise UserError("inference.method=interpolation needs a trained model; evaluate a run with --checkpoint")
        task, suite = self._task(config)
        drawing = self._drawing(config, suite)
        policy = self._policy(config)
        e = config.evaluation
        with judged_weights(policy, weights):
            evaluation = evaluate(
                policy, task, suite, e, micro_batch=config.micro_batch or 64, drawing=drawing, advance=self.advance
            )
        cost = evaluation.cost
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
            solver=e.solver,
            inference=None if drawing.is_plain else config.inference.in_use(),
            model_rows_per_image=cost.model_rows if cost else None,
            reward_calls_per_image=cost.reward_calls if cost else None,
            evals=suite.describe(),
        )
        sheet = None if out is None else sheets.grid(evaluation.images, e.images_per_prompt)
        surroundings = environment(str(policy.device), threads_of(config))
        return _record(evaluation, protocol, surroundings, out, sheet), evaluation

    def _task(self, config: RunConfig) -> tuple[Task, MetricSuite]:
        task = _task(config, self.evals, self.settings)
        check_backbone(task, config.backbone.name)
        key = json.dumps([config.task, config.evals])
        if key not in self._suites:
            prompts = evaluation_prompts(task, config.evaluation)
            suite = MetricSuite(task, config.scorer_timeout)
            self.advance("loading models")
            suite.prepare()
            suite.check_prompts(prompts)
            self._suites[key] = task, suite
        return self._suites[key]

    def _drawing(self, config: RunConfig, suite: MetricSuite) -> Drawing:
        """The method of drawing; one that chooses images does so by the reward that a run with this configuration trains on."""
        if config.inference.method not in ("best_of_n", "fk"):
            return Drawing(config.inference)
        if self.evals or self.settings or config.reward or config.scorer_url:
            key = json.dumps([config.task, config.evals, config.reward, config.scorer_url])
            if key not in self._rewards:
                self._rewards[key] = MetricSuite(trained_task(config).without_judges(), config.scorer_timeout)
                self._rewards[key].prepare()
            suite = self._rewards[key]
        return Drawing(config.inference, suite.reward(normalise=config.normalise_rewards))

    def _policy(self, config: RunConfig) -> Backbone:
        key = json.dumps(config.model_dump(mode="json", include={"backbone", "guidance", "device", "threads"}), sort_keys=True)
        if self._model is None or self._model[0] != key:
            self._model = None  # its memory is free before another model is loaded
            self._model = key, load_configured_backbone(config)
        return self._model[1]


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
        advance: called with what happens next.

    Raises:
        UserError: images and prompts do not fit together, an image cannot be opened, a metric does not accept them, or the
            device is not there.
        RunError: a scorer failed.
    """
    device = str(device_named(config.device))
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
        return _record(evaluation, protocol, environment(device, threads_of(config)), out)


def _task(config: RunConfig, evals: Sequence[str], settings: Mapping[str, dict[str, Any]]) -> Task:
    """The configuration's task, with other metrics or settings if there are any."""
    task = load_task(config.task)
    own = [choice.title for choice in [*task.config.reward, *task.config.judges]]
    task = task.with_eval_settings({name: of_run for name, of_run in config.evals.items() if name in own})
    if not evals and not settings:
        return task
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
