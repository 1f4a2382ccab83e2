"""Tasks: prompts to train on, to validate on and to test on, the reward, and independent judges. One YAML file each."""

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

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
"""What errors call it."""
LARGE = 100_000_000
"""Bytes of a file above which a fingerprint has its size alone."""


class EvalChoice(Settings):
    """An eval, the name its metrics go by, and its settings."""

    eval: str
    label: str | None = None
    """Name of its first metric; the eval's own name where it is null."""
    settings: dict[str, Any] = Field(default_factory=dict)


class RewardChoice(EvalChoice):
    weight: float = 1.0
    """In the sum that is trained on; one of weight 0 is scored for objectives that compare rewards (gardo)."""


class TaskConfig(Settings):
    """The content of a task's YAML file."""

    description: str
    train_prompts: str | list[str]
    """A prompt file (see `alignbench.tasks.prompts`), relative to the YAML file; several take turns."""
    eval_prompts: str | list[str]
    """Test prompts, on which the base model and the trained model are compared; no run trains on them, and no choice
    (a stop rule, a checkpoint, tuning) is made by them. Of prompts that differ in case and blanks alone the first is taken."""
    validation_prompts: str | list[str] | None = None
    """Prompts on which a run is evaluated along its training (`evaluation.every`), and by which settings are tuned; neither
    training nor test prompts. Without them a run of this task has no curve."""
    same_prompts: bool = False
    """The three sets may share prompts: for a task whose question is the distribution of these very prompts' images."""
    reward: list[RewardChoice] = Field(min_length=1)
    judges: list[EvalChoice] = Field(default_factory=list)


class Task:
    """A task with its prompts read and checked."""

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
        known = set(map(prompt_identity, first))
        shared = [prompt for prompt in second if prompt_identity(prompt) in known]
        if shared:
            raise UserError(
                f"task {self.name!r} would be {what} ({len(shared)}, such as {excerpt(min(shared))}); "
                "take them out of one of the two files"
            )

    def fingerprint(self) -> dict[str, str]:
        """Part of the task -> SHA-256 of what is in it: two tasks that are equal in all of them ask and reward the same."""
        reward, judges = ([c.model_dump(mode="json") for c in cs] for cs in (self.config.reward, self.config.judges))
        parts: dict[str, Any] = {"training prompts": self.train_prompts, "evaluation prompts": self.eval_prompts}
        if self.validation_prompts:
            parts["validation prompts"] = self.validation_prompts
        parts |= {"reward": [reward, _files_in(reward)], "judges": [judges, _files_in(judges)]}
        return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}

    def weighted(self, weights: Mapping[str, float]) -> "Task":
        """The same task with other weights of its rewards.

        Args:
            weights: name of a reward -> its weight; other rewards keep theirs.

        Raises:
            UserError: the task has no such reward, or every weight would be 0.
        """
        names = [choice.label or choice.eval for choice in self.config.reward]
        for name in weights:
            if name not in names:
                raise UserError(f"reward.{name}: task {self.name!r} has no such reward{did_you_mean(name, names)}")
        reward = [
            choice.model_copy(update={"weight": weights.get(name, choice.weight)})
            for name, choice in zip(names, self.config.reward, strict=True)
        ]
        if not any(choice.weight for choice in reward):
            raise UserError(f"task {self.name!r}: every reward has weight 0, so there is nothing to train on")
        other = copy.copy(self)
        other.config = self.config.model_copy(update={"reward": reward})
        return other

    def on_validation_prompts(self) -> TaskConfig:
        """The content of a task whose models are evaluated on this task's validation prompts in place of its test prompts.

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
        """The same prompts with another reward; the former ones judge, before the judges."""
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
        """The same prompts with other judges, and nothing to train on."""
        other = copy.copy(self)
        other.config = self.config.model_copy(update={"reward": [], "judges": choices})
        return other

    def choices(self, names: Sequence[str], settings: Mapping[str, dict[str, Any]]) -> list[EvalChoice]:
        """Evals by name, set as this task sets them where it has them (by label or name), and then by `settings`.

        Those that it does not have pass over prompts that they say nothing about.

        Raises:
            UserError: settings of an eval that is not among the names, or an unknown eval.
        """
        from alignbench.scorer import Metric

        for name in settings:
            if name not in names:
                raise UserError(f"there are settings for the eval {name!r}, which is not asked for{did_you_mean(name, names)}")
        known = {c.label or c.eval: c for c in reversed([*self.config.reward, *self.config.judges])}
        found = []
        for name in names:
            choice = known.get(name) or EvalChoice(eval=name, settings=registry.find("evals", name, Metric).skip_settings)
            merged = {**choice.settings, **settings.get(name, {})}
            found.append(EvalChoice(eval=choice.eval, label=choice.label, settings=merged))
        return found


def _prompts(folder: Path, files: str | list[str]) -> list[str]:
    listed = [files] if isinstance(files, str) else files
    return interleaved([read_prompts(local_path(file, folder), pipe=False) for file in listed])


def _absolute(folder: Path, files: str | list[str]) -> str | list[str]:
    """Prompt files as a task names them, with absolute paths."""
    listed = [str(absolute(local_path(file, folder))) for file in ([files] if isinstance(files, str) else files)]
    return listed[0] if isinstance(files, str) else listed


def changed_parts(now: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
    """The parts in which two fingerprints differ; parts that one of them lacks are left."""
    return [part for part in now if part in then and now[part] != then[part]]


def refuse_changed(parts: Sequence[str], what: str) -> None:
    """Raises UserError where parts of a task changed since `what` was made."""
    if parts:
        raise UserError(
            f"the {' and '.join(parts)} changed since {what} was made; put the task's files back as they were, or start anew "
            "with another --out"
        )


def _files_in(settings: Any) -> list[str]:
    """SHA-256 of each local file that a setting names, such as GenEval's metadata, but for folders of weights and tokens."""
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
        return []  # whoever reads it will say so


