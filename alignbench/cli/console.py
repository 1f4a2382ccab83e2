"""Helpers for everything that is written to a terminal, and the views of a comparison."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from alignbench.records.record import Estimate

if TYPE_CHECKING:
    from alignbench.comparison.estimates import Costs
    from alignbench.comparison.grid import Grid
    from alignbench.comparison.record import CellRecord

RATIO_ROUNDING = 1e-5
"""Deviations of importance ratios from 1 up to this are rounding in float32."""
TIMED_NOW = "from model evaluations and images timed just now"

NARROW = 60
"""Width, in columns, below which a progress bar has no room for its numbers."""


def new_console(width: int = 120, *, stderr: bool = False, quiet: bool = False) -> RichConsole:
    """A console on stdout or stderr; `width` is used if the stream is not a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return RichConsole(stderr=stderr, quiet=quiet, highlight=False, width=None if stream.isatty() else width)


def moves(rich: RichConsole) -> bool:
    """Whether the console can show animated progress bars. FORCE_COLOR does not turn a file into a terminal."""
    return rich.file.isatty() and not rich.is_dumb_terminal and rich.width >= NARROW


def print_table(rich: RichConsole, table: Table) -> None:
    """Prints a table without breaking a word or a number; on a terminal that is too narrow, rows wrap instead."""
    roomy = rich.options.update(max_width=10_000)
    sizes = [[rich.measure(cell, options=roomy) for cell in (column.header, *column.cells)] for column in table.columns]
    least, most = ([max(getattr(size, end) for size in of_one) for of_one in sizes] for end in ("minimum", "maximum"))
    frame = 3 * len(sizes) + 1
    left = rich.width - frame - sum(least)
    if sum(most) + frame > rich.width:
        for i in sorted(
            range(len(sizes)), key=lambda i: most[i] - least[i]
        ):  # columns that need little more, which are numbers, get it first
            more = min(max(left, 0), most[i] - least[i])
            table.columns[i].width = least[i] + more
            left -= more
    if left < 0:
        rich = RichConsole(file=rich.file, quiet=rich.quiet, highlight=False, width=frame + sum(least))
    rich.print(table)


