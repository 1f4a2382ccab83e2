"""What the modules of commands share: the class that registers a command, and how options are read."""

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import typer

from alignbench import registry
from alignbench.errors import UserError
from alignbench.files.paths import local_path
from alignbench.files.writing import LOCK, is_free

F = TypeVar("F", bound=Callable[..., Any])
EXECUTION_DEFAULTS: dict[str, Any] = {"engine": "local", "workers": 1, "processes": 1, "gpus": 0.0}
"""How cells are run, where the options of a command do not say."""


class Commands(typer.Typer):
    """A group of commands under one heading of `--help`.

    A path may begin with `~` in every option alike: a shell does not expand it in quotes and after `--out=`.
    """

    def __init__(self, heading: str, **options: Any) -> None:
        super().__init__(**options)
        self.heading = heading

    def command(self, name: str | None = None, **options: Any) -> Callable[[F], F]:
        register = super().command(name, **{"rich_help_panel": self.heading, **options})

        def decorate(function: F) -> F:
            @wraps(function)
            def with_paths(**values: Any) -> Any:
                return function(**{key: _expanded(value) for key, value in values.items()})

            register(with_paths)
            return function

        return decorate


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    return local_path(value) if isinstance(value, Path) else value


def config_of(run: Path) -> Path:
    """The configuration file in a run's folder; raises UserError if the folder has none."""
    file = run / "config.yaml"
    if run.is_dir() and not file.is_file() and (run / LOCK).exists() and is_free(run):
        raise UserError(f"the run in {run} ended before it wrote anything; start it again with --out {run}")
    if not file.is_file():
        raise UserError(f"{run} is not a run folder (no config.yaml)")
    return file


def names(text: str) -> list[str]:
    """The names in a list that is separated by commas."""
    return [name for name in (part.strip() for part in text.split(",")) if name]


def seeds(text: str) -> list[int]:
    """The seeds that an option asks for: `5` is the first five, `3,7` are these two.

    Raises:
        UserError: the text is neither.
    """
    try:
        numbers = [int(part) for part in names(text)]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or (numbers == [0] and "," not in text):
        raise UserError(f"--seeds takes a number of seeds, such as 5, or a list of them, such as 3,7; got {text!r}")
    return numbers if "," in text else list(range(numbers[0]))


def whole_numbers(text: str, option: str) -> list[int]:
    """The positive whole numbers in a list that is separated by commas; raises UserError that names the option."""
    parts = names(text)
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option} takes whole numbers above 0, separated by commas; got {text!r}")
    return [int(part) for part in parts]


def eval_settings(assigned: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Takes the settings of metrics, `evals.NAME.key=value`, out of what `--set` assigns: metric -> its settings.

    Raises:
        UserError: they are not settings of metrics by name.
    """
    settings = assigned.pop("evals", {})
    if not (isinstance(settings, dict) and all(isinstance(of_one, dict) for of_one in settings.values())):
        raise UserError("--set takes settings of metrics as evals.NAME.key=value")
    return settings


def without_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were typed."""
    return {key: value for key, value in options.items() if value is not None}


def results_folder(*parts: str) -> Path:
    """`results/<time>-<parts>`, the folder of a command that was given none."""
    name = "-".join(registry.file_name(part) for part in parts)
    return Path("results") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"


@contextmanager
def interruptible(command: str, folder: Path, execution: Mapping[str, Any]) -> Iterator[None]:
    """Ends a command that runs cells on Ctrl-C with the line that resumes it.

    Args:
        command: its name.
        folder: of its cells.
        execution: how they are run; options with their default are left out of the line.
    """
    try:
        yield
    except KeyboardInterrupt:
        words = ["alignbench", command, "--out", str(folder)]
        for key, value in execution.items():
            if value != EXECUTION_DEFAULTS[key]:
                words += [f"--{key}", f"{value:g}" if isinstance(value, float) else str(value)]
        typer.echo(f"alignbench: interrupted; resume with: {shlex.join(words)}", err=True)
        raise typer.Exit(130) from None
