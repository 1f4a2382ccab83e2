"""The record of a run, `result.json`, and that of `eval`, `eval.json`."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, Field

from alignbench.files.escaping import visible
from alignbench.records.base import Document, Number, Record
from alignbench.statistics import Interval

CONFIG, RESULT = "config.yaml", "result.json"


class Estimate(Record):
    """A mean over n prompts with its 95 % interval; null if there is no value or no bound."""

    value: Number
    lower: Number
    upper: Number
    n: int

    @classmethod
    def of(cls, interval: Interval) -> "Estimate":
        """Makes the estimate of an interval."""
        return cls(value=interval.value, lower=interval.lower, upper=interval.upper, n=interval.n)


class MetricRecord(Record):
    """A metric of the base model, of the trained one, and their paired difference."""

    base: Estimate
    final: Estimate
    difference: Estimate
    higher_is_better: bool | None
    """Whether a higher value is better; null where neither direction is."""
    role: str
    """`reward` for the metrics of an eval that is trained on, `judge` for those of others, or `part` of another metric."""
    p_rise: Number = None
    """p of the one-sided t test over prompts that the difference is above 0, uncorrected; 1 - p is that of being below 0. Null
    if there is no such test."""


class RunInfo(Record):
    """What was run, and how it ended."""

    id: str
    """The name of the run's folder."""
    objective: str
    sampler: str
    backbone: str
    task: str
    seed: int
    preset: str
    started: str
    """Time at which the training began, in UTC."""
    iterations: int
    """Number of iterations that were done."""
    status: str
    """`complete`, `budget spent`, or `stopped` by a rule; a run that ended otherwise has no record."""


class Budget(Record):
    """What a run used for its training; evaluation is counted apart."""

    model_rows_rollout: int = 0
    """Model rows of rollouts."""
    model_rows_train: int = 0
    """Model rows of training passes, including those of the reference and of gradient caching."""
    replay_rows: int = 0
    """Distinct model inputs of training passes."""
    decoded: int = 0
    """Images decoded for the rewards."""
    reward_calls: int = 0
    """Images scored, summed over all rewards."""
    failed_scores: int = 0
    """Number of scores that were NaN, summed over all rewards."""
    optimizer_steps: int = 0
    """Number of updates of the weights."""
    seconds: float = 0.0
    """Wall-clock time of all iterations."""
    seconds_by_phase: dict[str, float] = Field(default_factory=dict)
    """Part of an iteration (`rollout`, `decode`, `score`, `train`) -> its seconds; parts can overlap."""
    seconds_evaluation: float = 0.0
    """Wall-clock time of evaluations before, along and after the training."""
    peak_memory_bytes: int = 0
    """Peak of CUDA's allocator, or of the process's memory on a CPU; the largest of all ranks."""
    micro_batch: int | None = None
    """Rows in one model call at the end of the run; null if one call takes all rows."""
    micro_batch_halvings: int = 0
    """How often memory ran out and the rows of a model call were halved."""


class StopRecord(Record):
    """The stop rule that ended a training, and why."""

    rule: str
    """`patience`, `diversity_floor` or `path_kl`."""
    iteration: int
    """The evaluation that broke the rule."""
    metric: str
    """The metric that the rule watches."""
    value: Number
    """The mean over validation prompts at that evaluation."""
    limit: Number
    """The limit that the value broke; for `patience`, the best value so far."""
    names: int
    """The evaluation that the rule selects: the best one for `patience`, otherwise the last one within the limit."""
    restored: bool
    """Whether the run returned to the weights of that evaluation. If so, the record's metrics are those of these weights."""

    @property
    def sentence(self) -> str:
        """The reason as a clause, for messages and reports."""
        at = f"at iteration {self.iteration}, where {self.metric} is {_short(self.value)}"
        reason = {
            "patience": f"its best was {_short(self.limit)} at iteration {self.names}",
            "diversity_floor": f"its floor is {_short(self.limit)}",
        }.get(self.rule, f"its limit is {_short(self.limit)}")
        after = f"; the weights are those of iteration {self.names}" if self.restored else ""
        return f"stopped by stop.{self.rule} {at} ({reason}){after}"


