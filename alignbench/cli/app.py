"""The command line. Nothing heavy is imported before a command needs it, so `--help` and `list` answer at once."""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from alignbench import __version__, registry, tasks
from alignbench.authoring import scaffold
from alignbench.cli import front
from alignbench.config.run_config import WITHOUT_EFFECT, RunConfig, load_config, parse_assignments
from alignbench.errors import UserError, did_you_mean
from alignbench.files.paths import local_path
from alignbench.files.writing import LOCK, is_free, reserved
from alignbench.runtime import import_path, launch, variables
from alignbench.runtime.streams import print_json
from alignbench.settings import validate

if TYPE_CHECKING:
    from alignbench.comparison.compare import Grid

F = TypeVar("F", bound=Callable[..., Any])


class _App(typer.Typer):
    """Commands whose paths may begin with `~`, in every option alike: a shell leaves it in quotes and after `--out=`."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[F], F]:
        register = super().command(name, **options)

        def decorate(function: F) -> F:
            @wraps(function)
            def with_paths(**given: Any) -> Any:
                return function(**{key: _home(value) for key, value in given.items()})

            register(with_paths)
            return function

        return decorate


def _home(value: Any) -> Any:
    if isinstance(value, list):
        return [_home(each) for each in value]
    return local_path(value) if isinstance(value, Path) else value


app = _App(
    name="alignbench",
    help="Compares alignment objectives and rollout samplers for flow-matching text-to-image models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

KINDS = (*registry.PACKAGES, "tasks")
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
    if launch.count() > 1 and context.invoked_subcommand != "run":
        raise UserError(
            f"{context.invoked_subcommand} is one process, but a launcher started {launch.count()} (WORLD_SIZE); only `run` "
            "shares its work, so unset WORLD_SIZE or start it without the launcher"
        )


@app.command()
def run(
    objective: Annotated[str | None, typer.Option(help="Alignment objective; see `list objectives`. (default: tmpo)")] = None,
    sampler: Annotated[str | None, typer.Option(help="Rollout sampler; see `list samplers`. (default: dynamic_tree)")] = None,
    backbone: Annotated[str | None, typer.Option(help="Model: a name, or a local diffusers folder. (default: tiny)")] = None,
    task: Annotated[str | None, typer.Option(help="Prompts, reward and judges: a name or a YAML file. (default: ocr)")] = None,
    scorer_url: Annotated[
        str | None, typer.Option(help="A scorer service that rewards in place of the task's rewards; see `serve-scorer`.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of rollouts, plans and prompt order. (default: 0)")] = None,
    preset: Annotated[
        str | None, typer.Option(help="smoke (seconds), quick (minutes), paper (published). (default: quick)")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Rollouts, each followed by its updates.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; must not exist. (default: results/<time>-<pair>)")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any keys of the configuration.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value, for instance objective.beta=3.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help=f"Continue the interrupted run in this folder; --set may change {', '.join(WITHOUT_EFFECT)}."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print rows, parameters, estimated memory and time; train and write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON document on stdout.")] = False,
) -> None:
    """Trains and evaluates one objective with one sampler; a bare `run` works."""
    options = {
        "objective": objective,
        "sampler": sampler,
        "backbone": backbone,
        "task": task,
        "scorer_url": scorer_url,
        "seed": seed,
        "iterations": iterations,
    }
    if resume is not None:
        others = {"preset": preset, "out": out, "config": config, "dry-run": dry_run or None}
        given = [f"--{k}" for k, v in {**options, **others}.items() if v is not None]
        given += [f"--set {key}" for key in parse_assignments(sets or []) if key not in WITHOUT_EFFECT]
        if given:
            raise UserError(f"--resume continues a run with its own settings; leave out {', '.join(given)}")
        settings, folder = load_config(file=_config_of(resume), sets=sets or []), resume
    else:
        settings = load_config(preset=preset, file=config, options=_given(options), sets=sets or [])
        folder = out or _default_folder(settings)
    if dry_run:
        if launch.is_first():
            _show_forecast(settings, folder, as_json)
        return
    with reserved(folder) if resume is None and out is None and launch.is_first() else nullcontext(folder) as folder:
        _run(settings, folder, resume is not None, as_json)


def _run(settings: RunConfig, folder: Path, resume: bool, as_json: bool) -> None:
    try:
        from alignbench.cli.console import Terminal
        from alignbench.runtime.processes import shutdown
        from alignbench.training.progress import Silent
        from alignbench.training.run import run as train

        result = train(settings, folder, console=Silent() if as_json else Terminal(), resume=resume)
        shutdown()
    except KeyboardInterrupt:
        begun = (folder / "config.yaml").is_file()
        after = f"go on with: alignbench run --resume {folder}" if begun else "nothing has been written"
        if launch.is_first():
            typer.echo(f"alignbench: interrupted; {after}", err=True)
        raise typer.Exit(130) from None
    if as_json and launch.is_first():
        print_json(result.model_dump_json(indent=2))


def _show_forecast(settings: RunConfig, folder: Path, as_json: bool) -> None:
    from alignbench.cli.console import show_forecast
    from alignbench.files.writing import refuse_taken
    from alignbench.training.costs import forecast

    refuse_taken(folder, "choose another --out")
    found = forecast(settings)
    if as_json:
        print_json(found.model_dump_json(indent=2))
    else:
        show_forecast(found, settings, folder)


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


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(help=f"One of: {', '.join(KINDS)}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Names of objectives, samplers, evals, backbones and tasks, a line each."""
    if kind is not None and kind not in KINDS:
        raise UserError(f"there is nothing called {kind!r} to list{did_you_mean(kind, KINDS)}")
    found = {k: tasks.describe() if k == "tasks" else registry.describe(k) for k in ([kind] if kind else KINDS)}
    if as_json:
        print(json.dumps(found, indent=2))
        return
    width = max(len(name) for names in found.values() for name in names)
    for k, described in found.items():
        print(k)
        for name, line in described.items():
            print(f"  {name:<{width}}  {line}")


