"""What a person sees while a run goes on: progress on stderr, and a summary at the end."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from rich.console import Console as RichConsole
from rich.markup import escape
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from alignbench.backbone import Backbone
from alignbench.config.run_config import RunConfig
from alignbench.records.record import Estimate, EvalRecord, MetricRecord, Result
from alignbench.rollouts.plan import Plan
from alignbench.statistics import CONFIDENCE
from alignbench.training.progress import Row

if TYPE_CHECKING:
    from alignbench.authoring.checking import CheckResult
    from alignbench.authoring.describing import Description
    from alignbench.comparison.compare import CellRecord, Grid, PairCost
    from alignbench.diagnosis.diagnose import Diagnosis
    from alignbench.frontier.front import Front
    from alignbench.training.costs import Forecast

TIMED_NOW = "from model rows and pictures timed now"


NARROW = 60
"""Columns below which a bar has no room for its numbers."""


def _console(width: int = 120, *, stderr: bool = False, quiet: bool = False) -> RichConsole:
    """The terminal, or a stream that is none, with so many columns."""
    stream = sys.stderr if stderr else sys.stdout
    return RichConsole(stderr=stderr, quiet=quiet, highlight=False, width=None if stream.isatty() else width)


def _moves(rich: RichConsole) -> bool:
    """Whether it can show bars that move; FORCE_COLOR makes a file no terminal."""
    return rich.file.isatty() and not rich.is_dumb_terminal and rich.width >= NARROW


def _print_table(rich: RichConsole, table: Table) -> None:
    """Prints a table in which every word and number is whole; on a terminal that is too narrow, its lines go on below."""
    roomy = rich.options.update(max_width=10_000)
    sizes = [[rich.measure(cell, options=roomy) for cell in (column.header, *column.cells)] for column in table.columns]
    least, most = ([max(getattr(size, end) for size in of_one) for of_one in sizes] for end in ("minimum", "maximum"))
    frame = 3 * len(sizes) + 1
    left = rich.width - frame - sum(least)
    if sum(most) + frame > rich.width:
        for i in sorted(range(len(sizes)), key=lambda i: most[i] - least[i]):  # what lacks little comes first: numbers
            more = min(max(left, 0), most[i] - least[i])
            table.columns[i].width = least[i] + more
            left -= more
    if left < 0:
        rich = RichConsole(file=rich.file, quiet=rich.quiet, highlight=False, width=frame + sum(least))
    rich.print(table)


class Terminal:
    """Live bars on a terminal, plain lines where stderr is no terminal."""

    def __init__(self) -> None:
        self.rich = _console(stderr=True)

    def status(self, text: str) -> None:
        self.rich.print(f"[dim]{escape(text)} ...[/dim]")

    def warn(self, text: str) -> None:
        self.rich.print(f"[yellow]{escape(text)}[/yellow]", soft_wrap=True)

    def begin(self, config: RunConfig, policy: Backbone, plan: Plan, threads: int) -> None:
        groups = config.prompts_per_iteration
        on = f"{policy.device}, {threads} threads" if policy.device.type == "cpu" else str(policy.device)
        self.rich.print(
            f"[bold]{escape(config.objective.title)}[/bold] x [bold]{escape(config.sampler.title)}[/bold] on "
            f"{escape(config.backbone.name)}, task {escape(config.task)}, seed {config.seed}, preset {config.preset} ({on})"
        )
        length = "iterations" if config.iterations is None else f"{config.iterations} iterations"
        if config.pairs:
            self.rich.print(f"{length} of {groups} pairs from {escape(str(config.pairs))}; nothing is rolled out")
            return
        self.rich.print(
            f"{length} of {groups} prompts x {plan.leaves} rollouts; each costs "
            f"{plan.model_rows(groups)} model rows to draw and {plan.replay_rows(groups)} to train on"
        )

    @contextmanager
    def activity(self, what: str) -> Iterator[Callable[[str], None]]:
        if not _moves(self.rich):
            self.rich.print(f"judging the {what}")
            yield lambda part: None
            return
        with self.rich.status(f"judging the {what}") as status:
            yield lambda part: status.update(f"judging the {what}: {part}")

    @contextmanager
    def training(self, iterations: int | None, done: float) -> Iterator[Callable[[Row, float], None]]:
        if not _moves(self.rich):
            yield _Lines(self.rich, iterations, done)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("training"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.rich) as progress:
            bar = progress.add_task("training", total=1.0, numbers="")
            progress.update(bar, completed=done)
            yield lambda row, share: progress.update(bar, completed=share, numbers=_numbers(row, iterations))

    def end(self, result: Result, out: Path) -> None:
        pair = escape(" x ".join(result.pair))
        table = Table(title=f"{pair}: before and after", title_justify="left")
        for column in ("metric", "base", "trained", "difference (95 % interval)", ""):
            table.add_column(column, justify="left" if column in ("metric", "") else "right")
        for name, metric in result.metrics.items():
            label = f"[bold]{escape(name)}[/bold] (reward)" if metric.role == "reward" else escape(name)
            table.add_row(label, shown(metric.base), shown(metric.final), with_interval(metric.difference), verdict(metric))
        _print_table(self.rich, table)
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
            self.rich.print(f"[bold red]alarm:[/bold red] {escape(alarm)}")
        if b.micro_batch_halvings:
            self.rich.print(f"memory ran out {b.micro_batch_halvings} times; model calls ended with {b.micro_batch} rows")
        self.rich.print(
            f"written to [bold]{escape(str(out))}[/bold]: "
            "result.json, metrics.parquet, evals.parquet, samples/, plots/, checkpoints/"
        )


class GridProgress:
    """The cells of a comparison on stderr: a bar for all, one for each at work, and a line for each that ended."""

    def __init__(self, cells: int, done: int) -> None:
        self.rich = _console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[numbers]}"))
        self.progress = Progress(*columns, TimeElapsedColumn(), console=self.rich, disable=not _moves(self.rich))
        self.total = self.progress.add_task("cells", total=cells, completed=done, numbers=f"{done}/{cells}")
        self.cells, self.done = cells, done
        self.bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        # Older versions of rich end a bar that nobody sees with an empty line.
        if _moves(self.rich):
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if _moves(self.rich):
            self.progress.stop()

    def began(self, cell: str) -> None:
        self.bars[cell] = self.progress.add_task(cell, total=1.0, numbers="judging the base model")

    def moved(self, cell: str, row: Mapping[str, Any], progress: float) -> None:
        self.progress.update(self.bars[cell], completed=progress, numbers=_numbers(row, None))

    def ended(self, record: "CellRecord") -> None:
        self.done += 1
        if record.id in self.bars:
            self.progress.remove_task(self.bars.pop(record.id))
        self.progress.update(self.total, completed=self.done, numbers=f"{self.done}/{self.cells}")
        outcome = f"[bold red]failed[/bold red]: {escape(record.error)}" if record.error else "done"
        self.rich.print(f"{self.done}/{self.cells}  {escape(record.id)}  {outcome}", soft_wrap=True)


def show_grid(grid: "Grid", out: Path, costs: "list[PairCost]", workers: int, processes: int, done: int) -> None:
    """What a comparison will run, on stdout."""
    rich = _console()
    limits = ", ".join(f"{name} {limit:,}" for name, limit in grid.budget.model_dump(exclude_none=True).items())
    table = Table(title=f"budget of each cell: {limits}", title_justify="left")
    for column in ("objective", "sampler", "rows an iteration", "iterations", "time of a cell"):
        table.add_column(column, justify="left" if column in ("objective", "sampler") else "right")
    for cost in costs:
        numbers = (f"{cost.rows:,.0f}", f"{cost.iterations:,.0f}", duration(cost.seconds))
        table.add_row(cost.objective, cost.sampler, *numbers)
    _print_table(rich, table)
    cells = len(costs) * len(grid.tasks) * len(grid.seeds)
    seconds = sum(cost.seconds for cost in costs) / len(costs) * (cells - done) / workers
    rich.print(
        f"{_several(len(costs), 'pair')} x {_several(len(grid.tasks), 'task')} x {_several(len(grid.seeds), 'seed')} = "
        f"{_several(cells, 'cell')}, of which {done} are done; "
        f"about {duration(seconds)} on this machine with {_several(workers, 'worker')}, {TIMED_NOW}"
        + f"; that {processes} processes share a cell is not reckoned in"
        * (processes > 1)
    )
    rich.print(f"would be written to [bold]{escape(str(out))}[/bold]")


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def show_forecast(found: "Forecast", config: RunConfig, out: Path) -> None:
    """What a run will do, on stdout."""
    rich = _console()
    length = "iterations until the budget is spent" if found.iterations is None else f"{found.iterations} iterations"
    rich.print(
        f"[bold]{config.objective.name}[/bold] x [bold]{config.sampler.name}[/bold] on {config.backbone.name}: {length} of "
        f"{config.prompts_per_iteration} prompts, {found.pictures:,} pictures and {found.rows:,.0f} model rows each"
    )
    extra = {"gradient caching": found.double_passes, "the reference": found.reference, "the behaviour policy": found.behaviour}
    besides = " and ".join(name for name, wanted in extra.items() if wanted)
    table = Table(title="an iteration", title_justify="left")
    for column in ("", "rows", ""):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("rollout", f"{found.rollout_rows:,.0f}", f"at most {found.call_rows:,} in one call")
    passes = f"{found.updates} update{'s' * (found.updates > 1)}"
    table.add_row("replay, one pass", f"{found.replay_rows:,.0f}", passes + (besides and f"; more rows for {besides}"))
    table.add_row("decode and score", f"{found.pictures:,}", "pictures")
    _print_table(rich, table)
    total = sum(found.parameters.values())
    parts = ", ".join(f"{name} {count:,}" for name, count in found.parameters.items())
    rich.print(f"{total:,} parameters ({parts}), of which {found.trained:,} are trained")
    m = found.memory
    table = Table(title=f"memory on {found.device}, estimated", title_justify="left")
    for column in ("", "GiB"):
        table.add_column(column, justify="right" if column else "left")
    for name, size in (
        ("weights", m.weights),
        ("text encoders, only before the training", m.text_encoders),
        ("gradients", m.gradients),
        ("optimizer", m.optimizer),
        ("averaged weights", m.ema),
        ("one model call of the rollout", m.rollout),
        ("one micro-batch there and back", m.training),
        ("decoding", m.decoding),
        ("most at one time", m.peak),
    ):
        table.add_row(name, f"{size / 2**30:,.3f}")
    _print_table(rich, table)
    rich.print("scorers, libraries and gaps between tensors come on top")
    if found.seconds_iteration is None or found.seconds_judging is None:
        rich.print(f"time: not measured ({found.not_measured})")
    else:
        whole = "" if found.iterations is None else f", {duration(found.iterations * found.seconds_iteration)} in all"
        rich.print(
            f"about {duration(found.seconds_iteration)} an iteration{whole}, and {duration(found.seconds_judging)} of judging "
            f"on this machine, {TIMED_NOW}"
        )
    rich.print(f"would be written to [bold]{out}[/bold]")


def _numbers(row: Mapping[str, Any], iterations: int | None) -> str:
    deviation = row.get("ratio_abs_dev_max", 0.0)
    of = "" if iterations is None else f"/{iterations}"
    at = f"iteration {row['iteration'] + 1}{of}  reward {row['reward']:.3f}"
    return f"{at}  ratio off by {deviation:.0e}  {row['seconds']:.1f} s/it"


class _Lines:
    """A line for each twentieth of a training."""

    def __init__(self, rich: RichConsole, iterations: int | None, done: float) -> None:
        self.rich, self.iterations = rich, iterations
        self.began, self.done, self.shown = time.perf_counter(), done, -1

    def __call__(self, row: Row, progress: float) -> None:
        if int(20 * progress) > self.shown:
            self.shown = int(20 * progress)
            left = (time.perf_counter() - self.began) * (1 - progress) / (progress - self.done)
            self.rich.print(f"{progress:4.0%}  {_numbers(row, self.iterations)}  about {left:.0f} s left")


class Count(Protocol):
    """Told how many of how many are done, with a note to show beside them."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def counting(what: str) -> Iterator[Count]:
    """A bar on stderr, or a line for each tenth where it is no terminal."""
    rich = _console(stderr=True)

    def line(done: int, total: int, note: str = "") -> None:
        if done % max(1, total // 10) == 0:
            rich.print(f"{done}/{total} {what}{note and ', ' + note}")

    if not _moves(rich):
        yield line
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=rich) as progress:
        bar = progress.add_task(what, total=None, note="")

        def shown_on_bar(done: int, total: int, note: str = "") -> None:
            progress.update(bar, completed=done, total=total, note=note)

        yield shown_on_bar


