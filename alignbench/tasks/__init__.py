"""Tasks: training, validation and test prompts, rewards, and independent judges. Each task is one YAML file."""

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from alignbench import registry
from alignbench.config.run_config import RunConfig, tasks_path
from alignbench.errors import UserError, did_you_mean
from alignbench.files.opening import sha256_of
from alignbench.files.paths import absolute, local_path
from alignbench.files.text import distinct, excerpt, prompt_identity
from alignbench.files.yaml_files import read_yaml
from alignbench.settings import Settings, validate
from alignbench.tasks.prompts import interleaved, read_prompts

FILE = "task file"
"""What error messages call the YAML file of a task."""
LARGE = 100_000_000
"""Size in bytes above which a file enters a fingerprint by its size instead of its content."""


class EvalChoice(Settings):
    """An eval of a task, with its settings and the name of its metric."""

    eval: str
    """Name of the eval."""
    label: str | None = None
    """Name of the eval's first metric; null for the eval's own name."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the eval; the others have their defaults."""

    @property
    def title(self) -> str:
        """The label, or the name of the eval without one."""
        return self.label or self.eval


class RewardChoice(EvalChoice):
    """A scorer that a run trains on."""

    weight: float = 1.0
    """Weight in the total reward. A reward of weight 0 is scored, for objectives that compare rewards (gardo), but not trained
    on."""


Choice = TypeVar("Choice", bound=EvalChoice)


class TaskConfig(Settings):
    """The content of a task's YAML file."""

    description: str
    """What the task is, for `list tasks`."""
    train_prompts: str | list[str]
    """A prompt file (see `alignbench.tasks.prompts`), relative to the YAML file. Prompts of several files are interleaved."""
    eval_prompts: str | list[str]
    """Test prompts, on which the base model and the trained model are compared. No run trains on them, and nothing is chosen by
    them (stop rules, checkpoints, tuned settings). Of prompts that differ only in case and blanks, the first is used."""
    validation_prompts: str | list[str] | None = None
    """Prompts on which a run is evaluated along its training (`evaluation.every`), and on which settings are tuned. They are
    neither training nor test prompts. Without them a run of this task has no curve."""
    same_prompts: bool = False
    """Whether the three sets may share prompts, for a task that asks how the images of given prompts are distributed."""
    backbone: str | None = None
    """The only backbone that can draw the prompts, such as those of its toy problems; null for any that draws images."""
    reward: list[RewardChoice] = Field(min_length=1)
    """The scorers that are trained on."""
    judges: list[EvalChoice] = Field(default_factory=list)
    """The metrics that are not trained on."""


