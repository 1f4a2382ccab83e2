"""The configuration of a run: strict, layered, and written resolved into the run's folder.

Layers, later ones win: defaults < preset < config file < command-line options < `--set dotted.key=value`.

A preset has a `common` part, and parts for some names under `backbones`, `samplers` and `objectives`. Those of the chosen
names apply in this order. A part can have parts of the same kinds inside, for one name together with another
(`backbones.flux.objectives.grpo`); they win over all that are about one name alone. A part of the backbone or objective may
name the sampler (or one of the backbone the objective) that is taken where nobody asks for another. A local diffusers folder
goes by the name of its family: sd3, flux.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from alignbench.backbones import families
from alignbench.errors import UserError, did_you_mean
from alignbench.files.paths import absolute, current_folder, local_path, placed
from alignbench.files.yaml_files import parse, parse_value, read_yaml, to_yaml
from alignbench.settings import Device, ServiceURL, Settings, validate

PLUGINS = ("objective", "sampler", "backbone")
"""Keys that name a plug-in and hold its settings."""

RESULT_NEUTRAL_KEYS = WITHOUT_EFFECT = (
    *("pictures", "checkpoint_every", "checkpoints_kept", "best_window", "micro_batch", "scorer_timeout"),
    *("trackers", "sharded", "scorer_token_file"),
)
"""Keys that do not change the numbers of a run, beyond rounding. A resumed run may have other values of them."""
PATHS = ("pairs", "scorer_token_file")
"""Keys that are the path of a file."""
Tracker = Literal["tensorboard", "wandb"]

Model = TypeVar("Model", bound=BaseModel)


class Plugin(Settings):
    """A plug-in by name with its own settings, which the plug-in's class validates."""

    name: str
    label: str | None = Field(None, pattern=r"^[\w.+-]+$")
    """What tables and plots call it, so that one plug-in can be compared under several settings; its name where it is null."""
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.label or self.name


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Settings):
    """AdamW."""

    lr: float = Field(1e-4, gt=0)
    """Learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Of AdamW's moving averages of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the squared gradient's average (AdamW)."""
    weight_decay: float = Field(1e-4, ge=0)
    """Share of each weight that is taken off per unit of learning rate (AdamW)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: falls to a tenth of `lr` over the run."""


class EMAConfig(Settings):
    """Moving average of the trained weights: decay min((1 + n) / (10 + n), decay) every `every` updates."""

    decay: float = Field(0.9, gt=0, lt=1)
    """Share of the average that each update keeps, once there have been enough of them."""
    every: int = Field(8, ge=1)
    """Optimizer steps between two updates of the average."""


class EvaluationConfig(Settings):
    """How base and trained model are compared: same prompts, same initial noise, deterministic sampling."""

    prompts: int = Field(64, ge=1)
    """How many of the task's evaluation prompts, from the first on."""
    images_per_prompt: int = Field(4, ge=2)
    """Pictures of each prompt; diversity needs two."""
    steps: int | None = Field(None, ge=1)
    """ODE steps; the backbone's own call arguments where it is null."""
    seed: int = 12345
    """Of the evaluation noise; apart from the run's seed, so that all runs are judged on the same noise."""


class BudgetConfig(Settings):
    """Where a run ends, if before its iterations are done: after the iteration that reaches a limit."""

    model_rows: int | None = Field(None, ge=1)
    """Rollout and training rows together."""
    reward_calls: int | None = Field(None, ge=1)
    """Images scored, times the rewards of each."""
    seconds: float | None = Field(None, gt=0)
    """Of training, without judging."""