def names() -> list[str]:
    """Names of the tasks that ship."""
    return sorted(f.stem for f in _folder().glob("*.yaml"))


def describe() -> dict[str, str]:
    """Name -> what the task is."""
    return {name: str(read_yaml(_folder() / f"{name}.yaml", FILE)["description"]) for name in names()}


def load_task(name: str) -> Task:
    """A task that ships, by name, or any by the path of its YAML file.

    Raises:
        UserError: there is none of that name, or its file or prompts are wrong.
    """
    file = Path(tasks_path(name)) if name.endswith((".yaml", ".yml")) else _folder() / f"{name}.yaml"
    if not os.path.isfile(file):  # which takes any name, as long as it may be
        raise UserError(f"there is no task {name!r}{did_you_mean(name, names())}")
    return Task(file.stem, validate(TaskConfig, read_yaml(file, FILE), where=str(file.name)), file.parent)


def configured_task(config: RunConfig) -> Task:
    """The task of a run's configuration, with the configuration's weights of rewards.

    Raises:
        UserError: as `load_task`; or a weight is not that of one of the task's rewards.
    """
    task = load_task(config.task)
    if not config.reward:
        return task
    if config.scorer_url:
        raise UserError("reward sets weights of the task's rewards, which scorer_url replaces; leave one of them out")
    return task.weighted(config.reward)


def with_remote_reward(task: Task, config: RunConfig) -> Task:
    """The task, rewarded by the scorer at `scorer_url` where the configuration names one."""
    if not config.scorer_url:
        return task
    token: dict[str, Any] = {"token_file": str(config.scorer_token_file)} if config.scorer_token_file else {}
    return task.rewarded_by(RewardChoice(eval="remote", settings={"url": config.scorer_url, **token}))


def _folder() -> Path:
    return Path(str(resources.files("alignbench") / "tasks"))
