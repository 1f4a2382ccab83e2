"""The configuration of a run. It is strict, built from layers, and written in full into the run's folder.

Later layers override earlier ones: defaults < preset < config file < command-line options < `--set dotted.key=value`.

A preset has a part `common`, and parts for single names under `tasks`, `backbones`, `samplers` and `objectives`. The parts of
the chosen names apply in this order. A part can contain further parts for combinations of names
(`backbones.flux.objectives.grpo`), which override all parts for a single name. A preset that `extends` another one overrides
all parts of it.

A part of a backbone or objective may choose the sampler that is used by default, and a part of a backbone may choose the
objective and the task. A local diffusers folder has the parts of its family, such as sd3 or flux.
"""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from alignbench.backbones import families
from alignbench.config.inference import InferenceConfig
from alignbench.config.keepers import KeepersConfig
from alignbench.config.suggestions import with_whole_path
from alignbench.errors import UnknownKeyError, UserError, did_you_mean
from alignbench.files.paths import absolute, current_folder, local_path, placed
from alignbench.files.yaml_files import parse, parse_value, read_yaml, to_yaml
from alignbench.settings import Device, ServiceURL, Settings, validate

PLUGINS = ("objective", "sampler", "backbone")
"""Keys whose value is the name of a plug-in with its settings."""

RESULT_NEUTRAL_KEYS = (
    *("save_images", "checkpoint_every", "checkpoints_kept", "best_window", "best_by", "micro_batch"),
    *("scorer_timeout", "trackers", "sharded", "scorer_token_file"),
)
"""Keys that do not change the numbers of a run, beyond rounding. A resumed run may have other values of them."""
ABOUT_PRESETS = ("extends", "common")
"""Keys of a preset that are no settings of a run."""
PATHS = ("pairs", "scorer_token_file")
"""Keys whose value is the path of a file."""
FORMER_NAMES = {"pictures": "save_images"}
"""Renamed keys, from the former name to the present one. Configurations and records of older versions are read with them; see
`with_present_names`."""
Tracker = Literal["tensorboard", "wandb"]

Model = TypeVar("Model", bound=BaseModel)


class Plugin(Settings):
    """The name of a plug-in and its own settings, which the plug-in's class validates."""

    name: str
    label: str | None = Field(None, pattern=r"^[\w.+-]+(\([\w.+=,-]+\))?$")
    """Name in tables and plots, so that one plug-in can be compared under several settings. Null uses the plug-in's name. A
    sweep adds its values in parentheses, such as `tmpo(beta=0.5)`."""
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.label or self.name


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Settings):
    """Settings of the optimizer, AdamW."""

    lr: float = Field(1e-4, gt=0)
    """Learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of AdamW's moving averages of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """Constant that AdamW adds to the root of the average squared gradient."""
    weight_decay: float = Field(1e-4, ge=0)
    """Decoupled weight decay: each update multiplies weights by 1 - lr * weight_decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients with a larger norm are scaled down to this norm."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate schedule: constant, or cosine, which falls to a tenth of `lr` over the run."""


class EMAConfig(Settings):
    """Exponential moving average of the trained weights, with decay min((1 + n) / (10 + n), `decay`) after optimizer step n."""

    decay: float = Field(0.9, gt=0, lt=1)
    """Decay of the average after enough updates: the share of the old average that each update keeps."""
    every: int = Field(8, ge=1)
    """Number of optimizer steps between two updates of the average."""


class EvaluationConfig(Settings):
    """How base and trained model are compared: with the same prompts, the same initial noise and deterministic sampling."""

    prompts: int = Field(64, ge=1)
    """Number of the task's evaluation prompts; the first ones are used."""
    images_per_prompt: int = Field(4, ge=2)
    """Number of images per prompt. Diversity needs at least two."""
    steps: int | None = Field(None, ge=1)
    """Number of ODE steps. Null uses the backbone's default."""
    solver: Literal["euler", "heun", "ab2", "sde", "memoryless"] = "euler"
    """How images are drawn: euler, the ODE by Euler's method; heun and ab2, the ODE by a method of second order, heun with two
    model evaluations per step and ab2 (Adams-Bashforth) with one; sde (eta 0.7) and memoryless, with noise in each step by that
    rule."""
    seed: int = 12345
    """Seed of the evaluation noise. It is separate from the run's seed, so that all runs are evaluated on the same noise."""
    every: int | None = Field(None, ge=1)
    """Iterations between two evaluations along the training (`curve.parquet`), on the task's validation prompts; null for none.
    The numbers of the training do not depend on it."""
    validation_prompts: int | None = Field(None, ge=1)
    """How many of the task's validation prompts, from the first on; 12, or all if these are fewer, where it is null."""
    validation_images: int = Field(8, ge=2)
    """Images of each validation prompt."""