class RunConfig(Settings):
    """Everything that determines a run."""

    objective: Plugin = Plugin(name="tmpo")
    """Name of the objective, followed by its settings: `show objective NAME`."""
    sampler: Plugin = Plugin(name="dynamic_tree")
    """Name of the rollout sampler, followed by its settings: `show sampler NAME`."""
    backbone: Plugin = Plugin(name="tiny")
    """Name of the backbone, or a local diffusers folder, followed by its settings: `show backbone NAME`."""
    task: str = "ocr"
    """A task that ships, or the path of a task's YAML file."""
    scorer_url: ServiceURL | None = None
    """A scorer service (see `alignbench serve-scorer`) that rewards in place of the task's rewards, which then only judge. It
    holds no password; that comes from `scorer_token_file`, or from the variable ALIGNBENCH_SCORER_TOKEN."""
    scorer_token_file: Path | None = None
    """A file whose content is the service's token; nothing of it is kept."""
    seed: int = Field(0, ge=0)
    """Of rollout noise, plans and prompt order."""
    preset: str = "quick"
    """Which settings to start from: smoke, quick or paper."""
    iterations: int | None = Field(50, ge=0)
    """Rollouts, each followed by its updates; null for as many as the budget allows."""
    pairs: Path | None = None
    """A file of fixed pairs of pictures (see `alignbench pairs`) to train on in place of rollouts, for offline DPO."""
    prompts_per_iteration: int = Field(12, ge=1)
    """Groups of one rollout."""
    updates_per_rollout: int = Field(1, ge=1)
    """Optimizer steps on each rollout; with more than one, all but the first are off-policy."""
    reference_refresh: int | None = Field(None, ge=1)
    """The reference becomes the current policy after so many iterations without a refresh; it is the base model throughout
    where this and the next are null."""
    reference_refresh_kl: float | None = Field(None, gt=0)
    """Likewise after an iteration at whose start the KL divergence to it was above this, for an objective that has one."""
    guidance: float | None = Field(None, ge=1)
    """Guidance in rollout, training and evaluation alike; the backbone's own where it is null."""
    log_prob_reduction: Literal["mean", "sum"] = "mean"
    """How log-probs are taken over latent dimensions. Clip ranges and temperatures depend on it."""
    micro_batch: int | None = Field(None, ge=1)
    """Rows in one model call, halved where memory runs out; null for all. Results do not depend on it, within rounding."""
    overlap: int = Field(1, ge=1)
    """Parts that an iteration's prompts are rolled out in, each scored while the next is rolled out. More than one helps where
    scorers wait or run elsewhere than the model; it costs larger batches. Results do not depend on it."""
    normalise_rewards: bool = True
    """With several rewards: standardise each within its group before the weighted sum."""
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig | None = None
    """Evaluate and save an average of the weights; null for the weights themselves."""
    evaluation: EvaluationConfig = EvaluationConfig()
    budget: BudgetConfig = BudgetConfig()
    snapshots: int = Field(0, ge=0)
    """How often, evenly spread over the training, what the backbone knows of itself is measured (columns `measured_*` of the
    metrics) and its distribution is kept; before and after the training both are in any case."""
    pictures: bool = True
    """Draw sample sheets and plots at the end; `alignbench plot` can do the plots later."""
    checkpoint_every: int = Field(10, ge=1)
    """Iterations between checkpoints."""
    trackers: tuple[Tracker, ...] = ()
    """Where its numbers also go while it runs; see `alignbench.training.tracking`."""
    checkpoints_kept: int = Field(2, ge=1)
    """How many of the newest are kept: where the last is damaged, the one before it serves."""
    best_window: int | None = Field(10, ge=1)
    """The checkpoint with the highest training reward, averaged over this many iterations, is kept as well; null for none."""
    scorer_timeout: float | None = Field(1800, gt=0)
    """Seconds that one scorer may take for the pictures of a rollout or of an evaluation; null waits for ever."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of a process; null for OMP_NUM_THREADS, else its share of the cores that it may use, at most eight."""
    device: Device = "auto"
    """`auto` takes CUDA where there is one."""
    sharded: bool = False
    """With several processes: spread the model's weights over them (FSDP), in place of a copy for each."""

    @field_validator(*PLUGINS, mode="before")
    @classmethod
    def _by_name(cls, value: Any, info: ValidationInfo) -> Any:
        """`objective: tmpo` and `objective: {name: tmpo, beta: 2}` are short for a name and its settings."""
        if isinstance(value, Plugin):
            return value
        flat = plugin_data(str(info.field_name), value)
        return {"name": flat.pop("name", None), "label": flat.pop("label", None), "settings": flat}

    @field_validator(*PATHS, mode="before")
    @classmethod
    def _home(cls, value: Any) -> Any:
        """A path may look like a number."""
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
        return self

    def anchored(self) -> "RunConfig":
        """The same with paths that are absolute, so that it means the same when it is read from its record."""
        return validate(RunConfig, placed_keys(self._flat("python"), current_folder()), where="configuration")

    def resolved(self) -> dict[str, Any]:
        """As plain data that `RunConfig` reads back."""
        return self._flat("json")

    def _flat(self, mode: Literal["json", "python"]) -> dict[str, Any]:
        data = self.model_dump(mode=mode)
        for kind in PLUGINS:
            settings = data[kind].pop("settings")
            data[kind] = {key: value for key, value in data[kind].items() if value is not None} | settings
        return data


def presets() -> list[str]:
    """Names of the presets that ship."""
    folder = resources.files("alignbench.config") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(
    *,
    preset: str | None = None,
    file: Path | None = None,
    options: Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
) -> RunConfig:
    """The configuration from all layers; see the module's docstring for their order.

    Args:
        preset: a preset's name; the config file's `preset`, else `quick`, where it is None.
        file: a YAML file with keys of `RunConfig`.
        options: keys from the command line.
        sets: `dotted.key=value`, the value read by `alignbench.files.yaml_files.parse_value`.
    """
    typed = placed(merged_layers(options or {}, parse_assignments(sets)), None)
    given = merged_layers({} if file is None else read_settings(file), typed)
    if preset is not None or given.get("preset") is None:
        given["preset"] = preset or RunConfig.model_fields["preset"].default
    shipped = _read_preset(given["preset"])
    names: dict[str, str] = {}
    for kind in ("backbone", "objective", "sampler"):
        names[kind] = _chosen(kind, given, *reversed(_parts(shipped, names)))
    merged: dict[str, Any] = {kind: {"name": name} for kind, name in names.items()}
    for part in _parts(shipped, names):
        others = [kind for kind in PLUGINS if plugin_data(kind, part.get(kind)).get("name") not in (None, names[kind])]
        _merge(merged, {key: value for key, value in part.items() if key not in others})
    _merge(merged, given)
    return validate(RunConfig, merged, where=str(file) if file else "configuration")