class Task:
    """A task whose prompts have been read and checked.

    Attributes:
        name: name of the YAML file, without its suffix.
        config: content of the YAML file.
        folder: folder of the YAML file.
        train_prompts, eval_prompts, validation_prompts: the prompts; there may be no validation prompts.
    """

    def __init__(self, name: str, config: TaskConfig, folder: Path) -> None:
        self.name, self.config, self.folder = name, config, folder
        self.train_prompts = _prompts(folder, config.train_prompts)
        # A repeated prompt would count as two in means and intervals over prompts.
        self.eval_prompts = distinct(_prompts(folder, config.eval_prompts))
        self.validation_prompts = distinct(_prompts(folder, config.validation_prompts)) if config.validation_prompts else []
        if not config.same_prompts:
            self._refuse_shared(self.train_prompts, self.eval_prompts, "evaluated on prompts it trains on")
            self._refuse_shared(self.train_prompts, self.validation_prompts, "validated on prompts it trains on")
            self._refuse_shared(self.eval_prompts, self.validation_prompts, "validated on its test prompts (eval_prompts)")

    def _refuse_shared(self, first: Sequence[str], second: Sequence[str], what: str) -> None:
        identities = set(map(prompt_identity, first))
        shared = [prompt for prompt in second if prompt_identity(prompt) in identities]
        if shared:
            raise UserError(
                f"task {self.name!r} would be {what} ({len(shared)}, such as {excerpt(min(shared))}); "
                "remove them from one of the two files"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Reward -> its weight, for the rewards that are trained on: those whose weight is not 0."""
        return {choice.title: choice.weight for choice in self.config.reward if choice.weight}

    def fingerprint(self) -> dict[str, str]:
        """Computes the SHA-256 digest of each part of the task: part -> digest.

        Tasks with equal digests have the same prompts, rewards and judges.
        """
        reward, judges = ([c.model_dump(mode="json") for c in cs] for cs in (self.config.reward, self.config.judges))
        parts: dict[str, Any] = {"training prompts": self.train_prompts, "evaluation prompts": self.eval_prompts}
        if self.validation_prompts:
            parts["validation prompts"] = self.validation_prompts
        parts |= {"reward": [reward, _files_in(reward)], "judges": [judges, _files_in(judges)]}
        return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}

    def weighted(self, weights: Mapping[str, float]) -> "Task":
        """Makes the same task with other weights of its rewards.

        Args:
            weights: reward -> weight; the other rewards keep their weights.

        Raises:
            UserError: the task has no such reward, or every weight would be 0.
        """
        names = [choice.title for choice in self.config.reward]
        for name in weights:
            if name not in names:
                raise UserError(f"reward.{name}: task {self.name!r} has no such reward{did_you_mean(name, names)}")
        reward = [
            choice.model_copy(update={"weight": weights.get(name, choice.weight)})
            for name, choice in zip(names, self.config.reward, strict=True)
        ]
        other = copy.copy(self)
        other.config = self.config.model_copy(update={"reward": reward})
        other.require_weight()
        return other

    def require_weight(self) -> None:
        """Raises UserError where every reward has weight 0; a task without rewards is accepted."""
        if self.config.reward and not self.weights:
            raise UserError(
                f"task {self.name!r}: every reward has weight 0, so there is nothing to train on; give one a weight with "
                "reward.NAME=WEIGHT"
            )

    def with_eval_settings(self, settings: Mapping[str, Mapping[str, Any]]) -> "Task":
        """Makes the same task with other settings of its rewards and judges.

        Args:
            settings: label or name of a metric -> settings that override those of the task.

        Raises:
            UserError: the task has no such metric.
        """
        names = [choice.title for choice in [*self.config.reward, *self.config.judges]]
        for name in settings:
            if name not in names:
                raise UserError(f"evals.{name}: task {self.name!r} has no such metric{did_you_mean(name, names)}")

        def changed(choice: Choice) -> Choice:
            own = {**choice.settings, **settings.get(choice.title, {})}
            return choice.model_copy(update={"settings": own})

        other = copy.copy(self)
        lists = {"reward": [*map(changed, self.config.reward)], "judges": [*map(changed, self.config.judges)]}
        other.config = self.config.model_copy(update=lists)
        return other

    def on_validation_prompts(self) -> TaskConfig:
        """Makes the content of a task that evaluates models on this task's validation prompts instead of its test prompts.

        Raises:
            UserError: the task has no validation prompts.
        """
        if not self.config.validation_prompts:
            raise UserError(
                f"task {self.name!r} has no validation prompts, and test prompts must not choose settings; add "
                "validation_prompts to its file"
            )
        files = {key: _absolute(self.folder, getattr(self.config, key)) for key in ("train_prompts", "validation_prompts")}
        changed = {"train_prompts": files["train_prompts"], "eval_prompts": files["validation_prompts"]}
        description = f"{self.config.description} (on its validation prompts)"
        return self.config.model_copy(update={**changed, "validation_prompts": None, "description": description})

    def rewarded_by(self, choice: RewardChoice) -> "Task":
        """Makes a task with the same prompts and another reward; the former rewards become judges, ahead of the others."""
        other = copy.copy(self)
        former = [EvalChoice(eval=c.eval, label=c.label, settings=c.settings) for c in self.config.reward]
        other.config = self.config.model_copy(update={"reward": [choice], "judges": [*former, *self.config.judges]})
        return other

    def without_judges(self) -> "Task":
        """The same prompts and reward alone."""
        other = copy.copy(self)
        other.config = self.config.model_copy(update={"judges": []})
        return other

    def judged_by(self, choices: list[EvalChoice]) -> "Task":
        """Makes a task with the same prompts, other judges, and no reward."""
        other = copy.copy(self)
        other.config = self.config.model_copy(update={"reward": [], "judges": choices})
        return other

    def choices(self, names: Sequence[str], settings: Mapping[str, dict[str, Any]]) -> list[EvalChoice]:
        """Chooses evals by name, with the settings that this task has for them.

        An eval that the task does not have gives NaN, instead of an error, for prompts that it does not apply to.

        Args:
            names: labels or names of evals.
            settings: eval -> settings that override those of the task.

        Raises:
            UserError: there are settings for an eval that is not among the names, or an eval is unknown.
        """
        from alignbench.scorer import Metric

        for name in settings:
            if name not in names:
                raise UserError(f"there are settings for the eval {name!r}, which is not asked for{did_you_mean(name, names)}")
        own = {c.title: c for c in reversed([*self.config.reward, *self.config.judges])}
        choices = []
        for name in names:
            choice = own.get(name) or EvalChoice(eval=name, settings=registry.find("evals", name, Metric).skip_settings)
            merged = {**choice.settings, **settings.get(name, {})}
            choices.append(EvalChoice(eval=choice.eval, label=choice.label, settings=merged))
        return choices


def _prompts(folder: Path, files: str | list[str]) -> list[str]:
    listed = [files] if isinstance(files, str) else files
    return interleaved([read_prompts(local_path(file, folder), pipe=False) for file in listed])


def _absolute(folder: Path, files: str | list[str]) -> str | list[str]:
    """Makes the paths of prompt files absolute; a single path stays a single path."""
    listed = [str(absolute(local_path(file, folder))) for file in ([files] if isinstance(files, str) else files)]
    return listed[0] if isinstance(files, str) else listed


def changed_parts(now: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
    """Names the parts in which two fingerprints differ. Parts that only one of them has are ignored."""
    return [part for part in now if part in then and now[part] != then[part]]


def refuse_changed(parts: Sequence[str], what: str) -> None:
    """Raises UserError if parts of a task have changed since `what` (a folder or a checkpoint) was made."""
    if parts:
        raise UserError(
            f"the {' and '.join(parts)} changed since {what} was made; restore the task's files, or start anew "
            "with another --out"
        )


def _files_in(settings: Any) -> list[str]:
    """Computes the SHA-256 digest of each local file in settings, such as GenEval's metadata; token files are left out."""
    if isinstance(settings, Mapping):
        settings = [value for key, value in settings.items() if key != "token_file"]
    if isinstance(settings, list):
        return [digest for value in settings for digest in _files_in(value)]
    file = local_path(settings) if isinstance(settings, str) and "\0" not in settings else None
    if file is None or not os.path.isfile(file):
        return []
    try:
        if file.stat().st_size > LARGE:
            return [str(file.stat().st_size)]
        return [sha256_of(file)]
    except OSError:
        return []  # the eval that reads the file will report it


def names() -> list[str]:
    """Lists the names of the tasks that ship."""
    return sorted(f.stem for f in _folder().glob("*.yaml"))


def describe() -> dict[str, str]:
    """Reads what each task that ships is: name -> description."""
    return {name: str(read_yaml(_folder() / f"{name}.yaml", FILE)["description"]) for name in names()}


def load_task(name: str) -> Task:
    """Loads a task that ships, by its name, or any other task, by the path of its YAML file.

    Raises:
        UserError: there is no such task, or its file or its prompts are wrong.
    """
    file = Path(tasks_path(name)) if name.endswith((".yaml", ".yml")) else _folder() / f"{name}.yaml"
    if not os.path.isfile(file):  # unlike Path.is_file, it accepts names of any length
        raise UserError(f"there is no task {name!r}{did_you_mean(name, names())}")
    return Task(file.stem, validate(TaskConfig, read_yaml(file, FILE), where=str(file.name)), file.parent)


def configured_task(config: RunConfig) -> Task:
    """Loads the task of a run's configuration, with the configuration's weights of rewards and settings of metrics.

    Raises:
        UserError: as for `load_task`; the backbone cannot draw the task's prompts; or the configuration has a weight
            or settings for something that is not a reward or a metric of the task.
    """
    task = load_task(config.task)
    check_backbone(task, config.backbone.name)
    task = task.with_eval_settings(config.evals)
    if not config.reward:
        return task
    if config.scorer_url:
        raise UserError("reward sets weights of the task's rewards, which scorer_url replaces; leave one of them out")
    return task.weighted(config.reward)


def trained_task(config: RunConfig) -> Task:
    """Loads the task of a run's configuration, with the reward that the run trains on: that of `scorer_url`, if there is one.

    Raises:
        UserError: as for `configured_task`.
    """
    return with_remote_reward(configured_task(config), config)


def check_backbone(task: Task, backbone: str) -> None:
    """Raises UserError where the backbone, which is not loaded, cannot draw the prompts of the task."""
    from alignbench.load import backbone_class

    cls, own = backbone_class(backbone), task.config.backbone
    if own is not None and not issubclass(cls, backbone_class(own)):
        raise UserError(
            f"task {task.name!r} is only for the backbone {own}, and the backbone is {backbone}; add --backbone {own}, or "
            "choose another --task"
        )
    try:
        cls.check_prompts([*task.train_prompts, *task.eval_prompts, *task.validation_prompts])
    except UserError as error:
        fitting = [name for name in names() if read_yaml(_folder() / f"{name}.yaml", FILE).get("backbone") == backbone]
        instead = f"; choose another --task, such as {', '.join(fitting)}" if fitting else "; choose another --task"
        raise UserError(f"the backbone {backbone} cannot draw the prompts of task {task.name!r}: {error}{instead}") from None


def with_remote_reward(task: Task, config: RunConfig) -> Task:
    """The task, rewarded by the scorer at `scorer_url` where the configuration names one."""
    if not config.scorer_url:
        return task
    token: dict[str, Any] = {"token_file": str(config.scorer_token_file)} if config.scorer_token_file else {}
    return task.rewarded_by(RewardChoice(eval="remote", settings={"url": config.scorer_url, **token}))


def _folder() -> Path:
    return Path(str(resources.files("alignbench") / "tasks"))
