"""What a person sees of `tune`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from alignbench.cli.console import new_console, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from alignbench.tuning.record import MethodRecord, TuningRecord
    from alignbench.tuning.tune import Tuning


def show_tuning(tuning: "Tuning", folder: Path) -> None:
    """Prints the best settings of each method, what they gain, how the score depends on each setting, and what comes next."""
    from alignbench.tuning.tune import FIGURE

    rich, record = new_console(132), tuning.record
    request = record.request
    seeds = f"{request.seeds} tuning seed{'s' * (request.seeds != 1)}"
    rich.print(
        f"{request.trials} trials of each method with {seeds} and one budget, evaluated on {record.prompts} validation prompts. "
        f"Score: {escape(record.scored_by)}; higher is better.",
        soft_wrap=True,
    )
    print_table(rich, _best_table(record))
    print_table(rich, _sensitivity_table(record))
    _show_order(rich, record)
    for line in _at_an_end(tuning):
        rich.print(escape(line), soft_wrap=True)
    rich.print(
        "The best of several trials looks better than it is, since its own score chose it. `compare` measures the tuned methods "
        "on other seeds and on the test prompts.",
        soft_wrap=True,
    )
    rich.print(f"plot and tables: {escape(str(folder / FIGURE))}, trials.csv, tuning.json", soft_wrap=True)
    if tuning.tuned:
        command = shlex.join(["alignbench", "compare", "--config", str(tuning.tuned), "--seeds", "5"])
        rich.print(f"next: [bold]{escape(command)}[/bold]", soft_wrap=True)
    else:
        rich.print("tuned.yaml has not been written, because a method has no trial with a score.")


def _best_table(record: "TuningRecord") -> Table:
    table = Table(title="score of each method, and the settings of its best trial", title_justify="left")
    for column in ("method", "preset", "median", "best", "best - median", "scored", "settings of the best trial"):
        left = column in ("method", "settings of the best trial")
        table.add_column(column, justify="left" if left else "right", no_wrap=not left)
    for method in record.methods:
        best, median = method.best, method.median
        gain = None if best is None or best.score is None or median is None else best.score - median
        numbers = (method.trials[0].score, median, best and best.score, gain)
        settings = (
            ", ".join(f"{key.removeprefix('objective.')} {value:.4g}" for key, value in best.settings.items()) if best else "-"
        )
        scored = f"{len(method.scored)}/{len(method.trials)}"
        own = " (the preset's)" if best and not best.place else ""
        table.add_row(escape(str(method)), *map(_number, numbers), scored, escape(settings + own))
    return table


def _sensitivity_table(record: "TuningRecord") -> Table:
    from alignbench.tuning.sensitivity import THIRDS, sensitivities

    title = "mean score of the trials in each third of a setting's range, without that of the preset"
    table = Table("method", "setting", title=title, title_justify="left")
    for third in THIRDS:
        table.add_column(third, justify="right")
    for method in record.methods:
        for sensitivity in sensitivities(method):
            table.add_row(escape(str(method)), escape(sensitivity.setting), *map(_number, sensitivity.thirds))
    return table


def _show_order(rich: "Console", record: "TuningRecord") -> None:
    """Says whether tuning changes which method scores best."""
    from alignbench.tuning.record import best_first

    before, after = ([str(m) for m in best_first(record.methods, trial)] for trial in (0, None))
    if len(after) < 2:
        return
    if before == after:
        rich.print(f"order by score, with the presets' settings and tuned: {escape(' > '.join(after))}", soft_wrap=True)
    else:
        rich.print(
            f"order by score with the presets' settings: {escape(' > '.join(before))}; tuned: {escape(' > '.join(after))}",
            soft_wrap=True,
        )


def _at_an_end(tuning: "Tuning") -> list[str]:
    """A line for each best setting that lies at an end of its range."""
    from alignbench.tuning.space import LR, is_near_an_end

    def line(method: "MethodRecord", key: str, value: float) -> str:
        wider = "raise --lr-factor in another --out" if key == LR else "other values may do better"
        return f"{method}: the best {key}, {value:.4g}, lies at an end of its range; {wider}"

    return [
        line(method, dimension.key, method.best.settings[dimension.key])
        for method in tuning.record.methods
        if method.best is not None and method.best.place
        for dimension in tuning.plan.spaces[method.objective]
        if is_near_an_end(dimension, method.best.settings[dimension.key])
    ]


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.4g}"