def merged_layers(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested keys of several layers as one; later ones win, and another plug-in's name drops the settings of the former."""
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge(merged, layer)
    return merged


def _chosen(kind: str, *layers: Mapping[str, Any]) -> str:
    """The name of the objective, sampler or backbone that the first layer with an opinion wants."""
    for layer in layers:
        name = plugin_data(kind, layer.get(kind)).get("name")
        if name is not None:
            return str(name)
    return str(RunConfig.model_fields[kind].default.name)


def _parts(preset: Mapping[str, Any], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """The parts of a preset that apply to the chosen names, the general ones first."""
    wanted = {kind: families.section_of(name) if kind == "backbone" else name for kind, name in names.items()}
    sections = {kind: f"{kind}s" for kind in reversed(PLUGINS)}  # what is tuned for the objective has the last word
    level, found = [{**preset, **preset.get("common", {})}], []
    while level:
        found += [{key: value for key, value in part.items() if key not in ("common", *sections.values())} for part in level]
        level = [
            part[section][wanted[kind]]
            for part in level
            for kind, section in sections.items()
            if wanted.get(kind) in part.get(section, {})
        ]
    return found


def _read_preset(name: str) -> dict[str, Any]:
    if name not in presets():
        raise UserError(f"there is no preset {name!r}{did_you_mean(str(name), presets())}")
    text = (resources.files("alignbench.config") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    return copy.deepcopy(_parsed(text))


@lru_cache(maxsize=8)
def _parsed(text: str) -> dict[str, Any]:
    """Once in a process: a comparison may configure hundreds of methods, and a preset takes longer to parse than all else."""
    return dict(parse(text))


def read_settings(file: Path, what: str = "config file") -> dict[str, Any]:
    """Keys and values of a YAML file in which keys of a configuration stand, at whichever level; paths in it are absolute.

    Raises:
        UserError: the file cannot be read, or holds anything else.
    """
    return placed_keys(read_yaml(file, what), absolute(file.parent))


def placed_keys(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The data with the paths of tasks, pairs, backbones and token files made absolute; relative ones start at the folder."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if key in PATHS:
            value = str(local_path(str(value), folder)) if _names(value) else value
        elif key == "task":
            value = tasks_path(value, folder)
        elif key == "tasks" and isinstance(value, list | tuple):
            value = [tasks_path(task, folder) for task in value]
        elif key == "backbone":
            value = _placed_backbone(value, folder)
        elif key in PLUGINS:
            value = placed(value, folder)
        elif isinstance(value, Mapping):
            value = placed_keys(value, folder)
        found[key] = value
    return found


def tasks_path(task: Any, folder: Path | None = None) -> Any:
    """A task's name as it is, or the path of its YAML file; see `alignbench.files.paths.local_path`."""
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
    """`dotted.key=value` texts as nested data, values read by `parse_value`; later ones win.

    Raises:
        UserError: a text without a key or with a value that is no YAML.
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
    """The `dotted.key=value` texts from which `parse_assignments` makes the data again."""
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
    for key, value in layer.items():
        old = into.get(key)
        if key in PLUGINS:
            old, value = plugin_data(key, old), plugin_data(key, value)
            if old.get("name") and value.get("name") not in (None, old["name"]):
                old = {}  # another plug-in: the settings of the former one do not apply
            into[key] = {**old, **value}
        elif isinstance(old, dict) and isinstance(value, Mapping):
            _merge(old, value)
        else:
            into[key] = copy.deepcopy(value)  # a later layer must not reach into this one's data


def plugin_data(kind: str, value: Any) -> dict[str, Any]:
    """A plug-in as `{name, **settings}`, from a name, from that, or from `{name, settings: {...}}`."""
    if value is None:
        return {}
    if _names(value):
        return {"name": str(value)}
    if not isinstance(value, Mapping):
        raise UserError(f"{kind} is a name, or a name with settings, got {value!r}")
    inner = value.get("settings") or {}
    if not isinstance(inner, Mapping):
        raise UserError(f"the settings of the {kind} are keys and values, got {inner!r}")
    flat = {**{k: v for k, v in value.items() if k != "settings"}, **inner}
    if _names(flat.get("name")):
        flat["name"] = str(flat["name"])
    return flat


def _names(value: Any) -> bool:
    """Whether a value can be a name or a path, which may look like a number."""
    return isinstance(value, str | int | float | Path) and not isinstance(value, bool)
