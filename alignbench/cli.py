"""The command line. Nothing heavy is imported before a command needs it, so `--help` and `list` answer at once."""

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from alignbench import __version__, registry, scaffold, tasks
from alignbench.config import RunConfig, load_config, parse_assignments, validate
from alignbench.errors import UserError, did_you_mean

app = typer.Typer(
    name="alignbench",
    help="Compares alignment objectives and rollout samplers for flow-matching text-to-image models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

KINDS = (*registry.PACKAGES, "tasks")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"alignbench {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    objective: Annotated[str | None, typer.Option(help="Alignment objective; see `list objectives`. (default: tmpo)")] = None,
    sampler: Annotated[str | None, typer.Option(help="Rollout sampler; see `list samplers`. (default: dynamic_tree)")] = None,
    backbone: Annotated[str | None, typer.Option(help="Model: a name, or a local diffusers folder. (default: tiny)")] = None,
    task: Annotated[str | None, typer.Option(help="Prompts, reward and judges: a name or a YAML file. (default: ocr)")] = None,
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
    resume: Annotated[Path | None, typer.Option(help="Continue the interrupted run in this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON document on stdout.")] = False,
) -> None:
    """Trains and evaluates one objective with one sampler; a bare `run` works."""
    options = {
        "objective": objective,
        "sampler": sampler,
        "backbone": backbone,
        "task": task,
        "seed": seed,
        "iterations": iterations,
    }
    if resume is not None:
        given = [f"--{k}" for k, v in {**options, "preset": preset, "out": out, "config": config, "set": sets}.items() if v]
        if given:
            raise UserError(f"--resume continues a run with its own settings; leave out {', '.join(given)}")
        if not (resume / "config.yaml").is_file():
            raise UserError(f"{resume} is no folder of a run: it has no config.yaml")
        settings, folder = load_config(file=resume / "config.yaml"), resume
    else:
        settings = load_config(preset=preset, file=config, options=options, sets=sets or [])
        folder = out or _default_folder(settings)

    from alignbench.console import Silent, Terminal
    from alignbench.training import run as train

    try:
        result = train(settings, folder, console=Silent() if as_json else Terminal(), resume=resume is not None)
    except KeyboardInterrupt:
        typer.echo(f"alignbench: interrupted; go on with: alignbench run --resume {folder}", err=True)
        raise typer.Exit(130) from None
    if as_json:
        print(result.model_dump_json(indent=2))


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


@app.command()
def plot(folder: Annotated[Path, typer.Argument(help="Folder of a run, or of many.")]) -> None:
    """Draws the plots of a run, or of the comparison of all runs below a folder, again from the records alone."""
    if (folder / "result.json").exists() or not folder.is_dir():
        from alignbench.plots import plot_run

        written = plot_run(folder)
    else:
        from alignbench.comparison_plots import plot_comparison
        from alignbench.results import read_results

        written = plot_comparison(read_results(folder), folder / "plots")
    for file in written:
        print(file)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a comparison, or any that has runs below it.")]) -> None:
    """Writes report.html, report.md, tables and plots of all finished runs below a folder, from the records alone."""
    from alignbench.report import write_report

    for file in write_report(folder):
        print(file)


@app.command()
def check(
    objective: Annotated[str, typer.Option(help="Alignment objective: a name or a dotted path.")] = "tmpo",
    sampler: Annotated[str, typer.Option(help="Rollout sampler: a name or a dotted path.")] = "dynamic_tree",
    backbone: Annotated[str, typer.Option(help="Model: a name, a dotted path, or a local diffusers folder.")] = "tiny",
    config: Annotated[Path | None, typer.Option(help="YAML file with any keys of a run's configuration.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value, for instance sampler.steps=8.")] = None,
    iterations: Annotated[int, typer.Option(min=0, help="Of the learning check; 0 leaves it out.")] = 20,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate of the learning check.")] = 3e-4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Checks a plug-in: plan, costs, importance ratio, gradients, missing rewards, learning. Exit code 1 where one fails."""
    options = {"objective": objective, "sampler": sampler, "backbone": backbone}
    settings = load_config(file=config, options=options, sets=sets or [])

    from alignbench import checking
    from alignbench.console import Checklist

    subject = checking.subject_of(settings)
    with Checklist(silent=as_json) as shown:
        found = [shown.add(result) for result in checking.run_checks(subject, iterations=iterations, lr=lr)]
    if as_json:
        print(json.dumps([result.model_dump() for result in found], indent=2))
    if any(result.failed for result in found):
        raise typer.Exit(1)


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

    from alignbench.console import counting
    from alignbench.evaluation import Judges
    from alignbench.load import load_configured_backbone
    from alignbench.pairs import write_pairs

    chosen = tasks.load_task(settings.task)
    wanted = chosen.train_prompts[:prompts]
    policy = load_configured_backbone(settings)
    with counting(len(wanted), "prompts") as advance:
        count = write_pairs(policy, Judges(chosen), wanted, images, seed, out, advance)
    print(f"wrote {count} pairs from {len(wanted)} prompts to {out / 'pairs.jsonl'}")


@app.command("train-tiny")
def train_tiny(
    out: Annotated[Path, typer.Option(help="Where the diffusers folder is written.")],
    work: Annotated[Path, typer.Option(help="Checkpoints; the same folder again goes on where it stopped.")] = Path(
        "train-tiny"
    ),
    sets: Annotated[list[str] | None, typer.Option("--set", help="key=value of TinyTraining, for instance steps=500.")] = None,
) -> None:
    """Trains the embedded `tiny` backbone from nothing on drawn pictures; about an hour and a half on two CPU cores."""
    from alignbench.backbones import train_tiny as training

    settings = validate(training.TinyTraining, parse_assignments(sets or []), where="train-tiny")
    training.train_tiny(settings, work, out)


def _default_folder(settings: RunConfig) -> Path:
    pair = "-".join(p.replace("/", "_").replace(":", "_") for p in (settings.objective.name, settings.sampler.name))
    return Path("results") / f"{datetime.now():%Y%m%d-%H%M%S}-{pair}-s{settings.seed}"


def failure(error: BaseException) -> str:
    """The line on stderr for an error that ends a command."""
    return f"alignbench: error: {error}"
