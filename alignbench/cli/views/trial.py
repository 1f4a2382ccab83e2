"""What a person sees of `check --eval`: each metric's verdict, and its power for each planted loss of diversity."""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from alignbench.cli.console import format_interval, new_console, print_table
from alignbench.trial.judging import TYPICAL_DEGREE, TYPICAL_IMAGES, TYPICAL_PROMPTS, name
from alignbench.trial.record import Trial

KINDS = ("planted", "equal", "harmless")
"""The order of conditions in the table."""


def show_trial(trial: Trial, out: Path) -> None:
    """Prints a trial on stdout as two tables, with 95 % intervals over prompts."""
    rich = new_console(200)
    rich.print(
        f"[bold]{escape(', '.join(trial.evals))}[/bold] on trial: {trial.drawn_prompts} drawn prompts and {trial.own_prompts} "
        "of the embedded model. `exact labels` reads the attributes from the drawing program, as a perfect detector would."
    )
    print_table(rich, _verdicts(trial))
    print_table(rich, _powers(trial))
    rich.print(f"{trial.seconds:.0f} s; written to [bold]{escape(str(out))}[/bold]")


def _verdicts(trial: Trial) -> Table:
    columns = ("metric", "Youden's index", "minus the best", "power", "false alarms", "ranked rightly", "blind to", "fooled by")
    title = "mean power minus mean rate of false alarms, over all degrees below 1, numbers of images and numbers of prompts"
    table = Table(*columns, title=title, title_justify="left")
    for v in trial.verdicts:
        numbers = (
            format_interval(v.youden, ""),
            format_interval(v.to_the_best),
            format_interval(v.power, ""),
            format_interval(v.false_alarms, ""),
        )
        rightly = "-" if v.rightly is None else f"{v.rightly:.3f}"
        table.add_row(escape(v.metric), *numbers, rightly, escape(", ".join(v.blind_to)), escape(", ".join(v.fooled_by)))
    return table


def _powers(trial: Trial) -> Table:
    typical = [s for s in trial.seen if s.images == TYPICAL_IMAGES and s.degree in (TYPICAL_DEGREE, 0)]
    ordered = sorted(typical, key=lambda s: KINDS.index(s.kind))
    conditions = list(dict.fromkeys(name(s) for s in ordered))
    rates = {(s.metric, name(s)): s.falls[TYPICAL_PROMPTS].value for s in typical}
    title = (
        f"reported falls: {TYPICAL_IMAGES} images of {TYPICAL_PROMPTS} prompts, a collapse by {TYPICAL_DEGREE:g}, "
        "and changes that are no loss"
    )
    table = Table("metric", *map(escape, conditions), title=title, title_justify="left")
    for verdict in trial.verdicts:
        found = [rates.get((verdict.metric, condition)) for condition in conditions]
        table.add_row(escape(verdict.metric), *("-" if rate is None else f"{rate:.2f}" for rate in found))
    return table
