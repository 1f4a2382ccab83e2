"""The record of a run: a typed, versioned `result.json`."""

import math
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from alignbench.errors import UserError, redacted
from alignbench.files.escaping import visible
from alignbench.files.reading import Kind, read_record, read_table
from alignbench.files.writing import write_atomically
from alignbench.settings import first_problem
from alignbench.statistics import Interval

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
METRICS, EVALS = "metrics.parquet", "evals.parquet"
METRICS_COLUMNS: dict[str, Kind] = {"iteration": "whole", "model_rows": "number", "reward": "number", "seconds": "number"}
EVALS_COLUMNS: dict[str, Kind] = {
    "prompt_index": "whole",
    "prompt": "text",
    "image": "whole",
    "metric": "text",
    "value": "number",
    "phase": "text",
}
"""What every such table has; of metrics all other columns are numbers too."""
CONFIG, RESULT = "config.yaml", "result.json"
_SURROGATE, _UNPAIRED = re.compile("[\ud800-\udfff]"), re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""What stands for a byte that is no text (U+DC80 to U+DCFF), and what stands for nothing."""
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "easyocr", "rapidocr", "numpy", "scipy")


def _known(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_known)]
"""A finite number; None, and null in the file, for what is none."""


def _as_text(value: Any) -> Any:
    """JSON holds no bytes: names of files that are not text to this process are decoded as UTF-8, as far as they can be."""
    if isinstance(value, str):
        return value if value.isascii() or not _SURROGATE.search(value) else _decoded(value)
    if isinstance(value, dict):
        return {_as_text(key): _as_text(item) for key, item in value.items()}
    return [_as_text(item) for item in value] if isinstance(value, list | tuple) else value


def _decoded(text: str) -> str:
    return text.encode("utf-8", "surrogateescape" if not _UNPAIRED.search(text) else "replace").decode("utf-8", "replace")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, data: Any) -> Any:
        return _as_text(data)


class Estimate(_Part):
    """A mean over n prompts with its 95 % interval; null where it cannot be told."""

    value: Number
    lower: Number
    upper: Number
    n: int

    @classmethod
    def of(cls, interval: Interval) -> "Estimate":
        return cls(value=interval.value, lower=interval.lower, upper=interval.upper, n=interval.n)


class MetricRecord(_Part):
    """A metric of the base model, of the trained one, and their paired difference."""

    base: Estimate
    final: Estimate
    difference: Estimate
    higher_is_better: bool | None
    """null where neither direction is better."""
    role: str
    """`reward` (trained on), `judge`, or `part` of another metric."""
    p_rise: Number = None
    """Of the one-sided t test over prompts that the difference is above 0, uncorrected; 1 minus it is that of being below.
    null where it cannot be told."""


class RunInfo(_Part):
    id: str
    objective: str
    sampler: str
    backbone: str
    task: str
    seed: int
    preset: str
    started: str
    iterations: int
    """Iterations that were done."""
    status: str
    """`complete` or `budget spent`; a run that ended otherwise has no record."""


class Budget(_Part):
    """What a run spent on training; evaluation is apart."""

    model_rows_rollout: int = 0
    model_rows_train: int = 0
    """Rows evaluated in training passes, those of the reference and of gradient caching included."""
    replay_rows: int = 0
    """Distinct model inputs of training passes."""
    decoded: int = 0
    """Pictures decoded for the rewards."""
    reward_calls: int = 0
    """Of all rewards together, a picture each."""
    failed_scores: int = 0
    optimizer_steps: int = 0
    seconds: float = 0.0
    seconds_by_phase: dict[str, float] = {}
    seconds_evaluation: float = 0.0
    peak_memory_bytes: int = 0
    micro_batch: int | None = None
    """Rows in one model call at the end of the run; null for all."""
    micro_batch_halvings: int = 0
    """How often memory ran out, and the rows of a model call were halved."""


class Protocol(_Part):
    """How base and final model were compared."""

    prompts: int
    images_per_prompt: int = Field(ge=1)
    steps: int
    guidance: float
    weights: str
    """`raw`, or `ema`."""
    noise_seed: int
    evals: dict[str, dict[str, Any]]
    """Metric -> model, device and settings."""


class _Labelled(BaseModel):
    name: str | None = None
    label: str | None = None


class _ReadOfConfig(BaseModel):
    """What is read of a run's configuration, whose other keys are those of its version."""

    objective: _Labelled = _Labelled()
    sampler: _Labelled = _Labelled()
    budget: dict[str, Any] | None = None


def _readable(config: dict[str, Any]) -> dict[str, Any]:
    _ReadOfConfig.model_validate(config)
    return config


class Result(_Part):
    """`result.json`."""

    schema_version: int = SCHEMA_VERSION
    run: RunInfo
    budget: Budget
    metrics: dict[str, MetricRecord]
    alarms: list[str]
    checks: dict[str, Number]
    """`first_update_ratio_abs_dev_max`: how far the importance ratio was from 1 on the first update after a rollout."""
    protocol: Protocol
    environment: dict[str, Any]
    config: Annotated[dict[str, Any], AfterValidator(_readable)]
    task: dict[str, str] = {}
    """Part of the task (training prompts, evaluation prompts, reward, judges, pairs) -> SHA-256 of what is in it."""

    @property
    def pair(self) -> tuple[str, str]:
        """What the objective and the sampler are called: their labels, else their names."""
        objective, sampler = (self.config.get(kind, {}).get("label") for kind in ("objective", "sampler"))
        return objective or self.run.objective, sampler or self.run.sampler