Times = Literal["schedule", "logit_normal", "uniform", "steps"]
"""How the sigmas of noised final samples are drawn; see `alignbench.rollouts.terms.denoising_noise`."""


class ElboConfig(Settings):
    """How the log-likelihood of a final image is estimated; see `alignbench.rollouts.elbo`."""

    draws: int = Field(4, ge=1)
    """Number of pairs of a sigma and noise for each image. Each of them costs model rows in training."""
    weight: Literal["adaptive", "uniform", "image", "exact"] = "adaptive"
    """Weight of the squared error at a sigma. adaptive: sigma over the behaviour policy's mean absolute error. uniform: 1.
    image: sigma^2, the error of the predicted image. exact: (1 - sigma) / sigma, which gives a log-density for `times:
    uniform`."""
    times: Times = "steps"
    """How sigmas are drawn. steps: from the steps of the rollout, each of them once before any is repeated. schedule: from a
    logit-normal distribution, shifted as the model's own schedule is. logit_normal: without that shift. uniform: evenly between
    0 and 1."""
    shared: bool = True
    """Whether all images of a prompt share their pairs, so that they differ in nothing but the images."""


class BudgetConfig(Settings):
    """Limits that end a run before its last iteration. The iteration that reaches a limit is completed."""

    model_rows: int | None = Field(None, ge=1)
    """Limit on model evaluations in rollouts and training together."""
    reward_calls: int | None = Field(None, ge=1)
    """Limit on scores: images times rewards."""
    seconds: float | None = Field(None, gt=0)
    """Limit on seconds of training; evaluation does not count."""


class StopConfig(Settings):
    """Rules that end a training early. They read the evaluations along the training, so they need `evaluation.every`."""

    patience: int | None = Field(None, ge=1)
    """Number of evaluations in a row without a new best mean of `metric` after which the training ends; null for no limit."""
    metric: str | None = None
    """Metric that `patience` follows. One that is not trained on shows over-optimisation; the trained reward does not."""
    diversity_metric: str | None = None
    """Metric of diversity that `diversity_floor` limits."""
    diversity_floor: float | None = Field(None, gt=0, lt=1)
    """Share of the base model's `diversity_metric`; the training ends at the first evaluation that is below it."""
    path_kl: float | None = Field(None, gt=0)
    """Largest KL divergence from the base model over denoising paths, in nats (the metric `path_kl`); the training ends at the
    first evaluation above it."""
    restore: bool = False
    """Whether a run that a rule ended returns to the weights that the rule names: those of the best evaluation for `patience`,
    and of the last evaluation within the limit for the other rules. A checkpoint is then written at each evaluation."""

    @property
    def is_on(self) -> bool:
        """Whether there is any rule."""
        return any(rule is not None for rule in (self.patience, self.diversity_floor, self.path_kl))

    @model_validator(mode="after")
    def _complete(self) -> "StopConfig":
        for rule, of in (("patience", "metric"), ("diversity_floor", "diversity_metric")):
            if (getattr(self, rule) is None) != (getattr(self, of) is None):
                given, missing = (of, rule) if getattr(self, rule) is None else (rule, of)
                raise ValueError(f"stop.{given} needs stop.{missing} as well")
        if self.restore and not self.is_on:
            raise ValueError("stop.restore needs a rule: set stop.patience, .diversity_floor or .path_kl")
        return self


