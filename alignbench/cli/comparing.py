"""Commands on many runs: `compare`, `report` and `plot`."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignbench.cli.options import Commands, interruptible, names, results_folder, seeds
from alignbench.config.run_config import parse_assignments
from alignbench.errors import UserError
from alignbench.files.writing import reserved

if TYPE_CHECKING:
    from alignbench.comparison.grid import Grid
    from alignbench.comparison.record import ComparisonRecord

commands = Commands("Train and compare")

REWARD = Annotated[
    str | None, typer.Option(help="Metric on the report's reward axis. (default: the first that was trained on)")
]
DIVERSITY = Annotated[
    str | None, typer.Option(help="Metric on its diversity axis. (default: the first recorded; see reading-a-report.md)")
]


@commands.command()
def compare(
    objectives: Annotated[
        str | None,
        typer.Option(
            help="Alignment objectives, separated by commas; see `list objectives`. LABEL=NAME compares one under several "
            "settings, which --set objectives.LABEL.objective.KEY=VALUE gives it."
        ),
    ] = None,
    samplers: Annotated[
        str | None, typer.Option(help="Rollout samplers, separated by commas, or LABEL=NAME; see `list samplers`.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", "--task", help="Tasks, separated by commas. (default: the preset's)")
    ] = None,
    seeds_: Annotated[
        str | None,
        typer.Option(
            "--seeds",
            help="A number of seeds, or a list of them with commas; with --out of a comparison alone, seeds are added to it. "
            "(default: 3)",
        ),
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Model: a name, or a local diffusers folder. (default: tiny)")] = None,
    preset: Annotated[str | None, typer.Option(help="Preset, as for `run`. (default: quick)")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="model_rows=N, reward_calls=N or seconds=N: where each cell ends. "
            "(default: the model rows that the preset plans for the cheapest method)"
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Instead of --budget: all cells get the model rows of this number of iterations of the cheapest method.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder; an existing comparison is resumed. (default: results/<time>-comparison)")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file: a comparison (objectives, samplers, tasks, seeds, settings, sweep, and parts in which keys of "
            "these differ), keys of the configuration, shaped like a preset, or the config.yaml of a run, whose pair is then "
            "compared with its settings. Options win over it."
        ),
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="dotted.key=value; for one name objectives.tmpo.objective.beta=3.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE,VALUE,... makes a method of each value: tmpo.beta=0.5,1,2 for one objective; optimizer.lr=..., "
            "sampler.steps=... or reward.NAME=... for all methods. The name of an objective alone sweeps its strength (see "
            "`show objective NAME`). Can be repeated; several sweeps of one method multiply."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray: the cluster at RAY_ADDRESS, or one that is started on this machine.")
    ] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Cells to run in parallel on this machine.")] = 1,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that share each cell, with a GPU for each if there are any.")
    ] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs that each cell requests from Ray.")] = 0.0,
    reward: REWARD = None,
    diversity: DIVERSITY = None,
    no_front: Annotated[
        bool,
        typer.Option("--no-front", help="Do not compute the front of the tilted target, which methods are measured against."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print cells, budget and estimated time; train and write nothing.")
    ] = False,
) -> None:
    """Trains a grid of objectives and samplers under one budget and reports on it. Rerun the command to resume it."""
    from alignbench.comparison import runner
    from alignbench.comparison.sweep_requests import parse_sweeps

    options = {"objectives": objectives, "samplers": samplers, "tasks": tasks, "backbone": backbone, "preset": preset}
    lists = {key: names(value) if key.endswith("s") else value for key, value in options.items() if value}
    grid = _planned(
        {**lists, "seeds": seeds(seeds_) if seeds_ else None, "sweep": parse_sweeps(sweep) if sweep else None},
        {"budget": parse_assignments(budget or []), "settings": _settings(sets, iterations, budget)},
        config,
        out,
        workers * processes,
    )
    folder = out or results_folder("comparison")
    execution = {"engine": engine, "workers": workers, "processes": processes, "gpus": gpus}
    if dry_run:
        from alignbench.cli.console import show_grid
        from alignbench.comparison.estimates import expected_costs

        cells = grid.cells()
        runner.check_folder(cells, folder)
        costs = expected_costs(grid, folder, workers, front=not no_front and engine != "ray")
        show_grid(grid, folder, costs, workers, processes, len(runner.done(cells, folder)))
        return
    with nullcontext(folder) if out else reserved(folder) as folder:
        with interruptible("compare", folder, execution):
            record = _compare(grid, folder, execution)
            if not no_front and any(cell.status == "complete" for cell in record.cells):
                _make_fronts(grid, folder, execution)
        _report(record, folder, reward, diversity)


def _settings(sets: list[str] | None, iterations: int | None, budget: list[str] | None) -> dict[str, Any]:
    """The settings that `--set` and `--iterations` ask for."""
    settings = parse_assignments(sets or [])
    if iterations is None:
        return settings
    if budget:
        raise UserError("--iterations and --budget both say where cells end; leave one of them out")
    return {**settings, "iterations": iterations}


def _planned(
    options: Mapping[str, Any], assigned: Mapping[str, Mapping[str, Any]], config: Path | None, out: Path | None, at_once: int
) -> "Grid":
    """The grid that the options and the file ask for, or that of an existing folder if nothing is asked for.

    Args:
        options: options that replace what the file says; None where they are not given.
        assigned: budget and settings.
        at_once: processes that share this machine's threads.
    """
    from alignbench.comparison.grid import former_grid, read_grid, with_seeds
    from alignbench.comparison.planning import Request, plan_grid, read_request

    former = former_grid(out) if out else None
    nothing = not config and not any(options.values()) and not any(assigned.values())
    if nothing and out is not None:
        return former or read_grid(out)
    others = [value for key, value in options.items() if key != "seeds"]
    if former and options.get("seeds") and not config and not any(others) and not any(assigned.values()):
        return with_seeds(former, options["seeds"])
    request = read_request(config) if config else Request()
    request = request.with_options(**options, budget=assigned["budget"] or None, settings=assigned["settings"] or None)
    complete = (request.objectives and request.samplers) or request.parts
    if not complete:
        raise UserError(
            "compare needs --objectives and --samplers, or a --config file that lists them; --out DIR alone resumes the "
            "comparison in DIR, and --out DIR --seeds N adds seeds to it"
        )
    return plan_grid(request.continuing(former), at_once)


def _compare(grid: "Grid", folder: Path, execution: Mapping[str, Any]) -> "ComparisonRecord":
    from alignbench.cli.console import GridProgress
    from alignbench.comparison import runner

    cells = grid.cells()
    with GridProgress(len(cells), len(runner.done(cells, folder))) as progress:
        return runner.compare(grid, folder, **execution, observer=progress)


def _make_fronts(grid: "Grid", folder: Path, execution: Mapping[str, Any]) -> None:
    """Computes the fronts of the comparison's tasks; a line says which the report will lack, and why."""

    def warn(line: str) -> None:
        typer.echo(f"alignbench: {line}", err=True)

    if execution["engine"] == "ray":
        warn("no front is computed with the engine ray, as this machine may lack a GPU; `alignbench compare --out DIR` adds it")
        return
    from alignbench.cli.views.records import EvalView
    from alignbench.comparison.fronts import make_fronts

    with EvalView(silent=False) as status:
        make_fronts(grid, folder, advance=status.advance, warn=warn)