class ScoredMetric(Estimate):
    """A metric of one set of pictures."""

    higher_is_better: bool | None
    role: str
    """`reward`, `judge`, or `part` of another metric."""


class EvalProtocol(_Part):
    """What was judged, and how; null for what is not known of pictures made elsewhere."""

    source: Literal["pipeline", "checkpoint", "images"]
    path: str
    iteration: int | None = None
    """Of the checkpoint."""
    task: str
    prompts: int
    pictures: int
    steps: int | None = None
    guidance: float | None = None
    weights: str | None = None
    """`raw`, or `ema`."""
    noise_seed: int | None = None
    evals: dict[str, dict[str, Any]]
    """Metric -> model, device and settings."""


class EvalRecord(_Part):
    """`eval.json`: what `alignbench eval` found."""

    schema_version: int = SCHEMA_VERSION
    judged: str
    metrics: dict[str, ScoredMetric]
    failed_scores: int
    """Scores that are missing because a scorer gave up on an item."""
    protocol: EvalProtocol
    environment: dict[str, Any]


def read_result(folder: Path) -> Result:
    """The record of a run's folder.

    Raises:
        UserError: there is none, it was written by another version of the schema, or it has been altered beyond reading.
    """
    file = folder / RESULT
    data = read_record(file)
    if data.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{file} has schema version {data.get('schema_version')!r}; this alignbench reads {SCHEMA_VERSION}")
    try:
        return Result.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{file} is not a record of a run: {first_problem(error, 'the record')}") from None


def visible_record(result: Result) -> Result:
    """The record with every text in it as reports show it."""
    return Result.model_validate(_visible(result.model_dump()))


def _visible(data: Any) -> Any:
    if isinstance(data, dict):
        return {visible(str(key)): _visible(value) for key, value in data.items()}
    if isinstance(data, list):
        return list(map(_visible, data))
    return visible(data) if isinstance(data, str) else data


def read_metrics(folder: Path) -> "pd.DataFrame | None":
    """A run's `metrics.parquet`, a row an iteration, or None where there is none: its numbers, and where its trees split.

    Raises:
        UserError: it is no such table.
    """
    import numpy as np
    import pandas as pd

    file = folder / METRICS
    if not os.path.lexists(file):
        return None
    table = read_table(file, METRICS_COLUMNS, {"splits": "text"})
    table = table[[c for c in table.columns if c == "splits" or pd.api.types.is_numeric_dtype(table[c])]]
    if table["iteration"].duplicated().any():
        raise UserError(f"cannot read {file}: two rows are of the same iteration")
    if not np.isfinite(table[["model_rows", "seconds"]].to_numpy(dtype=np.float64)).all():
        raise UserError(f"cannot read {file}: model_rows and seconds must be finite")
    return table


def read_evals(folder: Path) -> "pd.DataFrame | None":
    """A run's `evals.parquet`, a row an image, metric and phase (`base` or `final`), or None where there is none.

    Raises:
        UserError: it is no such table.
    """
    import numpy as np

    file = folder / EVALS
    if not os.path.lexists(file):
        return None
    table = read_table(file, EVALS_COLUMNS)[list(EVALS_COLUMNS)]
    if table.duplicated(["phase", "metric", "prompt_index", "image"]).any():
        raise UserError(f"cannot read {file}: two rows are of the same phase, metric, prompt_index and image")
    if table.drop_duplicates(["prompt_index", "prompt"])["prompt_index"].duplicated().any():
        raise UserError(f"cannot read {file}: two prompts have the same prompt_index")
    if np.isinf(table["value"].to_numpy(dtype=np.float64)).any():
        raise UserError(f"cannot read {file}: a value is infinite")
    return table


def write_result(result: Result, folder: Path) -> None:
    """Writes the record into a run's folder."""
    text = result.model_dump_json(indent=2) + "\n"
    write_atomically(folder / RESULT, lambda p: p.write_text(text, encoding="utf-8"))


def environment(device: str, threads: int, processes: int = 1) -> dict[str, Any]:
    """What the numbers depend on besides the config."""
    libraries = {name: _version(name) for name in LIBRARIES}
    return {
        "python": platform.python_version(),
        "torch": libraries.pop("torch"),
        "alignbench": _version("alignbench"),
        "git_revision": git_revision(),
        "device": device,
        "processor": platform.processor() or platform.machine(),
        "threads": threads,
        "processes": processes,
        "platform": platform.platform(),
        "libraries": libraries,
        "command": command(),
    }


def command() -> str | None:
    """The command line of this process, ready for a shell; None where it is not alignbench's, as in a notebook."""
    program = Path(sys.argv[0])
    ours = program.name == "alignbench" or program == Path(__file__).parents[1] / "__main__.py"
    if not ours:
        return None
    return str(_as_text(shlex.join(["alignbench", *map(redacted, sys.argv[1:])])))


def git_revision() -> str | None:
    """The commit of the checkout that alignbench runs from, `-dirty` with local changes; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        revision = _git(folder, "rev-parse", "HEAD")
        return revision + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