class OnsetRecord(Record):
    """Where a metric begins to fall along a training while the trained reward still rises, on validation prompts."""

    reward: str
    """The trained reward."""
    metric: str
    """The independent metric."""
    iteration: int
    """The evaluation at which the metric is best."""
    lower: int
    """Lower end of the 95 % interval of that evaluation over prompts."""
    upper: int
    """Upper end of this interval."""
    fall: Estimate
    """How much worse the metric is at the end. It is measured on other prompts than those that chose the best evaluation."""
    over_optimised: bool
    """Whether the fall is significant, corrected by Holm's method for the number of metrics, while the reward rises."""

    @property
    def sentence(self) -> str:
        """The finding as a sentence, for messages and reports."""
        since = f"iteration {self.iteration}" + (f" ({self.lower} to {self.upper})" if self.lower < self.upper else "")
        interval = f"{_short(self.fall.lower)} to {_short(self.fall.upper)}"
        worse = f"{_short(self.fall.value)} ({interval})"
        return f"{self.metric} is best at {since} and then gets worse by {worse}, while {self.reward} goes on rising"


def _short(number: float | None) -> str:
    return "unknown" if number is None else f"{number:.4g}"


class GradientRecord(Record):
    """What each part of the loss, and each of its inputs, contributed to the gradient of the first updates."""

    updates: int
    """Number of updates that were measured; 0 if none had a gradient."""
    parts: dict[str, Number]
    """Additive part of the loss -> its share of the gradient: |d part / d terms|, as a share of the sum over parts."""
    terms: dict[str, Number]
    """Term -> |d loss / d term|, as a share of the sum over terms."""
    inactive: dict[str, str]
    """Setting, part, term or model that cannot act in this configuration -> the reason."""


class Protocol(Record):
    """How base and trained model were evaluated."""

    prompts: int
    """Number of evaluation prompts."""
    images_per_prompt: int = Field(ge=1)
    """Number of images of each prompt and model."""
    steps: int
    """Number of denoising steps."""
    guidance: float
    """Guidance scale; 1 is no guidance."""
    weights: str
    """The weights that were evaluated: `raw`, or `ema` for their moving average."""
    noise_seed: int
    """Seed of the initial noise."""
    solver: str = "euler"
    """Solver of the denoising steps, as `evaluation.solver`."""
    evals: dict[str, dict[str, Any]]
    """For each metric, its model, device and settings."""


class InferenceRecord(Record):
    """What it took to draw one image of the final evaluation, and how it was drawn."""

    method: str
    """`ode`, `best_of_n`, `fk` or `interpolation`; its settings are in the configuration."""
    model_rows_per_image: int
    """Model rows, including those of candidates or particles that were not chosen."""
    base_model_rows_per_image: int
    """The same for the base model, which is drawn without the method."""
    reward_calls_per_image: int
    """Scores of candidates or particles; those of the evaluation itself do not count."""
    kl_bound: Number = None
    """Bound of the KL divergence, in nats, of the images' distribution to that of the model that drew the candidates: for best
    of n it is log n - (n - 1) / n. null where none is known."""


class _Labelled(BaseModel):
    name: str | None = None
    label: str | None = None


class _ReadOfConfig(BaseModel):
    """The keys of a run's configuration that reports read. Other keys may be those of another version."""

    objective: _Labelled = _Labelled()
    sampler: _Labelled = _Labelled()
    budget: dict[str, Any] | None = None


def _readable(config: dict[str, Any]) -> dict[str, Any]:
    _ReadOfConfig.model_validate(config)
    return config