class RunConfig(Settings):
    """Everything that determines a run."""

    objective: Plugin = Plugin(name="tmpo")
    """Name of the objective. Its settings follow this key; see `show objective NAME`."""
    sampler: Plugin = Plugin(name="dynamic_tree")
    """Name of the rollout sampler. Its settings follow this key; see `show sampler NAME`."""
    backbone: Plugin = Plugin(name="tiny")
    """Name of the backbone, or a local diffusers folder. Its settings follow this key; see `show backbone NAME`."""
    task: str = "ocr"
    """Name of a task that ships, or path of a task's YAML file."""
    scorer_url: ServiceURL | None = None
    """URL of a scorer service (see `alignbench serve-scorer`). Its score replaces the task's rewards, which become judges. The
    URL must not contain a password; a token comes from `scorer_token_file` or the variable ALIGNBENCH_SCORER_TOKEN."""
    scorer_token_file: Path | None = None
    """File that contains the token of the scorer service. Its content is not recorded."""
    reward: dict[str, float] = Field(default_factory=dict)
    """Weights of the task's rewards in the sum that is trained on, by the name of the reward, such as `reward.pickscore=0.5`.
    Rewards that are not named keep the task's weight."""
    evals: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of the task's rewards and judges, by the name of the metric, such as `evals.ocr.reader=rapidocr`. Settings that
    are not named keep the task's value; see `show eval NAME`."""
    seed: int = Field(0, ge=0)
    """Seed of rollout noise, plans and prompt order."""
    preset: str = "quick"
    """Preset that the settings start from: smoke, quick, matching or paper."""
    iterations: int | None = Field(50, ge=0)
    """Number of rollouts, each followed by its updates. Null continues until the budget is spent."""
    pairs: Path | None = None
    """File of preference pairs of images (see `alignbench pairs`) to train on instead of rollouts, for offline DPO."""
    prompts_per_iteration: int = Field(12, ge=1)
    """Number of prompts, and so of groups, in one rollout."""
    updates_per_rollout: int = Field(1, ge=1)
    """Number of optimizer steps on each rollout. All but the first are off-policy."""
    reference_refresh: int | None = Field(None, ge=1)
    """Number of iterations without a refresh after which the current policy becomes the new reference. If this and
    `reference_refresh_kl` are null, the reference is the base model throughout."""
    reference_refresh_kl: float | None = Field(None, gt=0)
    """KL divergence above which the current policy becomes the new reference after the iteration, for objectives with a KL
    penalty."""
    guidance: float | None = Field(None, ge=1)
    """Guidance scale in rollouts, training and evaluation. Null uses the backbone's default."""
    log_prob_reduction: Literal["mean", "sum"] = "mean"
    """How log-probabilities are reduced over latent dimensions. Clip ranges and temperatures depend on it."""
    likelihood: Literal["path", "elbo"] = "path"
    """How objectives on paths know the log-probability of an image. path: from the densities of its stochastic steps. elbo: by
    an estimate from the final image alone, which needs no stochastic step (`elbo`)."""
    elbo: ElboConfig = ElboConfig()
    micro_batch: int | None = Field(None, ge=1)
    """Number of rows in one model call; it is halved if memory runs out. Null puts all rows into one call, on CPUs at most as
    many as a quarter of the memory holds in training. Results do not depend on it, within rounding."""
    overlap: int = Field(1, ge=1)
    """Number of parts into which an iteration's prompts are divided; one part is scored while the next is rolled out. This
    helps if scorers wait or run on another device, but it makes batches smaller. Results do not depend on it,
    within rounding."""
    normalise_rewards: bool = True
    """Whether several rewards are each standardised within their group before the weighted sum."""
    keepers: KeepersConfig = KeepersConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig | None = None
    """Moving average of the weights, which is evaluated and saved. Null evaluates and saves the weights themselves."""
    evaluation: EvaluationConfig = EvaluationConfig()
    inference: InferenceConfig = InferenceConfig()
    budget: BudgetConfig = BudgetConfig()
    stop: StopConfig = StopConfig()
    snapshots: int = Field(0, ge=0)
    """Number of times during the training, evenly spaced, that the backbone's own measurements are taken (columns `measured_*`
    of the metrics) and its distribution is saved. Both always happen before and after the training."""
    save_images: bool = True
    """Whether sample images and plots are saved at the end. `alignbench plot` can draw the plots later."""
    checkpoint_every: int = Field(10, ge=1)
    """Number of iterations between two checkpoints."""
    trackers: tuple[Tracker, ...] = ()
    """Experiment trackers that receive the metrics during the run."""
    checkpoints_kept: int = Field(2, ge=1)
    """Number of newest checkpoints that are kept. If the last one is damaged, the one before it is used."""
    best_window: int | None = Field(10, ge=1)
    """Number of iterations over which the training reward is averaged to choose a best checkpoint, which is kept as well. Null
    keeps none."""
    best_by: str | None = None
    """Metric on the validation prompts that chooses the best checkpoint in place of the training reward. It needs
    `evaluation.every`; a checkpoint is then written at each evaluation."""
    scorer_timeout: float | None = Field(1800, gt=0)
    """Seconds that one scorer may take for the images of a rollout or an evaluation. Null sets no limit."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of a process. Null uses OMP_NUM_THREADS, or else the process's share of the available cores, at most
    eight."""
    device: Device = "auto"
    """Device: auto, cpu, cuda or cuda:N. `auto` uses CUDA if it is available."""
    sharded: bool = False
    """Whether the model's weights are sharded over several processes (FSDP), instead of one copy in each process."""

    @model_validator(mode="before")
    @classmethod
    def _of_an_older_version(cls, data: Any) -> Any:
        return with_present_names(data) if isinstance(data, Mapping) else data

    @field_validator(*PLUGINS, mode="before")
    @classmethod
    def _by_name(cls, value: Any, info: ValidationInfo) -> Any:
        """Reads the short forms `objective: tmpo` and `objective: {name: tmpo, beta: 2}`."""
        if isinstance(value, Plugin):
            return value
        flat = plugin_data(str(info.field_name), value)
        return {"name": flat.pop("name", None), "label": flat.pop("label", None), "settings": flat}

    @field_validator(*PATHS, mode="before")
    @classmethod
    def _home(cls, value: Any) -> Any:
        """Expands `~`. A path may look like a number in YAML."""
        return local_path(str(value)) if _names(value) else value

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _has_an_end(self) -> "RunConfig":
        if self.iterations is None and self.budget == BudgetConfig():
            raise ValueError(
                "iterations is null, so a budget must end the run: set budget.model_rows, .reward_calls or .seconds"
            )
        limits = self.budget.model_dump(exclude_none=True)
        if self.iterations is None and self.pairs and list(limits) == ["reward_calls"]:
            raise ValueError("fixed pairs call no reward, so budget.reward_calls never ends the run: set another limit")
        return self

    @model_validator(mode="after")
    def _is_evaluated(self) -> "RunConfig":
        rules = {"stop": self.stop.is_on, "best_by": self.best_by is not None}
        reading = [name for name, is_on in rules.items() if is_on]
        if reading and self.evaluation.every is None:
            read = "reads" if len(reading) == 1 else "read"
            raise ValueError(f"{' and '.join(reading)} {read} the evaluations along the training: set evaluation.every")
        return self

    def anchored(self) -> "RunConfig":
        """The same configuration with absolute paths, so that it can be read from its record in any folder."""
        return validate(RunConfig, placed_keys(self._flat("python"), current_folder()), where="configuration")

    def resolved(self) -> dict[str, Any]:
        """The configuration as plain data from which `RunConfig` can be built again."""
        return self._flat("json")

    def _flat(self, mode: Literal["json", "python"]) -> dict[str, Any]:
        data = self.model_dump(mode=mode)
        for kind in PLUGINS:
            settings = data[kind].pop("settings")
            data[kind] = {key: value for key, value in data[kind].items() if value is not None} | settings
        return data


