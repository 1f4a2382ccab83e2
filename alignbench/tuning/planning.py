"""Plans a tuning: turns a user's request into a comparison whose methods are the trials."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from alignbench import registry
from alignbench.comparison.grid import Grid, configured, plugin_name
from alignbench.comparison.planning import Request, check_grid, plan_grid
from alignbench.comparison.tuned import FIRST_TUNING_SEED
from alignbench.config.run_config import RunConfig, merged_layers
from alignbench.errors import UserError
from alignbench.files.paths import absolute
from alignbench.load import load_configured_objective
from alignbench.objective import Objective
from alignbench.settings import Settings, validate
from alignbench.tasks import Task, load_task, trained_task
from alignbench.tuning import LR_FACTOR, TRIALS, UPDATES
from alignbench.tuning.space import LR, UPDATES_KEY, Dimension, design, nested, search_space, settings_at

REWARD, HYPERVOLUME = "reward", "hypervolume"
SETTINGS = "tuning.yaml"
"""Name of the file in a tuning's folder that says what is tuned."""
KEPT_SMALL: dict[str, Any] = {"save_images": False, "best_window": None, "checkpoints_kept": 1}
"""Settings of trials that save disk space and change no result."""


class TuningRequest(Settings):
    """What a user asks to tune, as `tuning.yaml` keeps it; null for options that were not given."""

    objectives: list[str] = Field(default_factory=list)
    """Names, or `label=name`."""
    samplers: list[str] = Field(default_factory=list)
    """Names, or `label=name`."""
    task: str | None = None
    """Name of the task of all trials."""
    backbone: str | None = None
    """Name of the backbone of all trials."""
    preset: str | None = None
    """Name of the preset, whose own settings the first trial has."""
    budget: dict[str, Any] = Field(default_factory=dict)
    """The budget at which each trial ends; the default is that of `compare`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of all trials, in the format of `Grid.settings`."""
    threads: int | None = None
    """CPU threads of each trial."""
    trials: int = Field(TRIALS, ge=2)
    """Number of trials of each method. The first has the preset's own settings; the others cover the search space."""
    seeds: int = Field(1, ge=1, le=1000)
    """Number of seeds of each trial."""
    select: str = REWARD
    """The score of a trial: `reward`, `hypervolume`, or the name of a metric."""
    lr_factor: float = Field(LR_FACTOR, gt=1)
    """Range of learning rates: from the preset's divided by this factor to the preset's times this factor."""
    updates: list[int] = Field(list(UPDATES), min_length=1)
    """Values of `updates_per_rollout` that trials take."""
    keep_strength: bool = False
    """Whether each objective keeps its strength, so that trials vary only how it is trained."""

    @property
    def tuning_seeds(self) -> list[int]:
        """The seeds of each trial, which no comparison takes."""
        return list(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.seeds))


class Trial(NamedTuple):
    """One trial of an objective.

    Attributes:
        label: its label in the grid.
        settings: dotted key -> value for every setting that is tuned; for the first trial, the values of the preset.
        place: its point in the unit cube; empty for the first trial.
    """

    label: str
    settings: dict[str, float]
    place: tuple[float, ...]


class Plan(NamedTuple):
    """A tuning that has been checked, before anything is written.

    Attributes:
        request: the request with all defaults filled in and with absolute paths. The same request gives the same plan again.
        base: the grid of the methods with the settings of their presets, as `compare` would run it.
        trial_grid: the grid of all trials, on the task itself.
        task: the task that is tuned for.
        weights: reward -> its weight, for the rewards that the trials train on.
        spaces: objective -> the settings that its trials vary.
        trials: objective -> its trials.
    """

    request: TuningRequest
    base: Grid
    trial_grid: Grid
    task: Task
    weights: dict[str, float]
    spaces: dict[str, list[Dimension]]
    trials: dict[str, list[Trial]]

    def grid_in(self, folder: Path) -> Grid:
        """Returns the grid of all trials, on the task file in the tuning's folder."""
        return self.trial_grid.model_copy(update={"tasks": [str(task_file(self.task, folder))]})


def task_file(task: Task, folder: Path) -> Path:
    """Returns the path of the task file on which trials are evaluated.

    It has another name than the task, so that no report takes it for the task itself.
    """
    return absolute(folder) / f"{task.name}-validation.yaml"


