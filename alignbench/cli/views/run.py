"""What a person sees of a run: progress on stderr, a summary at the end, and the forecast of `--dry-run`."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from alignbench.backbone import Backbone
from alignbench.cli.console import (
    TIMED_NOW,
    format_duration,
    format_interval,
    format_value,
    moves,
    new_console,
    print_table,
    progress_numbers,
)
from alignbench.config.run_config import RunConfig
from alignbench.records.record import MetricRecord, Result
from alignbench.rollouts.plan import Plan
from alignbench.statistics import ONE_SIDED_LEVEL
from alignbench.training.progress import Row

if TYPE_CHECKING:
    from alignbench.forecast.costs import Forecast


class Terminal:
    """Live progress bars on a terminal, and plain lines if stderr is not a terminal."""

    def __init__(self) -> None:
        self.rich = new_console(stderr=True)

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
            self.rich.print(f"{length} of {groups} pairs from {escape(str(config.pairs))}; no rollouts")
            return
        self.rich.print(
            f"{length} of {groups} prompts x {plan.leaves} rollouts; each takes {plan.model_rows(groups):,} model evaluations "
            f"to sample and {plan.replay_rows(groups):,} to train"
        )

    @contextmanager
    def activity(self, what: str) -> Iterator[Callable[[str], None]]:
        if not moves(self.rich):
            self.rich.print(f"evaluating the {what}")
            yield lambda part: None
            return
        with self.rich.status(f"evaluating the {what}") as status:
            yield lambda part: status.update(escape(f"evaluating the {what}: {part}"))

    @contextmanager
    def training(self, iterations: int | None, done: float) -> Iterator[Callable[[Row, float], None]]:
        if not moves(self.rich):
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
            yield lambda row, share: progress.update(bar, completed=share, numbers=progress_numbers(row, iterations))

    def end(self, result: Result, out: Path) -> None:
        pair = escape(" x ".join(result.pair))
        table = Table(title=f"{pair}: base and trained model", title_justify="left")
        for column in ("metric", "base", "trained", "difference (95 % interval)", ""):
            table.add_column(column, justify="left" if column in ("metric", "") else "right")
        for name, metric in result.metrics.items():
            label = f"[bold]{escape(name)}[/bold] (reward)" if metric.role == "reward" else escape(name)
            base, trained = format_value(metric.base), format_value(metric.final)
            table.add_row(label, base, trained, format_interval(metric.difference), change_label(metric))
        print_table(self.rich, table)
        b, p = result.budget, result.protocol
        self.rich.print(
            f"protocol: {p.prompts} evaluation prompts x {p.images_per_prompt} images, {p.steps} {p.solver} steps, "
            f"guidance {p.guidance:g}, {p.weights} weights; intervals are over prompts, and differences are paired"
        )
        if result.inference is not None and result.inference.method != "ode":
            i = result.inference
            self.rich.print(
                f"inference: images of the trained model by {i.method}, {i.model_rows_per_image:,} model evaluations and "
                f"{i.reward_calls_per_image:,} scores per image; the base model's take {i.base_model_rows_per_image:,}"
            )
        phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in b.seconds_by_phase.items())
        self.rich.print(
            f"compute used: {b.model_rows_rollout + b.model_rows_train:,} model evaluations ({b.model_rows_rollout:,} rollout, "
            f"{b.model_rows_train:,} training), {b.reward_calls:,} reward calls, {b.seconds:.0f} s of training ({phases}), "
            f"{b.seconds_evaluation:.0f} s of evaluation, {b.peak_memory_bytes / 2**30:.1f} GiB peak memory"
        )
        if result.stop is not None:
            self.rich.print(escape(result.stop.sentence))
        for found in result.onsets:
            if found.over_optimised:
                self.rich.print(f"[bold red]over-optimisation:[/bold red] {escape(found.sentence)} (validation prompts)")
        for alarm in result.alarms:
            self.rich.print(f"[bold red]alarm:[/bold red] {escape(alarm)}")
        if b.micro_batch_halvings:
            self.rich.print(
                f"memory ran out {b.micro_batch_halvings} times; the micro-batch was reduced to {b.micro_batch} rows"
            )
        folders = [f"{name}/" for name in ("samples", "plots", "checkpoints") if (out / name).is_dir()]
        files = ", ".join(["result.json", "metrics.parquet", "evals.parquet", *folders])
        self.rich.print(f"written to [bold]{escape(str(out))}[/bold]: {files}")


class _Lines:
    """Prints a line for each 5 % of the training."""

    def __init__(self, rich: RichConsole, iterations: int | None, done: float) -> None:
        self.rich, self.iterations = rich, iterations
        self.began, self.done, self.printed = time.perf_counter(), done, -1

    def __call__(self, row: Row, progress: float) -> None:
        if int(20 * progress) > self.printed:
            self.printed = int(20 * progress)
            left = (time.perf_counter() - self.began) * (1 - progress) / (progress - self.done)
            self.rich.print(f"{progress:4.0%}  {progress_numbers(row, self.iterations)}  about {left:.0f} s left")


def change_label(metric: MetricRecord) -> str:
    """The direction of a significant change, as text. The interval decides, or the sign test if there is no interval."""
    change, p = metric.difference, metric.p_rise
    if change.lower is not None and change.upper is not None:
        rose, fell = change.lower > 0, change.upper < 0
    else:
        rose, fell = (False, False) if p is None else (p < ONE_SIDED_LEVEL, 1 - p < ONE_SIDED_LEVEL)
    if not rose and not fell:
        return "no clear change"
    if metric.higher_is_better is None:
        return "rose" if rose else "fell"
    return "better" if rose == metric.higher_is_better else "worse"


def show_forecast(forecast: "Forecast", config: RunConfig, out: Path) -> None:
    """Prints on stdout what a run will do and what it is expected to cost."""
    rich = new_console()
    length = "iterations until the budget is spent" if forecast.iterations is None else f"{forecast.iterations} iterations"
    rich.print(
        f"[bold]{escape(config.objective.name)}[/bold] x [bold]{escape(config.sampler.name)}[/bold] on "
        f"{escape(config.backbone.name)}: {length} of {config.prompts_per_iteration} prompts, {forecast.images:,} images and "
        f"{forecast.rows:,.0f} model evaluations each"
    )
    print_table(rich, _cost_table(forecast))
    total = sum(forecast.parameters.values())
    parts = ", ".join(f"{name} {count:,}" for name, count in forecast.parameters.items())
    rich.print(f"{total:,} parameters ({parts}), {forecast.trained:,} of them trained")
    print_table(rich, _memory_table(forecast))
    rich.print("excludes scorers, library overhead and fragmentation")
    if forecast.seconds_iteration is None or forecast.seconds_evaluation is None:
        rich.print(f"time: not measured ({forecast.not_measured})")
    else:
        iteration, evaluation = format_duration(forecast.seconds_iteration), format_duration(forecast.seconds_evaluation)
        total_time = ""
        if forecast.iterations is not None:
            total_time = f" ({format_duration(forecast.iterations * forecast.seconds_iteration)} in total)"
        rich.print(f"about {iteration} per iteration{total_time} and {evaluation} of evaluation on this machine, {TIMED_NOW}")
    rich.print(f"output folder: [bold]{escape(str(out))}[/bold] (nothing has been written)")


def _cost_table(forecast: "Forecast") -> Table:
    extra = {
        "gradient caching": forecast.double_passes,
        "the reference": forecast.reference,
        "the behaviour policy": forecast.behaviour,
    }
    extras = " and ".join(name for name, needed in extra.items() if needed)
    updates = f"{forecast.updates} update{'s' * (forecast.updates > 1)} per rollout"
    table = Table("", title="one iteration", title_justify="left")
    table.add_column("count", justify="right")
    table.add_column("")
    table.add_row(
        "model evaluations of the rollout", f"{forecast.rollout_rows:,.0f}", f"at most {forecast.call_rows:,} in one call"
    )
    table.add_row(
        "model evaluations of one update", f"{forecast.replay_rows:,.0f}", updates + (extras and f"; more for {extras}")
    )
    if forecast.data_rows:
        table.add_row("model evaluations for the data term", f"{forecast.data_rows:,.0f}", "keepers.data")
    table.add_row("images to decode and score", f"{forecast.images:,}", "")
    return table


def _memory_table(forecast: "Forecast") -> Table:
    m = forecast.memory
    table = Table("", title=f"estimated memory on {forecast.device}", title_justify="left")
    table.add_column("GiB", justify="right")
    for name, size in (
        ("weights", m.weights),
        ("text encoders (only before the training)", m.text_encoders),
        ("gradients", m.gradients),
        ("optimizer", m.optimizer),
        ("averaged weights", m.ema),
        ("one model call of the rollout", m.rollout),
        ("one micro-batch (forward and backward pass)", m.training),
        ("decoding", m.decoding),
        ("peak", m.peak),
    ):
        table.add_row(name, f"{size / 2**30:,.3f}")
    return table