def with_present_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data with `FORMER_NAMES` replaced; a key that also occurs under its present name keeps that value."""
    renamed = {present: data[former] for former, present in FORMER_NAMES.items() if former in data}
    return renamed | {key: value for key, value in data.items() if key not in FORMER_NAMES}


def presets() -> list[str]:
    """The names of the presets that ship."""
    folder = resources.files("alignbench.config") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(
    *,
    preset: str | None = None,
    file: Path | None = None,
    options: Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
) -> RunConfig:
    """Builds the configuration from all layers; see the module's docstring for their order.

    Args:
        preset: name of a preset. None takes the `preset` of the config file, or else `quick`.
        file: a YAML file with keys of `RunConfig`.
        options: keys from command-line options.
        sets: texts `dotted.key=value`, with values as `alignbench.files.yaml_files.parse_value` reads them.

    Raises:
        UserError: a key is unknown, a value does not fit, or a file cannot be read.
    """
    typed = placed(merged_layers(options or {}, parse_assignments(sets)), None)
    given = merged_layers({} if file is None else read_settings(file), typed)
    if preset is not None or given.get("preset") is None:
        given["preset"] = preset or RunConfig.model_fields["preset"].default
    chain = _preset_chain(given["preset"])
    names: dict[str, str] = {}
    for kind in ("backbone", "objective", "sampler"):
        names[kind] = _chosen(kind, given, *reversed(_parts(chain, names)))
    task = next((layer["task"] for layer in (given, *reversed(_parts(chain, names))) if "task" in layer), None)
    merged: dict[str, Any] = {kind: {"name": name} for kind, name in names.items()}
    for part in _parts(chain, {**names, "task": str(task or RunConfig.model_fields["task"].default)}):
        others = [kind for kind in PLUGINS if plugin_data(kind, part.get(kind)).get("name") not in (None, names[kind])]
        _merge(merged, {key: value for key, value in part.items() if key not in others})
    _merge(merged, given)
    try:
        return validate(RunConfig, merged, where=str(file) if file else "configuration")
    except UnknownKeyError as error:
        raise with_whole_path(error, RunConfig, names) from None


def merged_layers(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested keys; later layers override earlier ones, and another plug-in's name drops the settings of the former."""
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge(merged, layer)
    return merged


