"""What a person sees while a run goes on: progress on stderr, and a summary at the end."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from alignbench.backbone import Backbone
from alignbench.config import RunConfig
from alignbench.plan import Plan
from alignbench.record import Estimate, EvalRecord, MetricRecord, Result

if TYPE_CHECKING:
    from alignbench.checking import CheckResult

Row = dict[str, Any]


class Console(Protocol):
    """What a run tells; `Silent` says nothing, `Terminal` shows it to a person."""

    def status(self, text: str) -> None: ...
    def begin(self, config: RunConfig, policy: Backbone, plan: Plan, threads: int) -> None: ...
    def activity(self, what: str) -> Any: ...
    def training(self, iterations: int, done: int) -> Any: ...
    def end(self, result: Result, out: Path) -> None: ...


class Silent:
    """For tests and notebooks."""

    def status(self, text: str) -> None:
        pass

    def begin(self, config: RunConfig, policy: Backbone, plan: Plan, threads: int) -> None:
        pass

    @contextmanager
    def activity(self, what: str) -> Iterator[Callable[[str], None]]:
        yield lambda part: None

    @contextmanager
    def training(self, iterations: int, done: int) -> Iterator[Callable[[Row], None]]:
        yield lambda row: None

    def end(self, result: Result, out: Path) -> None:
        pass


class Terminal:
    """Live bars on a terminal, plain lines where stderr is no terminal."""

    def __init__(self) -> None:
        self.rich = RichConsole(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)

    def status(self, text: str) -> None:
        self.rich.print(f"[dim]{text} ...[/dim]")

    def begin(self, config: RunConfig, policy: Backbone, plan: Plan, threads: int) -> None:
        groups = config.prompts_per_iteration
        on = f"{policy.device}, {threads} threads" if policy.device.type == "cpu" else str(policy.device)
        self.rich.print(
            f"[bold]{config.objective.name}[/bold] x [bold]{config.sampler.name}[/bold] on {config.backbone.name}, task "
            f"{config.task}, seed {config.seed}, preset {config.preset} ({on})"
        )
        if config.pairs:
            self.rich.print(f"{config.iterations} iterations of {groups} pairs from {config.pairs}; nothing is rolled out")
            return
        self.rich.print(
            f"{config.iterations} iterations of {groups} prompts x {plan.leaves} rollouts; each costs "
            f"{plan.model_rows(groups)} model rows to draw and {plan.replay_rows(groups)} to train on"
        )

    @contextmanager
    def activity(self, what: str) -> Iterator[Callable[[str], None]]:
        if not self.rich.is_terminal:
            self.rich.print(f"judging the {what}")
            yield lambda part: None
            return
        with self.rich.status(f"judging the {what}") as status:
            yield lambda part: status.update(f"judging the {what}: {part}")

    @contextmanager
    def training(self, iterations: int, done: int) -> Iterator[Callable[[Row], None]]:
        if not self.rich.is_terminal:
            yield lambda row: self._line(row, iterations)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.rich) as progress:
            bar = progress.add_task("training", total=iterations, completed=done, numbers="")
            yield lambda row: progress.update(bar, advance=1, numbers=self._numbers(row))

    def _line(self, row: Row, iterations: int) -> None:
        every = max(1, iterations // 20)
        if row["iteration"] % every == 0 or row["iteration"] + 1 == iterations:
            left = (iterations - row["iteration"] - 1) * row["seconds"]
            self.rich.print(f"iteration {row['iteration'] + 1}/{iterations}  {self._numbers(row)}  about {left:.0f} s left")

    @staticmethod
    def _numbers(row: Row) -> str:
        deviation = row.get("ratio_abs_dev_max", 0.0)
        return f"reward {row['reward']:.3f}  ratio off by {deviation:.0e}  {row['seconds']:.1f} s/it"

    def end(self, result: Result, out: Path) -> None:
        table = Table(title=f"{result.run.objective} x {result.run.sampler}: before and after", title_justify="left")
        for column in ("metric", "base", "trained", "difference (95 % interval)", ""):
            table.add_column(column, justify="left" if column in ("metric", "") else "right")
        for name, metric in result.metrics.items():
            label = f"[bold]{name}[/bold] (reward)" if metric.role == "reward" else name
            table.add_row(label, shown(metric.base), shown(metric.final), with_interval(metric.difference), verdict(metric))
        self.rich.print(table)
        b, p = result.budget, result.protocol
        self.rich.print(
            f"protocol: {p.prompts} evaluation prompts x {p.images_per_prompt} pictures, {p.steps} ODE steps, "
            f"guidance {p.guidance:g}, {p.weights} weights; intervals over prompts, differences paired"
        )
        phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in b.seconds_by_phase.items())
        self.rich.print(
            f"spent: {b.model_rows_rollout + b.model_rows_train:,} model rows ({b.model_rows_rollout:,} rollout, "
            f"{b.model_rows_train:,} training), {b.reward_calls:,} reward calls, {b.seconds:.0f} s of training ({phases}), "
            f"{b.seconds_evaluation:.0f} s of judging, {b.peak_memory_bytes / 2**30:.1f} GiB peak memory"
        )
        for alarm in result.alarms:
            self.rich.print(f"[bold red]alarm:[/bold red] {alarm}")
        self.rich.print(
            f"written to [bold]{out}[/bold]: result.json, metrics.parquet, evals.parquet, samples/, plots/, checkpoints/"
        )


@contextmanager
def counting(total: int, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, or a line for each tenth where it is no terminal; told how many are done and how many pairs found."""
    rich = RichConsole(stderr=True, highlight=False)
    if not rich.is_terminal:
        every = max(1, total // 10)
        yield lambda done, found: rich.print(f"{done}/{total} {what}, {found} pairs") if done % every == 0 else None
        return
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[found]} pairs"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=rich) as progress:
        bar = progress.add_task(what, total=total, found=0)
        yield lambda done, found: progress.update(bar, completed=done, found=found)


