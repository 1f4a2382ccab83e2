"""Tasks: prompts to train on, other prompts to judge on, the reward and the judges. One YAML file each."""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from alignbench.config import validate
from alignbench.errors import UserError, did_you_mean
from alignbench.settings import Settings


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
    train_prompts: str
    """A text file with a prompt a line, relative to the YAML file."""
    eval_prompts: str
    """Prompts that no run trains on."""
    same_prompts: bool = False
    """Judge on the training prompts: for a task whose question is the law of these very prompts' pictures."""
    reward: list[RewardChoice] = Field(min_length=1)
    judges: list[EvalChoice] = Field(default_factory=list)


class Task:
    """A task with its prompts read and checked."""

    def __init__(self, name: str, config: TaskConfig, folder: Path) -> None:
        self.name, self.config = name, config
        self.train_prompts = read_prompts(folder / config.train_prompts)
        self.eval_prompts = read_prompts(folder / config.eval_prompts)
        shared = set(self.train_prompts) & set(self.eval_prompts)
        if shared and not config.same_prompts:
            raise UserError(
                f"task {name!r} would be judged on prompts it trains on ({len(shared)}, such as {min(shared)!r}); "
                "take them out of one of the two files"
            )


def read_prompts(file: Path) -> list[str]:
    """Non-empty lines of a text file.

    Raises:
        UserError: the file cannot be read or holds no prompt.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {file}: {getattr(error, 'strerror', None) or error}") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"{file} holds no prompt")
    return prompts


def names() -> list[str]:
    """Names of the tasks that ship."""
    return sorted(f.stem for f in _folder().glob("*.yaml"))


def describe() -> dict[str, str]:
    """Name -> what the task is."""
    return {name: str(_read(_folder() / f"{name}.yaml")["description"]) for name in names()}


def load_task(name: str) -> Task:
    """A task that ships, by name, or any by the path of its YAML file.

    Raises:
        UserError: there is none of that name, or its file or prompts are wrong.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else _folder() / f"{name}.yaml"
    if not file.is_file():
        raise UserError(f"there is no task {name!r}{did_you_mean(name, names())}")
    return Task(file.stem, validate(TaskConfig, _read(file), where=str(file.name)), file.parent)


def _folder() -> Path:
    return Path(str(resources.files("alignbench") / "tasks"))


def _read(file: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the task file {file}: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"the task file {file} must hold keys and values")
    return data