def _chosen(kind: str, *layers: Mapping[str, Any]) -> str:
    """The name of the objective, sampler or backbone in the first layer that has one."""
    for layer in layers:
        name = plugin_data(kind, layer.get(kind)).get("name")
        if name is not None:
            return str(name)
    return str(RunConfig.model_fields[kind].default.name)


def _parts(chain: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """The parts of presets that apply to the chosen names: preset by preset, and in each from general to specific."""
    return [part for preset in chain for part in _parts_of_one(preset, names)]


def _parts_of_one(preset: Mapping[str, Any], names: Mapping[str, str]) -> list[dict[str, Any]]:
    wanted = {kind: families.section_of(name) if kind == "backbone" else name for kind, name in names.items()}
    sections = {kind: f"{kind}s" for kind in ("task", *reversed(PLUGINS))}  # settings for the objective override the others
    no_settings = (*ABOUT_PRESETS, *sections.values())
    level, found = [{**preset, **preset.get("common", {})}], []
    while level:
        found += [{key: value for key, value in part.items() if key not in no_settings} for part in level]
        level = [
            part[section][wanted[kind]]
            for part in level
            for kind, section in sections.items()
            if wanted.get(kind) in part.get(section, {})
        ]
    return found


def _preset_chain(name: str) -> list[dict[str, Any]]:
    """A preset after the one that it extends, whose settings it overrides."""
    preset = _read_preset(name)
    base = preset.get("extends")
    return [*(_preset_chain(base) if base else []), preset]


def _read_preset(name: str) -> dict[str, Any]:
    if name not in presets():
        raise UserError(f"there is no preset {name!r}{did_you_mean(str(name), presets())}")
    text = (resources.files("alignbench.config") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    return copy.deepcopy(_parsed(text))


@lru_cache(maxsize=8)
def _parsed(text: str) -> dict[str, Any]:
    """Parses a preset once per process: a comparison may configure hundreds of methods, and parsing takes longest."""
    return dict(parse(text))


def read_settings(file: Path, what: str = "config file") -> dict[str, Any]:
    """Reads a YAML file that contains keys of a configuration at any level, and makes its paths absolute.

    Raises:
        UserError: the file cannot be read, or does not hold keys and values.
    """
    return placed_keys(read_yaml(file, what), absolute(file.parent))


def placed_keys(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Makes the paths of tasks, pairs, backbones and token files absolute; relative ones start at the folder."""
    found: dict[str, Any] = {}
    for key, value in with_present_names(data).items():
        if key in PATHS:
            value = str(local_path(str(value), folder)) if _names(value) else value
        elif key == "task":
            value = tasks_path(value, folder)
        elif key == "tasks" and isinstance(value, list | tuple):
            value = [tasks_path(task, folder) for task in value]
        elif key == "backbone":
            value = _placed_backbone(value, folder)
        elif key in (*PLUGINS, "evals"):
            value = placed(value, folder)
        elif isinstance(value, Mapping):
            value = placed_keys(value, folder)
        found[key] = value
    return found


def tasks_path(task: Any, folder: Path | None = None) -> Any:
    """A task's name unchanged, or the path of its YAML file; see `alignbench.files.paths.local_path`."""
    return str(local_path(task, folder)) if isinstance(task, str) and task.endswith((".yaml", ".yml")) else task


def _placed_backbone(value: Any, folder: Path) -> Any:
    if _names(value):
        return families.name_or_folder(str(value), folder)
    if not isinstance(value, Mapping):
        return value
    data = dict(placed(value, folder))
    for key, place in (("name", families.name_or_folder), ("path", lambda path, at: str(local_path(path, at)))):
        if _names(data.get(key)):
            data[key] = place(str(data[key]), folder)
    if isinstance(data.get("settings"), Mapping):
        data["settings"] = _placed_backbone(data["settings"], folder)
    return data


def parse_assignments(sets: Iterable[str]) -> dict[str, Any]:
    """Parses texts `dotted.key=value` into nested data; later ones override earlier ones.

    Raises:
        UserError: a text has no key, or its value is not valid YAML.
    """
    found: dict[str, Any] = {}
    for text in sets:
        _merge(found, _assignment(text))
    return found


def _assignment(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set takes dotted.key=value, got {text!r}")
    try:
        nested = placed(parse_value(value), None)
    except ValueError as error:
        why = str(error).removeprefix("line 1: ")
        raise UserError(f"--set {key}: {value!r} is not a valid YAML value: {why}") from None
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return dict(nested)


def assignments(data: Mapping[str, Any], path: str = "") -> list[str]:
    """The texts `dotted.key=value` from which `parse_assignments` builds the same data."""
    found = []
    for key, value in data.items():
        dotted = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value and all(isinstance(k, str) and re.fullmatch(r"[^.=\s]+", k) for k in value):
            found += assignments(value, dotted)
        else:
            text = to_yaml(value, default_flow_style=True, width=float("inf"))
            found.append(f"{dotted}={text.removesuffix('...' + chr(10)).strip()}")
    return found


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in with_present_names(layer).items():
        old = into.get(key)
        if key in PLUGINS:
            old, value = plugin_data(key, old), plugin_data(key, value)
            if old.get("name") and value.get("name") not in (None, old["name"]):
                old = {}  # the settings of another plug-in do not apply
            into[key] = {**old, **value}
        elif isinstance(old, dict) and isinstance(value, Mapping):
            _merge(old, value)
        else:
            into[key] = copy.deepcopy(value)  # a later layer must not modify the data of this one


def plugin_data(kind: str, value: Any) -> dict[str, Any]:
    """A plug-in as `{name, **settings}`, from a name, from `{name, **settings}` or from `{name, settings: {...}}`.

    Args:
        kind: what messages call it, such as `objective`.
        value: the plug-in; None gives an empty dictionary.

    Raises:
        UserError: the value has none of these forms.
    """
    if value is None:
        return {}
    if _names(value):
        return {"name": str(value)}
    if not isinstance(value, Mapping):
        raise UserError(f"{kind} must be a name, or a name with settings, got {value!r}")
    inner = value.get("settings") or {}
    if not isinstance(inner, Mapping):
        raise UserError(f"the settings of the {kind} must be keys and values, got {inner!r}")
    flat = {**{k: v for k, v in value.items() if k != "settings"}, **inner}
    if _names(flat.get("name")):
        flat["name"] = str(flat["name"])
    return flat


def _names(value: Any) -> bool:
    """Whether a value can be a name or a path; in YAML both may look like numbers."""
    return isinstance(value, str | int | float | Path) and not isinstance(value, bool)