def format_duration(seconds: float) -> str:
    """Seconds as text in a convenient unit, such as `12 min`."""
    for limit, size, unit in ((100, 1, "s"), (100 * 60, 60, "min"), (np.inf, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    raise ValueError(f"{seconds} s is not a duration")


def format_value(estimate: Estimate) -> str:
    """The mean as text, or a dash if there is none."""
    return "-" if estimate.value is None else f"{estimate.value:.4g}"


def format_interval(estimate: Estimate, sign: str = "+") -> str:
    """The mean with its interval, `+0.12 (+0.08 to +0.16)`; an empty `sign` leaves the plus signs out."""
    if estimate.value is None:
        return "-"
    if estimate.lower is None or estimate.upper is None:
        return f"{estimate.value:{sign}.3g} (no interval)"
    return f"{estimate.value:{sign}.3g} ({estimate.lower:{sign}.3g} to {estimate.upper:{sign}.3g})"


def progress_numbers(row: Mapping[str, Any], iterations: int | None) -> str:
    """The numbers of the newest iteration, for a progress bar or a line.

    The deviation of importance ratios from 1 is shown where it is more than rounding.
    """
    deviation = row.get("ratio_abs_dev_max", 0.0)
    ratio = f"  max |ratio - 1| {deviation:.0e}" if deviation > RATIO_ROUNDING else ""
    of = "" if iterations is None else f"/{iterations}"
    at = f"iteration {row['iteration'] + 1}{of}  reward {row['reward']:.3f}"
    return f"{at}{ratio}  {row['seconds']:.1f} s/it"


class Count(Protocol):
    """A callback that takes how many of how many are done, and a note to show beside the numbers."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def counting(what: str) -> Iterator[Count]:
    """A progress bar on stderr, or a line for each tenth if stderr is not a terminal."""
    rich = new_console(stderr=True)

    def line(done: int, total: int, note: str = "") -> None:
        if done * 10 // total > (done - 1) * 10 // total:
            rich.print(f"{done}/{total} {what}{note and ', ' + note}")

    if not moves(rich):
        yield line
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=rich) as progress:
        bar = progress.add_task(what, total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            progress.update(bar, completed=done, total=total, note=note)

        yield update


class GridProgress:
    """Progress of a comparison on stderr: a bar for all cells, one for each running cell, a line for each that has ended."""

    def __init__(self, cells: int, done: int) -> None:
        self.rich = new_console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[numbers]}"))
        self.progress = Progress(*columns, TimeElapsedColumn(), console=self.rich, disable=not moves(self.rich))
        self.total = self.progress.add_task("cells", total=cells, completed=done, numbers=f"{done}/{cells}")
        self.cells, self.done = cells, done
        self.bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        # Older versions of rich print an empty line at the end of a bar that is not shown.
        if moves(self.rich):
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if moves(self.rich):
            self.progress.stop()

    def began(self, cell: str) -> None:
        self.bars[cell] = self.progress.add_task(cell, total=1.0, numbers="evaluating the base model")

    def moved(self, cell: str, row: Mapping[str, Any], progress: float) -> None:
        self.progress.update(self.bars[cell], completed=progress, numbers=progress_numbers(row, None))

    def ended(self, record: "CellRecord") -> None:
        self.done += 1
        if record.id in self.bars:
            self.progress.remove_task(self.bars.pop(record.id))
        self.progress.update(self.total, completed=self.done, numbers=f"{self.done}/{self.cells}")
        outcome = f"[bold red]failed[/bold red]: {escape(record.error)}" if record.error else "done"
        self.rich.print(f"{self.done}/{self.cells}  {escape(record.id)}  {outcome}", soft_wrap=True)


def show_grid(grid: "Grid", out: Path, costs: "Costs", workers: int, processes: int, done: int) -> None:
    """Prints on stdout what a comparison will run.

    Args:
        costs: the expected costs.
        done: cells that have a record already.
    """
    rich = new_console()
    budgets = dict.fromkeys(_limits(cost.method.grid) for cost in costs.methods)
    columns = [*(["part"] if grid.parts else []), "objective", "sampler"]
    table = Table(title=f"budget per cell: {' or '.join(budgets)}", title_justify="left")
    for column in (*columns, "model evaluations per iteration", "iterations", "time per cell"):
        table.add_column(column, justify="left" if column in columns else "right")
    for cost in costs.methods:
        numbers = (f"{cost.rows:,.0f}", f"{cost.iterations:,.0f}", format_duration(cost.seconds))
        table.add_row(*(escape(getattr(cost.method, column)) for column in columns), *numbers)
    print_table(rich, table)
    cells = sum(cost.cells for cost in costs.methods)
    seconds = (
        sum(cost.cells * cost.seconds for cost in costs.methods) * (cells - done) / cells / workers
        + costs.front_seconds
        + costs.report_seconds
    )
    parts = [(len(costs.methods), "method"), (len(grid.tasks), "task"), (len(grid.seeds), "seed")]
    product = (
        " x ".join(_several(*part) for part in parts) + " = " if not grid.parts else f"{_several(len(grid.parts), 'part')}, "
    )
    sharing = f"; the speed-up from {processes} processes per cell is not included" if processes > 1 else ""
    front = f", of which {format_duration(costs.front_seconds)} for the front" if costs.front_seconds else ""
    rich.print(
        f"{product}{_several(cells, 'cell')}, of which {done} are done; about {format_duration(seconds)} on this machine with "
        f"{_several(workers, 'worker')}{front}, {TIMED_NOW}{sharing}"
    )
    rich.print(f"output folder: [bold]{escape(str(out))}[/bold] (nothing has been written)")


def _limits(grid: "Grid") -> str:
    return ", ".join(f"{name} {limit:,}" for name, limit in grid.budget.model_dump(exclude_none=True).items())


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
