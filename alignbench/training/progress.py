"""What a run tells while it goes on; who shows it to a person is above the training."""

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
    """What a run tells; `Silent` says nothing, `Terminal` shows it to a person."""

    def status(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def begin(self, config: RunConfig, policy: Backbone, plan: Plan, threads: int) -> None: ...
    def activity(self, what: str) -> Any: ...
    def training(self, iterations: int | None, done: float) -> Any: ...
    def end(self, result: Result, out: Path) -> None: ...


class Silent:
    """For tests and notebooks."""

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
    """Says nothing, and tells a function of each iteration: its row, and how far the training is."""

    def __init__(self, report: Callable[[Row, float], None]) -> None:
        self.report = report

    @contextmanager
    def training(self, iterations: int | None, done: float) -> Iterator[Callable[[Row, float], None]]:
        yield self.report
