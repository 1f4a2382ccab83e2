"""The command line. Nothing heavy is imported before a command needs it, so that `--help` and `list` answer at once."""

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from alignbench import __version__
from alignbench.cli import data, models, plugins
from alignbench.cli import run as training
from alignbench.cli.options import Commands
from alignbench.cli.options import names as _names
from alignbench.cli.options import results_folder as _results_folder
from alignbench.cli.options import seeds as _seeds
from alignbench.config.run_config import parse_assignments
from alignbench.errors import UserError
from alignbench.files.writing import reserved
from alignbench.runtime import import_path, launch, variables

if TYPE_CHECKING:
    from alignbench.comparison.compare import Grid


class _RunFirst(typer.core.TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: name != "run")


app = Commands(
    "Train and compare",
    name="alignbench",
    cls=_RunFirst,
    help="Compares alignment objectives and rollout samplers for flow-matching text-to-image models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (training, models, plugins, data):
    app.add_typer(group.commands)

REWARD = Annotated[
    str | None, typer.Option(help="Metric on the report's reward axis. (default: the first that was trained on)")
]
DIVERSITY = Annotated[
    str | None, typer.Option(help="Metric on its diversity axis. (default: the first recorded; see reading-a-report.md)")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"alignbench {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    variables.check()
    if not import_path.current_folder_exists():
        raise UserError("the current folder has been removed; change to another one first")
    command = context.invoked_subcommand
    if launch.count() > 1 and command != "run":
        raise UserError(
            f"`{command}` cannot run under a distributed launcher (WORLD_SIZE={launch.count()}); only `run` can. Start it "
            "without the launcher, or unset WORLD_SIZE"
        )


@app.command()
def compare(
    objectives: Annotated[
        str | None,
        typer.Option(
            help="Alignment objectives, with commas; see `list objectives`. LABEL=NAME compares one under several settings, "
            "which --set objectives.LABEL.objective.KEY=VALUE gives it."
        ),
    ] = None,
    samplers: Annotated[
        str | None, typer.Option(help="Rollout samplers, with commas, or LABEL=NAME; see `list samplers`.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks, with commas. (default: the preset's)")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many seeds, from 0 on; or which ones, with commas. (default: 3)")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Model: a name, or a local diffusers folder. (default: tiny)")] = None,
    preset: Annotated[str | None, typer.Option(help="As for `run`. (default: quick)")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="model_rows=N, reward_calls=N or seconds=N: where each cell ends. "
            "(default: the model rows that the preset plans for the cheapest pair)"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; that of an earlier comparison goes on. (default: results/<time>)")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with keys of the configuration, shaped like a preset.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="dotted.key=value; for one name objectives.tmpo.objective.beta=3.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: a cluster at RAY_ADDRESS, else one on this machine.")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Cells at work at a time on this machine.")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share a cell, each with a GPU if there are any.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs that each cell asks of Ray.")] = 0.0,
    reward: REWARD = None,
    diversity: DIVERSITY = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print cells, budget and estimated time; run nothing.")] = False,
) -> None:
    """Trains a grid of pairs under one budget and reports on it; the same call goes on with an interrupted one."""
    from alignbench.comparison import compare as comparison
    from alignbench.config.run_config import merged_layers, read_settings

    if not (objectives and samplers):
        if out is None or any((objectives, samplers, tasks, seeds, backbone, preset, budget, config, sets)):
            raise UserError("compare needs --objectives and --samplers; with --out DIR alone it goes on with what DIR compares")
        grid = comparison.read_grid(out)
    else:
        former = comparison.read_grid(out) if out and (out / comparison.SETTINGS).is_file() else None
        grid = comparison.plan_grid(
            objectives=_names(objectives),
            samplers=_names(samplers),
            tasks=_names(tasks) if tasks else None,
            seeds=_seeds(seeds or "3"),
            backbone=backbone,
            preset=preset,
            budget=parse_assignments(budget or []) or (former.budget.model_dump(exclude_none=True) if former else {}),
            settings=merged_layers({} if config is None else read_settings(config), parse_assignments(sets or [])),
            workers=workers,
            processes=processes,
        )
    name = out or _results_folder("comparison")
    cells = grid.cells()
    done = len(comparison.done(cells, name))

    from alignbench.cli.console import show_grid

    if dry_run:
        comparison.check_folder(cells, name)
        show_grid(grid, name, comparison.expected_costs(grid), workers, processes, done)
        return
    with nullcontext(name) if out else reserved(name) as folder:
        _compare(grid, folder, done, engine, workers, processes, gpus, reward, diversity)


def _compare(
    grid: "Grid",
    folder: Path,
    done: int,
    engine: str,
    workers: int,
    processes: int,
    gpus: float,
    reward: str | None,
    diversity: str | None,
) -> None:
    from alignbench.cli.console import GridProgress
    from alignbench.comparison import compare as comparison

    cells = grid.cells()
    try:
        with GridProgress(len(cells), done) as shown:
            record = comparison.compare(
                grid, folder, engine=engine, workers=workers, processes=processes, gpus=gpus, observer=shown
            )
    except KeyboardInterrupt:
        same = {"--out": str(folder), "--engine": engine, "--workers": str(workers), "--processes": str(processes)}
        same |= {"--gpus": f"{gpus:g}"}
        usual = {"--engine": "local", "--workers": "1", "--processes": "1", "--gpus": "0"}
        words = [word for option, value in same.items() if value != usual.get(option) for word in (option, value)]
        typer.echo(f"alignbench: interrupted; go on with: {shlex.join(['alignbench', 'compare', *words])}", err=True)
        raise typer.Exit(130) from None
    failed = [cell for cell in record.cells if cell.status == "failed"]
    if len(failed) < len(cells):
        from alignbench.reports.report import write_report

        write_report(folder, reward=reward, diversity=diversity)
        typer.echo(f"report: {folder / 'report.html'}", err=True)
    if failed:
        typer.echo(f"alignbench: {len(failed)} of {len(cells)} cells failed; the same call tries them again", err=True)
        raise typer.Exit(1)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="YAML file of the study: a grid, and parts in which keys of it differ.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder; that of an earlier call goes on. (default: results/<time>-<file>)")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="As for `compare`; in place of the study's own.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that work on it.")] = 1,
) -> None:
    """Runs several comparisons that answer one question, and writes their tables and pictures into DIR/report."""
    from alignbench.cli.console import counting
    from alignbench.comparison import study as studies
    from alignbench.records.record import command
    from alignbench.reports.study_report import write_study

    wanted = studies.read_study(file)
    with nullcontext(out) if out else reserved(_results_folder(file.stem)) as folder:
        try:
            with counting("parts") as count:
                failed = studies.run(
                    wanted,
                    folder,
                    seeds=_seeds(seeds) if seeds else None,
                    workers=workers,
                    advance=lambda name, done, total: count(done, total, name),
                )
        except KeyboardInterrupt:
            typer.echo("alignbench: interrupted; the same call goes on", err=True)
            raise typer.Exit(130) from None
        for written in write_study(folder, command()):
            print(written)
    for line in failed:
        typer.echo(f"alignbench: {line}", err=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def plot(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, or of many.")],
    reward: REWARD = None,
    diversity: DIVERSITY = None,
) -> None:
    """Draws the plots of a run, or of the comparison of all runs below a folder, again from the records alone."""
    if (folder / "result.json").exists() or not folder.is_dir():
        from alignbench.figures.plots import plot_run

        if reward or diversity:
            raise UserError("--reward and --diversity choose the axes of a comparison's plots; a single run has no such plot")
        written = plot_run(folder, lambda line: typer.echo(f"alignbench: {line}", err=True))
    else:
        from alignbench.reports.report import write_plots

        written, unreadable = write_plots(folder, reward=reward, diversity=diversity)
        for line in unreadable:
            typer.echo(f"alignbench: {line}", err=True)
    for file in written:
        print(file)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a comparison, of a run, or any that has runs below it.")],
    reward: REWARD = None,
    diversity: DIVERSITY = None,
) -> None:
    """Writes report.html, report.md, tables and plots of all finished runs below a folder, from the records alone."""
    from alignbench.reports.report import write_report

    for file in write_report(folder, reward=reward, diversity=diversity):
        print(file)


def failure(error: BaseException) -> str:
    """The line on stderr for an error that ends a command."""
    return f"alignbench: error: {error}"