class Result(Document):
    """`result.json`: what a run did, what it used, and how its model changed."""

    KIND: ClassVar[str] = "record of a run"

    run: RunInfo
    budget: Budget
    metrics: dict[str, MetricRecord]
    alarms: list[str]
    checks: dict[str, Number]
    """`first_update_ratio_abs_dev_max`: the largest |ratio - 1| on the first update after a rollout."""
    protocol: Protocol
    environment: dict[str, Any]
    config: Annotated[dict[str, Any], AfterValidator(_readable)]
    inference: InferenceRecord | None = None
    """null in records of older versions, which drew images from the model as it is."""
    stop: StopRecord | None = None
    """The stop rule that ended the training; null if none did."""
    onsets: list[OnsetRecord] = Field(default_factory=list)
    """One entry for each trained reward and independent metric; empty without evaluations along the training."""
    gradient: GradientRecord | None = None
    """Null without training, and in records of older versions."""
    task: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of each part of the task: training prompts, evaluation prompts, reward, judges, pairs."""

    @property
    def task_content(self) -> dict[str, str]:
        """The parts of `task` that all methods share; fixed pairs are one method's own."""
        return {part: digest for part, digest in self.task.items() if part != "pairs"}

    @property
    def pair(self) -> tuple[str, str]:
        """The labels of the objective and of the sampler; without a label, the name."""
        objective, sampler = (self.config.get(kind, {}).get("label") for kind in ("objective", "sampler"))
        return objective or self.run.objective, sampler or self.run.sampler


class ScoredMetric(Estimate):
    """A metric of one set of images."""

    higher_is_better: bool | None
    role: str
    """`reward`, `judge`, or `part` of another metric."""


class EvalProtocol(Record):
    """What was evaluated, and how. Fields that are unknown for existing images are null."""

    source: Literal["pipeline", "checkpoint", "images"]
    """What was evaluated: a model folder or backbone, a checkpoint of a run, or existing images."""
    path: str
    """Where it is; for a backbone, its name."""
    iteration: int | None = None
    """The iteration of the checkpoint."""
    task: str
    prompts: int
    """Number of prompts."""
    images: int = Field(validation_alias=AliasChoices("images", "pictures"))
    """Number of images; earlier records call it `pictures`."""
    steps: int | None = None
    """Number of denoising steps."""
    guidance: float | None = None
    """Guidance scale; 1 is no guidance."""
    weights: str | None = None
    """The weights that were evaluated: `raw`, or `ema` for their moving average."""
    noise_seed: int | None = None
    """Seed of the initial noise."""
    solver: str | None = None
    """Solver of the denoising steps, as `evaluation.solver`."""
    inference: dict[str, Any] | None = None
    """The method by which images were drawn, with its settings; null for the model as it is."""
    model_rows_per_image: int | None = None
    """Model rows, including those of candidates or particles that were not chosen."""
    reward_calls_per_image: int | None = None
    """Scores of candidates or particles; those of the evaluation itself do not count."""
    evals: dict[str, dict[str, Any]]
    """For each metric, its model, device and settings."""


class EvalRecord(Document):
    """`eval.json`: the metrics of one model or of a folder of images."""

    KIND: ClassVar[str] = "record of an evaluation"

    judged: str
    """Time of the evaluation, in UTC."""
    metrics: dict[str, ScoredMetric]
    failed_scores: int
    """Number of scores that are NaN because a scorer could not score an item."""
    protocol: EvalProtocol
    environment: dict[str, Any]


def read_result(folder: Path) -> Result:
    """Reads the record of a run's folder.

    Raises:
        UserError: there is no record, it has another schema version, or it is not a valid record.
    """
    return Result.read(folder / RESULT)


def write_result(result: Result, folder: Path) -> None:
    """Writes the record into a run's folder."""
    result.write(folder / RESULT)


def visible_record(result: Result) -> Result:
    """Returns the record with every text in it escaped as reports show it (`visible`)."""
    return Result.model_validate(_visible(result.model_dump()))


def _visible(data: Any) -> Any:
    if isinstance(data, dict):
        return {visible(str(key)): _visible(value) for key, value in data.items()}
    if isinstance(data, list):
        return list(map(_visible, data))
    return visible(data) if isinstance(data, str) else data
