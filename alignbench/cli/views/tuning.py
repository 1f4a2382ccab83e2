"""What a person sees of `tune`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from alignbench.cli.console import new_console, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from alignbench.tuning.record import MethodRecord, TrialRecord, TuningRecord
    from alignbench.tuning.tune import Tuning


def show_tuning(tuning: "Tuning", folder: Path) -> None:
    """Prints the best settings of each method, what they gain, how the score depends on each setting, and what comes next.

    Nothing is printed where no trial has a score; the failures say why.
    """
    from alignbench.tuning.tune import FIGURE

    rich, record = new_console(132), tuning.record
    request = record.request
    seeds = f"{request.seeds} tuning seed{'s' * (request.seeds != 1)}"
    if not any(method.scored for method in record.methods):
        return
    rich.print(
        f"{request.trials} trials of each method with {seeds} and one budget, evaluated on {record.prompts} validation "
        f"prompts. Score: {escape(record.scored_by)}; higher is better.",
        soft_wrap=True,
    )
    print_table(rich, _best_table(record))
    print_table(rich, _sensitivity_table(tuning))
    _show_order(rich, record)
    for line in _at_an_end(tuning):
        rich.print(escape(line), soft_wrap=True)
    rich.print(
        "The best of several trials looks better than it is, since its own score chose it. `compare` measures the tuned "
        f"methods on other seeds{_on_other_prompts(tuning)}.",
        soft_wrap=True,
    )
    rich.print(f"plot and tables: {escape(str(folder / FIGURE))}, trials.csv, tuning.json", soft_wrap=True)
    if tuning.tuned:
        command = shlex.join(["alignbench", "compare", "--config", str(tuning.tuned), "--seeds", "5"])
        rich.print(f"next: [bold]{escape(command)}[/bold]", soft_wrap=True)
    else:
        rich.print("tuned.yaml has not been written, because a method has no trial with a score.")


def _on_other_prompts(tuning: "Tuning") -> str:
    """Says on which prompts `compare` evaluates; some tasks on the 2-D toy problem have one set of prompts for all."""
    task = tuning.plan.task
    shared = set(task.eval_prompts) & set(task.validation_prompts)
    return f"; {task.name} validates on its test prompts" if shared else " and on the test prompts"


def _best_table(record: "TuningRecord") -> Table:
    table = Table(title="score of each method, and the settings of its best trial", title_justify="left")
    for column in ("method", "preset", "median", "best", "best - median", "scored", "settings of the best trial"):
        left = column in ("method", "settings of the best trial")
        table.add_column(column, justify="left" if left else "right", no_wrap=not left)
    for method in record.methods:
        best, median = method.best, method.median
        gain = None if best is None or best.score is None or median is None else best.score - median
        numbers = (method.trials[0].score, median, best.score if best else None, gain)
        settings = _settings_in_words(best) if best else "-"
        scored = f"{len(method.scored)}/{len(method.trials)}"
        table.add_row(escape(str(method)), *map(_number, numbers), scored, escape(settings))
    return table


def _settings_in_words(trial: "TrialRecord") -> str:
    """The settings of a trial on one line; whether they are the preset's is said."""
    listed = ", ".join(f"{key.removeprefix('objective.')} {value:.4g}" for key, value in trial.settings.items())
    return listed if trial.place else f"{listed} (the preset's)"


def _sensitivity_table(tuning: "Tuning") -> Table:
    from alignbench.tuning.sensitivity import sensitivities

    title = "mean score of the trials with each value of a setting, without the preset's trial (-: none)"
    table = Table("method", "setting", "values: mean score", title=title, title_justify="left")
    for method in tuning.record.methods:
        for sensitivity in sensitivities(method, tuning.plan.spaces[method.objective]):
            means = " | ".join(f"{values}: {_number(mean)}" for values, mean in sensitivity.means.items())
            table.add_row(escape(str(method)), escape(sensitivity.setting), escape(means))
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