@app.command()
def show(
    kind: Annotated[str, typer.Argument(help="objective, sampler, eval or backbone; or run, for the keys of a run.")],
    name: Annotated[str | None, typer.Argument(help="Name or dotted path of the plug-in.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Shows what a plug-in is, its source, and every setting with type, default and meaning."""
    from alignbench.authoring.describing import describe
    from alignbench.cli.console import show_description

    found = describe(kind, name)
    if as_json:
        print_json(found.model_dump_json(indent=2))
    else:
        show_description(found)


@app.command()
def new(
    kind: Annotated[str, typer.Argument(help=f"One of: {', '.join(scaffold.KINDS)}.")],
    name: Annotated[str, typer.Argument(help="Its name: lower-case letters, digits and underscores.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of both files. (default: where it belongs in a checkout, else here)")
    ] = None,
) -> None:
    """Writes a working plug-in and its test, to start from; overwrites nothing."""
    made = scaffold.new(kind, name, out)
    print(f"wrote {made.plugin}\nwrote {made.test}\n\n{made.next}")


@app.command("eval")
def eval_(
    pipeline: Annotated[str | None, typer.Option(help="A local diffusers folder, or a backbone's name.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of a run, finished or interrupted.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of pictures that were made elsewhere; needs --prompts.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Their prompts: txt, csv, tsv, json, jsonl or parquet, or a pipe. A column `image` names each row's file; "
            "otherwise the pictures, sorted by name, are dealt out in order, an equal number to each prompt."
        ),
    ] = None,
    evals: Annotated[
        str | None, typer.Option(help="Names, separated by commas; see `list evals`. (default: those of the task)")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Prompts and evals: a name or a YAML file. (default: ocr)")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="dotted.key=value of a run's configuration, or evals.NAME.key=value of an eval."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for eval.json and evals.parquet; must not exist.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON document on stdout.")] = False,
) -> None:
    """Scores a pipeline, a run's checkpoint, or pictures made elsewhere, in the way that a run does."""
    if sum(source is not None for source in (pipeline, checkpoint, images)) != 1:
        raise UserError("say what to score: one of --pipeline, --checkpoint, --images")
    if (images is None) != (prompts is None):
        raise UserError("--images and --prompts go together")
    given = parse_assignments(sets or [])
    settings = given.pop("evals", {})
    if not (isinstance(settings, dict) and all(isinstance(of_one, dict) for of_one in settings.values())):
        raise UserError("--set evals takes evals.NAME.key=value")
    options = _given({"backbone": pipeline, "task": task})
    file = _config_of(checkpoint) if checkpoint else None
    config = load_config(file=file, options=options, sets=[s for s in sets or [] if not s.startswith("evals.")])
    names = _names(evals or "")

    from alignbench.cli.console import Judgement
    from alignbench.scoring import score as scoring

    with Judgement(silent=as_json) as shown:
        if images is not None and prompts is not None:
            record = scoring.score_pictures(images, prompts, config, out, evals=names, settings=settings, advance=shown.advance)
        else:
            record = scoring.score_model(config, out, run=checkpoint, evals=names, settings=settings, advance=shown.advance)
    if as_json:
        print_json(record.model_dump_json(indent=2))
    else:
        shown.end(record, out)


app.command()(front.front)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or interrupted.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; must not exist. (default: RUN/export)")] = None,
    which: Annotated[
        str, typer.Option(help="last, the weights that the record is about; or best, by the training reward (best_window).")
    ] = "last",
) -> None:
    """Writes a run's weights for plain diffusers: a LoRA's file for load_lora_weights, or the whole pipeline's folder."""
    config = load_config(file=_config_of(run))
    folder = out or run / "export"

    from alignbench.training import exporting

    print(exporting.export(config, run, folder, which))


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


@app.command()
def check(
    objective: Annotated[str, typer.Option(help="Alignment objective: a name or a dotted path.")] = "tmpo",
    sampler: Annotated[str, typer.Option(help="Rollout sampler: a name or a dotted path.")] = "dynamic_tree",
    backbone: Annotated[str, typer.Option(help="Model: a name, a dotted path, or a local diffusers folder.")] = "tiny",
    config: Annotated[Path | None, typer.Option(help="YAML file with any keys of a run's configuration.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value, for instance sampler.steps=8.")] = None,
    iterations: Annotated[int, typer.Option(min=0, help="Of the learning check; 0 leaves it out.")] = 20,
    lr: Annotated[
        float | None, typer.Option(min=0, help="Learning rate of the learning check. (default: three times the preset's)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Checks a plug-in: plan, costs, importance ratio, gradients, finite numbers, learning. Exit code 1 where one fails."""
    options = {"objective": objective, "sampler": sampler, "backbone": backbone}
    settings = load_config(file=config, options=options, sets=sets or [])

    from alignbench.authoring import checking
    from alignbench.cli.console import Checklist

    subject = checking.subject_of(settings)
    lr = checking.LEARNING_RATE * settings.optimizer.lr if lr is None else lr
    with Checklist(silent=as_json) as shown:
        found = [shown.add(result) for result in checking.run_checks(subject, iterations=iterations, lr=lr)]
    if as_json:
        print(json.dumps([result.model_dump() for result in found], indent=2))
    if any(result.failed for result in found):
        raise typer.Exit(1)


@app.command()
def diagnose(
    sampler: Annotated[
        str | None, typer.Option(help="Rollout sampler: a name or a dotted path. (default: dynamic_tree, or the run's)")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Model: a name, a dotted path, or a local diffusers folder. (default: tiny)")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of a run, finished or interrupted, whose policy is diagnosed.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Its prompts are drawn and its reward scores. (default: ocr)")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many of the training prompts.")] = 4,
    groups: Annotated[
        int | None, typer.Option(min=8, help="Of each prompt. (default: 24; 400 of points in the plane, which cost nothing)")
    ] = None,
    beta: Annotated[float, typer.Option(min=0, help="Inverse temperature, on standardised rewards.")] = 2.0,
    progress: Annotated[float, typer.Option(min=0, max=1, help="Of the training that the plans are drawn for.")] = 0.5,
    seed: Annotated[int | None, typer.Option(min=0, help="Of noise and plans. (default: 0, or the run's)")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; must not exist. (default: results/<time>-diagnose-NAME)")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any keys of a run's configuration.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value, for instance sampler.levels=3.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON document on stdout.")] = False,
) -> None:
    """Measures how alike a group's rollouts are, how far from independent ones, and how biased an average over them is."""
    options = _given({"sampler": sampler, "backbone": backbone, "task": task, "seed": seed})
    if checkpoint is not None and config is not None:
        raise UserError("--checkpoint brings the run's configuration with it; change it by --set instead of --config")
    settings = load_config(file=_config_of(checkpoint) if checkpoint else config, options=options, sets=sets or [])
    name = out or _results_folder("diagnose", settings.sampler.name)

    from alignbench.cli.console import counting, show_diagnosis
    from alignbench.diagnosis import diagnose as diagnosis

    with nullcontext(name) if out else reserved(name) as folder, counting("rounds of groups") as advance:
        found = diagnosis.diagnose(
            settings, folder, run=checkpoint, prompts=prompts, rounds=groups, beta=beta, progress=progress, advance=advance
        )
    if as_json:
        print_json(found.model_dump_json(indent=2))
    else:
        show_diagnosis(found, folder)


@app.command()
def pairs(
    out: Annotated[Path, typer.Option(help="Folder for pairs.jsonl and the pictures; must not exist.")],
    backbone: Annotated[str, typer.Option(help="Model: a name, or a local diffusers folder.")] = "tiny",
    task: Annotated[str, typer.Option(help="Its training prompts are drawn and its reward picks.")] = "ocr",
    prompts: Annotated[int | None, typer.Option(min=1, help="How many of them. (default: all)")] = None,
    images: Annotated[int, typer.Option(min=2, help="Pictures of each, of which the best and the worst are kept.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    sets: Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value of a run's configuration.")] = None,
) -> None:
    """Writes pairs of a better and a worse picture, for offline DPO: `run --objective dpo --set pairs=DIR/pairs.jsonl`."""
    settings = load_config(options={"backbone": backbone, "task": task, "seed": seed}, sets=sets or [])

    from alignbench.cli.console import counting
    from alignbench.evaluation.evaluate import MetricSuite
    from alignbench.load import load_configured_backbone
    from alignbench.training.pairs import write_pairs

    chosen = tasks.load_task(settings.task)
    wanted = chosen.train_prompts[:prompts]
    judges = MetricSuite(chosen, settings.scorer_timeout)
    judges.require()
    policy = load_configured_backbone(settings)
    with counting("prompts") as advance:
        count = write_pairs(
            policy,
            judges,
            wanted,
            images,
            seed,
            out,
            lambda done, found: advance(done, len(wanted), f"{found} pairs"),
            normalise_rewards=settings.normalise_rewards,
        )
    print(f"wrote {count} pairs from {len(wanted)} prompts to {out / 'pairs.jsonl'}")


@app.command()
def prompts(
    out: Annotated[Path, typer.Option(help="The .jsonl file to write; must not exist.")],
    objects: Annotated[str, typer.Option(help="coco: its 80 classes; drawn: the shapes of the `geneval` task.")] = "coco",
    each: Annotated[int | None, typer.Option(min=1, help="Of each task type. (default: as many as GenEval's list has)")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is asked for.")] = 0,
    exclude: Annotated[
        list[Path] | None, typer.Option(help="A file whose prompts are not made again; can be repeated.")
    ] = None,
) -> None:
    """Writes prompts in GenEval's six task types with what must be seen, in the layout of its own list."""
    from alignbench.tasks import geneval_prompts
    from alignbench.tasks.prompts import read_prompts

    counts = dict.fromkeys(geneval_prompts.OFFICIAL_COUNTS, each) if each else geneval_prompts.OFFICIAL_COUNTS
    known = {prompt for file in exclude or [] for prompt in read_prompts(file)}
    entries = geneval_prompts.generate(objects, counts, seed, known)
    geneval_prompts.write(entries, out)
    made = Counter(entry["tag"] for entry in entries)
    print(f"wrote {len(entries)} prompts to {out}: {', '.join(f'{count} {tag}' for tag, count in made.items())}")


@app.command("serve-scorer")
def serve_scorer(
    name: Annotated[str, typer.Argument(help="A scorer: a name or a dotted path; see `list evals`.")],
    host: Annotated[str, typer.Option(help="Address to listen on. Whoever can reach it can use it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8765,
    sets: Annotated[list[str] | None, typer.Option("--set", help="key=value of the scorer's settings.")] = None,
    max_mb: Annotated[int, typer.Option(min=1, help="Largest request, in MiB.")] = 64,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; further ones are told to ask again later.")] = 32,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="A file whose content each request must bring as its token. "
            "(default: the variable ALIGNBENCH_SCORER_TOKEN, if it is set)"
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name that clients call this machine by; can be repeated.")
    ] = None,
) -> None:
    """Offers a scorer over HTTP, for `run --scorer-url` or the eval `remote`; Ctrl-C ends it."""
    from alignbench.load import load_scorer
    from alignbench.scoring.serving import serve

    scorer = load_scorer(name, **parse_assignments(sets or []))
    serve(scorer, host, port, max_mb * 2**20, queue=queue, token_file=token_file, allowed_hosts=allow_host or [])


@app.command("train-tiny")
def train_tiny(
    out: Annotated[Path, typer.Option(help="Where the diffusers folder is written.")],
    work: Annotated[Path, typer.Option(help="Checkpoints; the same folder again goes on where it stopped.")] = Path(
        "train-tiny"
    ),
    sets: Annotated[list[str] | None, typer.Option("--set", help="key=value of TinyTraining, for instance seed=1.")] = None,
) -> None:
    """Trains the embedded `tiny` backbone from nothing on drawn pictures; about two hours on two CPU cores."""
    from alignbench.embedded import train_tiny as training

    settings = validate(training.TinyTraining, parse_assignments(sets or []), where="train-tiny")
    training.train_tiny(settings, work, out)


@app.command("train-pickscore")
def train_pickscore(
    out: Annotated[Path, typer.Option(help="Where the folder is written that CLIPModel opens; must not exist.")],
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of PickScoreTraining, for instance steps=500.")
    ] = None,
) -> None:
    """Trains the small CLIP that scores `tiny` pictures on drawn pairs; minutes on one CPU core."""
    from alignbench.embedded import train_pickscore as training

    settings = validate(training.PickScoreTraining, parse_assignments(sets or []), where="train-pickscore")
    training.train_pickscore(settings, out)


def _config_of(run: Path) -> Path:
    """The configuration of a run's folder; raises UserError where it has none."""
    file = run / "config.yaml"
    if run.is_dir() and not file.is_file() and (run / LOCK).exists() and is_free(run):
        raise UserError(f"the run in {run} was ended before it had begun; start it again with --out {run}")
    if not file.is_file():
        raise UserError(f"{run} is no folder of a run: it has no config.yaml")
    return file


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def _seeds(text: str) -> list[int]:
    """`5` is the first five seeds, `3,7` are these two."""
    try:
        numbers = [int(part) for part in _names(text)]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or (numbers == [0] and "," not in text):
        raise UserError(f"--seeds takes how many, such as 5, or which ones, such as 3,7; got {text!r}")
    return numbers if "," in text else list(range(numbers[0]))


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that were typed."""
    return {key: value for key, value in options.items() if value is not None}


def _default_folder(settings: RunConfig) -> Path:
    return _results_folder(settings.objective.title, settings.sampler.title, f"s{settings.seed}")


def _results_folder(*parts: str) -> Path:
    name = "-".join(registry.file_name(part) for part in parts)
    return Path("results") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"


def failure(error: BaseException) -> str:
    """The line on stderr for an error that ends a command."""
    return f"alignbench: error: {error}"