class Checklist:
    """A line for each check as soon as it is done, on stdout; a count of them at the end."""

    def __init__(self, silent: bool) -> None:
        self.rich = _console(quiet=silent)
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
        self.rich.print(f"{result.name:<29}[{style}]{mark:<16}[/{style}]{escape(result.detail)}", soft_wrap=True)
        return result


def duration(seconds: float) -> str:
    """In the unit that a person would take."""
    for limit, size, unit in ((100, 1, "s"), (100 * 60, 60, "min"), (np.inf, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    raise ValueError(f"{seconds} s is no duration")


def show_description(found: "Description") -> None:
    """What a plug-in is, then each setting with its type and default on one line and its meaning below."""
    rich = _console(100)
    name = "" if found.kind == found.name else f" [bold]{escape(found.name)}[/bold]"
    rich.print(f"{found.kind}{name}: {escape(found.summary)}")
    if found.text:
        rich.print(f"\n{escape(found.text)}", soft_wrap=True)
    rich.print("\nsettings" if found.settings else "\nno settings")
    for setting in found.settings:
        default = "required" if setting.required else f"default {'null' if setting.default is None else setting.default}"
        rich.print(f"  [bold]{escape(setting.name)}[/bold]  {escape(f'{setting.type}; {default}')}", soft_wrap=True)
        if setting.meaning:
            rich.print(Padding(escape(setting.meaning), (0, 0, 0, 6)))


def show_diagnosis(found: "Diagnosis", out: Path) -> None:
    """The numbers of a diagnosis as tables on stdout, with 95 % intervals over groups."""

    def plain(estimate: Estimate) -> str:
        return with_interval(estimate, sign="")

    after = f" after {found.iteration} iterations of {found.checkpoint}" if found.checkpoint else ""
    rich = _console(132)
    rich.print(
        f"[bold]{found.sampler}[/bold] on {found.backbone}{after}: {len(found.prompts)} prompts x {found.groups} groups of "
        f"{found.group_size}; independent: the same steps, each leaf with a root of its own; 95 % intervals over groups"
    )
    table = Table("two leaves that part at", found.sampler, "independent", title="distance", title_justify="left")
    for d in found.distances:
        table.add_row(d.apart_since, plain(d.sampler), plain(d.independent))
    _print_table(rich, table)
    table = Table("prefixes", "p (policy)", f"q (beta {found.beta:g})", title="entropy / maximum", title_justify="left")
    for e in found.prefix_entropy:
        table.add_row(str(e.prefixes), plain(e.policy), plain(e.target))
    _print_table(rich, table)
    v = found.total_variation
    rich.print(f"total variation to independent, at least: single leaves {plain(v.leaf)}, groups {plain(v.group)}")
    columns = (
        "K",
        "groups",
        f"bias, {found.sampler}",
        "bias, independent",
        f"deviation, {found.sampler}",
        "deviation, independent",
    )
    table = Table(*columns, title="log Z_hat of K leaves", title_justify="left")
    for p in found.partition:
        estimates = (p.sampler_bias, p.independent_bias, p.sampler_deviation, p.independent_deviation)
        table.add_row(str(p.k), str(p.pooled_groups), *(plain(e) for e in estimates))
    _print_table(rich, table)
    for s in found.slopes:
        of = found.sampler if s.of == "sampler" else s.of
        rich.print(f"{s.quantity} of {of} ~ K^a over K = {', '.join(map(str, s.sizes)) or 'none'}: a = {plain(s.slope)}")
    rich.print(
        f"{found.model_rows} model rows, {found.reward_calls} scores of which {found.failed_scores} failed, "
        f"{found.seconds:.0f} s; written to {out}"
    )


class Judgement:
    """What `eval` is doing, on stderr, and its table on stdout."""

    def __init__(self, silent: bool) -> None:
        self.rich = _console(quiet=silent)
        stderr = _console(stderr=True, quiet=silent)
        self.status = stderr.status("starting")
        self.moves = _moves(stderr)

    def __enter__(self) -> Self:
        if self.moves:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.status.stop()

    def advance(self, what: str) -> None:
        self.status.update(what)

    def end(self, record: EvalRecord, out: Path | None) -> None:
        p = record.protocol
        table = Table(title=escape(f"{p.source} {p.path}"), title_justify="left")
        for column in ("metric", "mean", "95 % interval", "prompts", "better"):
            table.add_column(column, justify="left" if column in ("metric", "better") else "right")
        for name, metric in record.metrics.items():
            lower, upper = ("-" if bound is None else f"{bound:.4g}" for bound in (metric.lower, metric.upper))
            better = {True: "higher", False: "lower", None: ""}[metric.higher_is_better]
            table.add_row(escape(name), shown(metric), f"{lower} to {upper}", str(metric.n), better)
        _print_table(self.rich, table)
        drawn = "" if p.steps is None else f", {p.steps} ODE steps, guidance {p.guidance:g}, {p.weights} weights"
        self.rich.print(f"{p.pictures} pictures of {p.prompts} prompts{drawn}; intervals over prompts")
        if record.failed_scores:
            missing = f"{record.failed_scores} values are missing: a scorer gave up, or the metric says nothing of that item"
            self.rich.print(f"[yellow]{missing}[/yellow]")
        if out is not None:
            self.rich.print(f"written to [bold]{escape(str(out))}[/bold]")


def show_front(front: "Front", folder: Path) -> None:
    """A line for each strength: reward, KL, effective samples and the metrics that are drawn."""
    from alignbench.frontier.front import BEST_OF, ESS, KL, REWARD, summary

    rich, record, means = _console(), front.record, summary(front)
    metrics = record.headline
    table = Table(title=escape(f"front of {record.task} on {record.backbone}"), title_justify="left")
    for column in ("target", "reward", "KL", "samples", *metrics):
        table.add_column(escape(column), justify="left" if column == "target" else "right", no_wrap=column == "target")
    for (rule, strength), part in means.groupby(["rule", "strength"], sort=False):
        value = part.set_index("metric")["value"]
        name = f"best of {strength:g}" if rule == BEST_OF else f"beta {strength:.3g}" if strength else "base model"
        row = [f"{value[REWARD]:.4g}", f"{value[KL]:.3g}", f"{value[ESS]:.1f}"]
        table.add_row(name, *row, *(f"{value.get(metric, float('nan')):.4g}" for metric in metrics))
    _print_table(rich, table)
    rich.print(
        f"{record.images} images of each of {record.prompts} prompts; metrics of sets are those of {record.set_size} images. "
        f"KL to the base model is in nats; samples are effective ones. The reward's deviation within a prompt is "
        f"{record.reward_deviation:.3g}."
    )
    if record.left_out:
        rich.print(f"Larger betas are left out: {escape(record.left_out)}.")
    rich.print(f"written to [bold]{escape(str(folder))}[/bold]")


def shown(estimate: Estimate) -> str:
    """The mean with enough digits, or a dash."""
    return "-" if estimate.value is None else f"{estimate.value:.4g}"


def with_interval(estimate: Estimate, sign: str = "+") -> str:
    """`+0.12 (+0.08 to +0.16)`; without plus signs where `sign` is empty."""
    if estimate.value is None:
        return "-"
    if estimate.lower is None or estimate.upper is None:
        return f"{estimate.value:{sign}.3g} (no interval)"
    return f"{estimate.value:{sign}.3g} ({estimate.lower:{sign}.3g} to {estimate.upper:{sign}.3g})"


def verdict(metric: MetricRecord) -> str:
    """Whether the difference is beyond its interval, and in which direction; without an interval the sign test decides."""
    change, p = metric.difference, metric.p_rise
    if change.lower is not None and change.upper is not None:
        rose, fell = change.lower > 0, change.upper < 0
    else:
        level = (1 - CONFIDENCE) / 2
        rose, fell = (False, False) if p is None else (p < level, 1 - p < level)
    if not rose and not fell:
        return "no clear change"
    if metric.higher_is_better is None:
        return "rose" if rose else "fell"
    return "better" if rose == metric.higher_is_better else "worse"