def plan_tuning(request: TuningRequest, at_once: int = 1) -> Plan:
    """Plans the trials of all methods. All names and settings are checked before anything is loaded.

    Args:
        request: what to tune.
        at_once: number of processes that share this machine's threads.

    Raises:
        UserError: a name or a setting is wrong, an objective trains nothing, or the task has no validation prompts.
    """
    base = plan_grid(_comparison(request), at_once)
    if len(base.tasks) != 1:
        raise UserError(f"settings are tuned for one task at a time, got {', '.join(base.tasks)}; run `tune` once for each")
    task = load_task(base.tasks[0])
    validation = len(load_validation(task))
    first = {objective: _first_config(base, objective) for objective in base.objectives}
    weights = _trained_rewards(next(iter(first.values())).model_copy(update={"task": base.tasks[0]}))
    if request.select == HYPERVOLUME and len(weights) > 1:
        raise UserError(
            f"--select {HYPERVOLUME} needs a task with one reward, and the trials train on {' and '.join(weights)}; choose "
            "another score"
        )
    spaces = {
        objective: search_space(
            config.optimizer.lr,
            None if request.keep_strength else registry.find("objectives", config.objective.name, Objective).strength,
            request.lr_factor,
            _checked_updates(request.updates),
        )
        for objective, config in first.items()
    }
    places = design(request.trials - 1)
    trials = {objective: _trials(objective, spaces[objective], first[objective], places) for objective in base.objectives}
    evaluated = min(next(iter(first.values())).evaluation.prompts, validation)
    settings = _trial_settings(base, trials)
    settings = merged_layers(settings, KEPT_SMALL, {"evaluation": {"prompts": evaluated, "every": None}})
    labels = [trial.label for of_objective in trials.values() for trial in of_objective]
    keys = {**base.model_dump(), "objectives": labels, "settings": settings, "seeds": request.tuning_seeds}
    grid = validate(Grid, {**keys, "description": "trials of a tuning, on validation prompts"}, where="tuning")
    check_grid(grid)
    resolved = request.model_copy(
        update={key: getattr(base, key) for key in ("objectives", "samplers", "backbone", "preset", "threads", "settings")}
        | {"task": base.tasks[0], "budget": base.budget.model_dump(exclude_none=True)}
    )
    return Plan(resolved, base, grid, task, weights, spaces, trials)


def load_validation(task: Task) -> list[str]:
    """Returns the task's validation prompts; raises UserError if it has none."""
    task.on_validation_prompts()
    return task.validation_prompts


def _comparison(request: TuningRequest) -> Request:
    if not request.objectives or not request.samplers:
        raise UserError("tune needs --objectives and --samplers; --out DIR alone resumes the tuning in DIR")
    return Request(
        objectives=request.objectives,
        samplers=request.samplers,
        tasks=[request.task] if request.task else None,
        backbone=request.backbone,
        preset=request.preset,
        budget=request.budget or None,
        threads=request.threads,
        settings=request.settings or None,
    )


def _first_config(base: Grid, objective: str) -> RunConfig:
    """The configuration of an objective with the first sampler, which determines the search space of all its pairs."""
    config = configured(base.preset, base.settings, objective, base.samplers[0], {"backbone": base.backbone})
    if not load_configured_objective(config).needs.training:
        raise UserError(f"objective {objective} trains nothing, so there is nothing to tune; leave it out")
    return config


def _trained_rewards(config: RunConfig) -> dict[str, float]:
    """Reward -> its weight, as the configuration sets it; only the scorer's if a scorer service replaces the rewards."""
    return trained_task(config).weights


def _checked_updates(updates: list[int]) -> list[int]:
    if min(updates) < 1:
        raise UserError(f"--updates takes whole numbers from 1 on, got {min(updates)}")
    return sorted(set(updates))


def _trials(objective: str, space: list[Dimension], config: RunConfig, places: Any) -> list[Trial]:
    """The trials of an objective: the first with the preset's settings, the others at the points of the design."""
    first = Trial(f"{objective}-t0", {dimension.key: _configured_value(config, dimension.key) for dimension in space}, ())
    return [
        first,
        *(
            Trial(f"{objective}-t{i}", settings_at(space, place), tuple(map(float, place[: len(space)])))
            for i, place in enumerate(places, start=1)
        ),
    ]


def _configured_value(config: RunConfig, key: str) -> float:
    """The value of a setting in a configuration."""
    if key == LR:
        return config.optimizer.lr
    if key == UPDATES_KEY:
        return config.updates_per_rollout
    objective = load_configured_objective(config)
    value: float = getattr(objective.settings, key.partition(".")[2])
    return value


def _trial_settings(base: Grid, trials: Mapping[str, list[Trial]]) -> dict[str, Any]:
    """The settings of the base grid, with those of each trial under its label. Trials inherit those of a user's label."""
    by_label = dict(base.settings.get("objectives") or {})
    names = {objective: plugin_name("objective", by_label, objective) for objective in trials}
    for objective, of_objective in trials.items():
        own = by_label.pop(objective, {}) if names[objective] != objective else {}
        for trial in of_objective:
            varied = nested(trial.settings) if trial.place else {}
            by_label[trial.label] = merged_layers(own, {"objective": {"name": names[objective]}}, varied)
    return {**base.settings, "objectives": by_label}
