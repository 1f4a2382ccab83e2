"""The calls by which a run reports its progress; the classes that show it to a user are above the training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from alignbench.backbone import Backbone
from alignbench.config.run_config import RunConfig
from alignbench.records.record import Result
from alignbench.rollouts.plan import Plan

Row = dict[str, Any]
"""The numbers of one iteration."""


class Console(Protocol):
    """Receives the progress of a run. `Silent` shows nothing; `cli.views.run` shows it in a terminal."""

    def status(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def begin(self, config: RunConfig, policy: Backbone, plan: Plan, threads: int) -> None: ...
    def activity(self, what: str) -> Any: ...
    def training(self, iterations: int | None, done: float) -> Any: ...
    def end(self, result: Result, out: Path) -> None: ...


class Silent:
    """Shows nothing; for tests and notebooks."""

    def status(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def begin(self, config: RunConfig, policy: Backbone, plan: Plan, threads: int) -> None:
        pass

    @contextmanager
    def activity(self, what: str) -> Iterator[Callable[[str], None]]:
        yield lambda part: None

    @contextmanager
    def training(self, iterations: int | None, done: float) -> Iterator[Callable[[Row, float], None]]:
        yield lambda row, progress: None

    def end(self, result: Result, out: Path) -> None:
        pass


class Reporting(Silent):
    """Shows nothing, and calls a function after each iteration with its row and the progress of the training."""

    def __init__(self, report: Callable[[Row, float], None]) -> None:
        self.report = report

    @contextmanager
    def training(self, iterations: int | None, done: float) -> Iterator[Callable[[Row, float], None]]:
        yield self.report
