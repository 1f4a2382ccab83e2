"""What a person sees of `check`, `show`, `diagnose` and `eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Self

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from alignbench.cli.console import format_interval, format_value, moves, new_console, print_table
from alignbench.records.record import Estimate, EvalRecord

if TYPE_CHECKING:
    from alignbench.authoring.checking import CheckResult
    from alignbench.authoring.describing import Description
    from alignbench.diagnosis.record import Diagnosis, GradientDiagnosis
    from alignbench.frontier.front import Front


class Checklist:
    """Prints a line on stdout for each check as soon as it is done, and a count of them at the end."""

    def __init__(self, silent: bool) -> None:
        self.rich = new_console(quiet=silent)
        self.failed = self.done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            failed = f", {self.failed} failed" if self.failed else ""
            self.rich.print(f"{self.done - self.failed} of {self.done} checks passed{failed}")

    def add(self, result: "CheckResult") -> "CheckResult":
        """Prints a result and returns it."""
        mark, style = {True: ("passed", "green"), None: ("does not apply", "dim"), False: ("FAILED", "bold red")}[result.holds]
        if result.holds is False and not result.required:
            mark, style = "does not hold", "yellow"
        self.done += result.holds is not None and (result.required or result.holds)
        self.failed += result.failed
        self.rich.print(f"{result.name:<29}[{style}]{mark:<16}[/{style}]{escape(result.detail)}", soft_wrap=True)
        return result


def show_description(description: "Description") -> None:
    """Prints what a plug-in does, then each setting with its type and default on one line and its meaning below."""
    rich = new_console(100)
    name = "" if description.kind == description.name else f" [bold]{escape(description.name)}[/bold]"
    rich.print(f"{description.kind}{name}: {escape(description.summary)}")
    if description.text:
        rich.print(f"\n{escape(description.text)}", soft_wrap=True)
    if description.strength:
        values = ", ".join(f"{value:g}" for value in description.strength.values)
        rich.print(f"\nstrength: {description.strength.setting}, from closest to the base model to furthest: {values}")
    rich.print("\nsettings" if description.settings else "\nno settings")
    for setting in description.settings:
        default = "required" if setting.required else f"default {'null' if setting.default is None else setting.default}"
        rich.print(f"  [bold]{escape(setting.name)}[/bold]  {escape(f'{setting.type}; {default}')}", soft_wrap=True)
        if setting.meaning:
            rich.print(Padding(escape(setting.meaning), (0, 0, 0, 6)))


def show_diagnosis(diagnosis: "Diagnosis", out: Path) -> None:
    """Prints a diagnosis on stdout as tables, with 95 % intervals over groups."""
    after = f" after {diagnosis.iteration} iterations of {diagnosis.checkpoint}" if diagnosis.checkpoint else ""
    rich = new_console(132)
    rich.print(
        f"[bold]{escape(diagnosis.sampler)}[/bold] on {escape(diagnosis.backbone)}{escape(after)}: {len(diagnosis.prompts)} "
        f"prompts x {diagnosis.groups} groups of {diagnosis.group_size} leaves. `independent` takes the same steps, but each "
        "leaf has a root of its own. Intervals are 95 % over groups."
    )
    for table in (_distance_table(diagnosis), _entropy_table(diagnosis)):
        print_table(rich, table)
    v = diagnosis.total_variation
    rich.print(
        f"total variation distance to independent groups (lower bound): single leaves {_plain(v.leaf)}, whole groups "
        f"{_plain(v.group)}"
    )
    print_table(rich, _partition_table(diagnosis))
    for s in diagnosis.slopes:
        of = diagnosis.sampler if s.of == "sampler" else s.of
        sizes = ", ".join(map(str, s.sizes)) or "none"
        rich.print(escape(f"{s.quantity} of {of} is proportional to K^a over K = {sizes}: a = {_plain(s.slope)}"))
    rich.print(
        f"{diagnosis.model_rows:,} model evaluations, {diagnosis.reward_calls:,} scores ({diagnosis.failed_scores:,} failed), "
        f"{diagnosis.seconds:.0f} s; written to [bold]{escape(str(out))}[/bold]"
    )


def _distance_table(diagnosis: "Diagnosis") -> Table:
    columns = ("leaf pairs that diverge at", escape(diagnosis.sampler), "independent")
    table = Table(*columns, title="distance between two leaves of a group, |z - z'| / sqrt(D)", title_justify="left")
    for d in diagnosis.distances:
        table.add_row(d.apart_since, _plain(d.sampler), _plain(d.independent))
    return table


def _entropy_table(diagnosis: "Diagnosis") -> Table:
    columns = ("prefixes", "p (policy)", f"q (target, beta {diagnosis.beta:g})")
    table = Table(*columns, title="entropy of the mass over prefixes / its maximum", title_justify="left")
    for e in diagnosis.prefix_entropy:
        table.add_row(str(e.prefixes), _plain(e.policy), _plain(e.target))
    return table


def _partition_table(diagnosis: "Diagnosis") -> Table:
    sampler = escape(diagnosis.sampler)
    quantities = ("bias", "standard deviation")
    columns = [f"{quantity}, {of}" for quantity in quantities for of in (sampler, "independent")]
    table = Table("K", "groups", *columns, title="log Z_hat, estimated from K leaves", title_justify="left")
    for p in diagnosis.partition:
        estimates = (p.sampler_bias, p.independent_bias, p.sampler_deviation, p.independent_deviation)
        table.add_row(str(p.k), str(p.pooled_groups), *(_plain(e) for e in estimates))
    return table


def show_gradients(diagnosis: "GradientDiagnosis", out: Path) -> None:
    """Prints gradients on trial as a table, with 95 % intervals over repetitions."""
    rich = new_console(160)
    at = f"after {diagnosis.iteration} iterations of {diagnosis.checkpoint}" if diagnosis.checkpoint else "at the base model"
    rich.print(
        f"[bold]gradients[/bold] on {escape(diagnosis.backbone)}, task {escape(diagnosis.task)}, {escape(at)}: "
        f"{diagnosis.repetitions} estimates of each, from one group for each of {len(diagnosis.prompts)} prompts, against the "
        "exact gradient of the divergence that the objective claims to descend. Intervals are 95 % over estimates."
    )
    columns = ("objective", "sampler", "rule", "K", "rows", "claims", "cosine", "relative bias", "scale", "signal / noise")
    table = Table(*columns)
    for t in diagnosis.trials:
        names = (escape(t.objective), escape(t.sampler), escape(t.noise), str(t.leaves), f"{t.model_rows:,}")
        numbers = (_plain(t.cosine), _plain(t.relative_bias), format_value(t.scale), _plain(t.snr))
        table.add_row(*names, escape(t.divergence or "nothing"), *numbers)
    print_table(rich, table)
    rich.print(f"{diagnosis.seconds:.0f} s; written to [bold]{escape(str(out))}[/bold]")


def _plain(estimate: Estimate) -> str:
    return format_interval(estimate, sign="")


def show_front(front: "Front", folder: Path) -> None:
    """A line for each strength: reward, KL, effective samples and the metrics that are drawn."""
    from alignbench.frontier.front import BEST_OF, ESS, KL, REWARD, summary

    rich, record, means = new_console(), front.record, summary(front)
    metrics = record.headline
    table = Table(title=escape(f"front of {record.task} on {record.backbone}"), title_justify="left")
    for column in ("target", "reward", "KL", "samples", *metrics):
        table.add_column(escape(column), justify="left" if column == "target" else "right", no_wrap=column == "target")
    for (rule, strength), part in means.groupby(["rule", "strength"], sort=False):
        value = part.set_index("metric")["value"]
        name = f"best of {strength:g}" if rule == BEST_OF else f"beta {strength:.3g}" if strength else "base model"
        row = [f"{value[REWARD]:.4g}", f"{value[KL]:.3g}", f"{value[ESS]:.1f}"]
        table.add_row(name, *row, *(f"{value.get(metric, float('nan')):.4g}" for metric in metrics))
    print_table(rich, table)
    rich.print(
        f"{record.images} images of each of {record.prompts} prompts; metrics of sets are those of {record.set_size} images. "
        f"KL to the base model is in nats; samples are effective ones. The reward's deviation within a prompt is "
        f"{record.reward_deviation:.3g}."
    )
    if record.left_out:
        rich.print(f"Larger betas are left out: {escape(record.left_out)}.")
    rich.print(f"written to [bold]{escape(str(folder))}[/bold]")


class EvalView:
    """Shows on stderr what `eval` is doing, and prints its table on stdout."""

    def __init__(self, silent: bool) -> None:
        self.rich = new_console(quiet=silent)
        stderr = new_console(stderr=True, quiet=silent)
        self.status = stderr.status("starting")
        self.moves = moves(stderr)

    def __enter__(self) -> Self:
        if self.moves:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.status.stop()

    def advance(self, what: str) -> None:
        self.status.update(escape(what))

    def end(self, record: EvalRecord, out: Path | None) -> None:
        p = record.protocol
        table = Table(title=escape(f"{p.source} {p.path}"), title_justify="left")
        for column in ("metric", "mean", "95 % interval", "prompts", "better"):
            table.add_column(column, justify="left" if column in ("metric", "better") else "right")
        for name, metric in record.metrics.items():
            lower, upper = ("-" if bound is None else f"{bound:.4g}" for bound in (metric.lower, metric.upper))
            better = {True: "higher", False: "lower", None: ""}[metric.higher_is_better]
            table.add_row(escape(name), format_value(metric), f"{lower} to {upper}", str(metric.n), better)
        print_table(self.rich, table)
        drawn = "" if p.steps is None else f", {p.steps} {p.solver} steps, guidance {p.guidance:g}, {p.weights} weights"
        if p.inference is not None:
            drawn += f"; {p.inference['method']}: {p.model_rows_per_image:,} model evaluations per image"
        self.rich.print(f"{p.images} images of {p.prompts} prompts{drawn}; intervals are over prompts")
        if record.failed_scores:
            several = record.failed_scores > 1
            missing = f"{record.failed_scores} value{'s' * several} {'are' if several else 'is'} missing{_of_metrics(record)}"
            why = "the scorer returned NaN, or the metric does not apply to the prompt"
            self.rich.print(f"[yellow]{escape(missing)}: {why}[/yellow]", soft_wrap=True)
        if out is not None:
            self.rich.print(f"written to [bold]{escape(str(out))}[/bold]")


def _of_metrics(record: EvalRecord) -> str:
    """The metrics that have no value for some prompt; empty where each has one of every prompt."""
    lacking = [name for name, metric in record.metrics.items() if metric.n < record.protocol.prompts and metric.role != "part"]
    return f" ({', '.join(lacking)})" if lacking else ""