class Checklist:
    """A line for each check as soon as it is done, on stdout; a count of them at the end."""

    def __init__(self, silent: bool) -> None:
        self.rich = RichConsole(quiet=silent, highlight=False, width=None if sys.stdout.isatty() else 120)
        self.failed = self.done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.rich.print(f"{self.done - self.failed} of {self.done} checks hold" + (", the others fail" * bool(self.failed)))

    def add(self, result: "CheckResult") -> "CheckResult":
        """Shows the result and gives it back."""
        mark, style = {True: ("holds", "green"), None: ("does not apply", "dim"), False: ("FAILS", "bold red")}[result.holds]
        if result.holds is False and not result.required:
            mark, style = "does not hold", "yellow"
        self.done += result.holds is not None and (result.required or result.holds)
        self.failed += result.failed
        self.rich.print(f"{result.name:<29}[{style}]{mark:<16}[/{style}]{result.detail}", soft_wrap=True)
        return result


class Judgement:
    """What `eval` is doing, on stderr, and its table on stdout."""

    def __init__(self, silent: bool) -> None:
        self.rich = RichConsole(quiet=silent, highlight=False, width=None if sys.stdout.isatty() else 120)
        self.status = RichConsole(stderr=True, quiet=silent, highlight=False).status("starting")

    def __enter__(self) -> Self:
        self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.status.stop()

    def advance(self, what: str) -> None:
        self.status.update(what)

    def end(self, record: EvalRecord, out: Path | None) -> None:
        p = record.protocol
        table = Table(title=f"{p.source} {p.path}", title_justify="left")
        for column in ("metric", "mean", "95 % interval", "prompts", "better"):
            table.add_column(column, justify="left" if column in ("metric", "better") else "right")
        for name, metric in record.metrics.items():
            lower, upper = ("-" if bound is None else f"{bound:.4g}" for bound in (metric.lower, metric.upper))
            better = {True: "higher", False: "lower", None: ""}[metric.higher_is_better]
            table.add_row(name, shown(metric), f"{lower} to {upper}", str(metric.n), better)
        self.rich.print(table)
        drawn = "" if p.steps is None else f", {p.steps} ODE steps, guidance {p.guidance:g}, {p.weights} weights"
        self.rich.print(f"{p.pictures} pictures of {p.prompts} prompts{drawn}; intervals over prompts")
        if record.failed_scores:
            self.rich.print(f"[yellow]{record.failed_scores} scores are missing: their scorers gave up on the item[/yellow]")
        if out is not None:
            self.rich.print(f"written to [bold]{out}[/bold]")


def shown(estimate: Estimate) -> str:
    """The mean with enough digits, or a dash."""
    return "-" if estimate.value is None else f"{estimate.value:.4g}"


def with_interval(estimate: Estimate) -> str:
    """`+0.12 (0.08 to 0.16)`."""
    if estimate.value is None:
        return "-"
    lower = "-inf" if estimate.lower is None else f"{estimate.lower:+.3g}"
    upper = "inf" if estimate.upper is None else f"{estimate.upper:+.3g}"
    return f"{estimate.value:+.3g} ({lower} to {upper})"


def verdict(metric: MetricRecord) -> str:
    """Whether the difference is beyond its interval, and in which direction."""
    change = metric.difference
    if change.lower is None or change.upper is None or change.lower <= 0 <= change.upper:
        return "no clear change"
    rose = change.lower > 0
    if metric.higher_is_better is None:
        return "rose" if rose else "fell"
    return "better" if rose == metric.higher_is_better else "worse"
