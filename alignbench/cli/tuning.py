"""The command `tune`."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignbench.cli.options import Commands, interruptible, names, results_folder, whole_numbers, without_defaults
from alignbench.config.run_config import parse_assignments
from alignbench.files.writing import reserved
from alignbench.tuning import LR_FACTOR, TRIALS, UPDATES

if TYPE_CHECKING:
    from alignbench.tuning.planning import Plan
    from alignbench.tuning.tune import Tuning

commands = Commands("Train and compare")


@commands.command()
def tune(
    objectives: Annotated[
        str | None, typer.Option(help="Objectives to tune, separated by commas; LABEL=NAME as for `compare`.")
    ] = None,
    samplers: Annotated[
        str | None, typer.Option(help="Samplers, separated by commas; each objective is tuned with each of them.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=2, help=f"Trials of each method. (default: {TRIALS})")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, max=1000, help="Tuning seeds of each trial. (default: 1)")] = None,
    task: Annotated[str | None, typer.Option(help="Task: a name or a YAML file. (default: the preset's)")] = None,
    backbone: Annotated[str | None, typer.Option(help="Model: a name, or a local diffusers folder. (default: tiny)")] = None,
    preset: Annotated[str | None, typer.Option(help="Preset, as for `run`. (default: quick)")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="model_rows=N, reward_calls=N or seconds=N: where each trial ends. (default: as for `compare`)"),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(help="Score of a trial on validation prompts: reward, hypervolume, or a metric. (default: reward)"),
    ] = None,
    lr_factor: Annotated[
        float | None, typer.Option(help=f"Learning rates span the preset's divided by and times this. (default: {LR_FACTOR:g})")
    ] = None,
    updates: Annotated[
        str | None,
        typer.Option(help=f"Values of updates_per_rollout, separated by commas. (default: {','.join(map(str, UPDATES))})"),
    ] = None,
    keep_strength: Annotated[
        bool, typer.Option("--keep-strength", help="Keep each objective's strength; vary only how it is trained.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Output folder; an existing tuning is resumed. (default: results/<time>-tuning)")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="dotted.key=value for all trials; for one name objectives.tmpo.KEY=VALUE.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray, as for `compare`.")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Trials to run in parallel on this machine.")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share each trial.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs that each trial requests from Ray.")] = 0.0,
) -> None:
    """Tunes each method by the same number of trials, for `compare --config`. Rerun the command to resume it."""
    from alignbench.tuning.planning import plan_tuning
    from alignbench.tuning.tune import read_request, with_options

    options = without_defaults(
        {"trials": trials, "seeds": seeds, "task": task, "backbone": backbone, "preset": preset, "select": select}
        | {"keep_strength": keep_strength or None, "lr_factor": lr_factor}
        | {"updates": whole_numbers(updates, "--updates") if updates else None}
        | {"objectives": names(objectives) if objectives else None, "samplers": names(samplers) if samplers else None}
        | {"budget": parse_assignments(budget) if budget else None, "settings": parse_assignments(sets) if sets else None}
    )
    request = with_options(read_request(out) if out else None, options)
    folder = out or results_folder("tuning")
    plan = plan_tuning(request, workers * processes)  # before the folder is made, so that a mistake leaves none behind
    execution = {"engine": engine, "workers": workers, "processes": processes, "gpus": gpus}
    with nullcontext(folder) if out else reserved(folder) as folder:
        _tune(plan, folder, execution)


def _tune(plan: "Plan", folder: Path, execution: Mapping[str, Any]) -> None:
    """Runs the tuning and prints what came of it; exit code 1 where a trial failed, 130 on Ctrl-C."""
    from alignbench.cli.console import GridProgress
    from alignbench.cli.views.tuning import show_tuning
    from alignbench.comparison import runner
    from alignbench.tuning.tune import run_tuning

    cells = plan.grid_in(folder).cells()
    with interruptible("tune", folder, execution), GridProgress(len(cells), len(runner.done(cells, folder))) as progress:
        tuning = run_tuning(plan, folder, progress, **execution)
    show_tuning(tuning, folder)
    _report_failures(tuning)


def _report_failures(tuning: "Tuning") -> None:
    failed = tuning.record.failed
    if not failed:
        return
    method, trial = failed[0]
    count = sum(len(each.trials) for each in tuning.record.methods)
    typer.echo(
        f"alignbench: {len(failed)} of {count} trials failed and cannot be chosen, such as trial {trial.trial} of {method}: "
        f"{trial.error}; rerun the command to retry them",
        err=True,
    )
    raise typer.Exit(1)