def _report(record: "ComparisonRecord", folder: Path, reward: str | None, diversity: str | None) -> None:
    """Writes the report; ends the command with exit code 1 where a cell failed."""
    failed = sum(cell.status == "failed" for cell in record.cells)
    if failed < len(record.cells):
        from alignbench.cli.views.comparison import show_summary
        from alignbench.comparison.reading import read_results
        from alignbench.reports.report import write_report

        write_report(folder, reward=reward, diversity=diversity)
        show_summary(read_results(folder, reward=reward, diversity=diversity))
        typer.echo(f"report: {folder / 'report.html'}", err=True)
    if failed:
        typer.echo(f"alignbench: {failed} of {len(record.cells)} cells failed; rerun the command to retry them", err=True)
        raise typer.Exit(1)


@commands.command()
def plot(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, or a folder that contains runs.")],
    reward: REWARD = None,
    diversity: DIVERSITY = None,
    animate: Annotated[
        bool,
        typer.Option("--animate", help="Write animations instead: 2-D distributions that move, and rollout trees that grow."),
    ] = False,
) -> None:
    """Draws the plots of a run, finished or not, or of the comparison of all runs below a folder, from the records alone."""
    unreadable: list[str] = []
    if animate:
        from alignbench.reports.animations import write_animations

        if reward or diversity:
            raise UserError("--reward and --diversity choose the axes of a comparison's plots; an animation has none")
        written, unreadable = write_animations(folder)
    elif any((folder / name).is_file() for name in ("result.json", "config.yaml")) or not folder.is_dir():
        from alignbench.figures.plots import plot_run

        if reward or diversity:
            raise UserError("--reward and --diversity choose the axes of a comparison's plots; a single run has no such plot")
        written = plot_run(folder, lambda line: typer.echo(f"alignbench: {line}", err=True))
    else:
        from alignbench.reports.live import has_unfinished_only, plot_unfinished
        from alignbench.reports.report import write_plots

        if has_unfinished_only(folder):
            if reward or diversity:
                raise UserError(f"--reward and --diversity are for finished runs, and no run below {folder} has finished")
            written = plot_unfinished(folder, unreadable.append)
            typer.echo(f"alignbench: no run below {folder} has finished: these are plots of the runs so far", err=True)
        else:
            written, unreadable = write_plots(folder, reward=reward, diversity=diversity)
    for line in unreadable:
        typer.echo(f"alignbench: {line}", err=True)
    for file in written:
        print(file)


@commands.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a comparison or of a run, or any folder that contains runs.")],
    reward: REWARD = None,
    diversity: DIVERSITY = None,
    live: Annotated[
        bool, typer.Option("--live", help="Write the report again and again while runs are at work; a browser follows it.")
    ] = False,
    every: Annotated[int, typer.Option(min=1, help="Seconds between two reports with --live.")] = 30,
) -> None:
    """Writes report.html, report.md, tables and plots of all finished runs below a folder, from the records alone.

    While no run has finished, the page shows the trainings so far.
    """
    from alignbench.reports import live as reports

    if not live:
        written = reports.write_report_so_far(folder, reward=reward, diversity=diversity)
    else:
        typer.echo(f"alignbench: open {folder / 'report.html'}; it follows the runs until they end, or until Ctrl-C", err=True)
        try:
            written = reports.follow(folder, every=every, reward=reward, diversity=diversity)
        except KeyboardInterrupt:
            typer.echo(f"alignbench: interrupted; {folder / 'report.html'} is that of now", err=True)
            raise typer.Exit(130) from None
    for file in written:
        print(file)
