"""The command `run`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from alignbench.cli.options import Commands, config_of, results_folder, without_defaults
from alignbench.config.run_config import RESULT_NEUTRAL_KEYS, RunConfig, load_config, parse_assignments
from alignbench.errors import UserError
from alignbench.files.writing import reserved
from alignbench.runtime import launch
from alignbench.runtime.streams import print_json

commands = Commands("Train and compare")


@commands.command()
def run(
    objective: Annotated[
        str | None, typer.Option(help="Alignment objective; see `list objectives`. (default: the preset's, else tmpo)")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="Rollout sampler; see `list samplers`. (default: the preset's, else dynamic_tree)")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Model: a name, or a local diffusers folder. (default: tiny)")] = None,
    task: Annotated[
        str | None, typer.Option(help="Prompts, rewards and judges: a name or a YAML file. (default: the preset's, else ocr)")
    ] = None,
    scorer_url: Annotated[
        str | None, typer.Option(help="URL of a scorer service that replaces the task's rewards; see `serve-scorer`.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of rollouts, plans and prompt order. (default: 0)")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="smoke (takes seconds), quick (minutes), paper (the published settings), or matching (the tilted target as "
            "fixed point). (default: quick)"
        ),
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(help="Number of rollouts, each followed by its optimizer steps. (default: the preset's)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; it must not exist. (default: results/<time>-<pair>)")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any keys of the configuration; see `show run`.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="dotted.key=value, for instance objective.beta=3; can be repeated. See `show run`."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Continue the interrupted run in this folder; with --iterations, extend it to that number, if its "
            f"schedules allow. --set may only change keys that do not affect the results: {', '.join(RESULT_NEUTRAL_KEYS)}."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Estimate model evaluations, parameters, memory and time; train and write nothing."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON document on stdout.")] = False,
) -> None:
    """Trains and evaluates one objective with one sampler. All options have defaults."""
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
        excess = [f"--{k}" for k, v in {**options, **others}.items() if v is not None and k != "iterations"]
        excess += [f"--set {key}" for key in parse_assignments(sets or []) if key not in RESULT_NEUTRAL_KEYS]
        if excess:
            raise UserError(f"--resume continues a run with its own settings; leave out {', '.join(excess)}")
        more = {} if iterations is None else {"iterations": iterations}
        settings, folder = load_config(file=config_of(resume), options=more, sets=sets or []), resume
        if _is_finished(settings, folder, as_json):
            return
    else:
        settings = load_config(preset=preset, file=config, options=without_defaults(options), sets=sets or [])
        folder = out or results_folder(settings.objective.title, settings.sampler.title, f"s{settings.seed}")
    if dry_run:
        if launch.is_first():
            _show_forecast(settings, folder, as_json)
        return
    with reserved(folder) if resume is None and out is None and launch.is_first() else nullcontext(folder) as folder:
        _run(settings, folder, resume is not None, as_json)


def _is_finished(settings: RunConfig, folder: Path, as_json: bool) -> bool:
    """Whether the run in the folder has done all that is asked for; if so, its record is shown."""
    from alignbench.records.record import RESULT, read_result

    if not (folder / RESULT).is_file():
        return False
    result = read_result(folder)
    if settings.iterations is not None and settings.iterations > (result.config.get("iterations") or settings.iterations):
        return False
    if launch.is_first():
        done = f"{result.run.iterations} iteration{'s' * (result.run.iterations != 1)}, {result.run.status}"
        extend = "; --iterations N extends it" if result.run.status == "complete" else ""
        typer.echo(f"the run in {folder} is finished ({done}){extend}", err=True)
        if as_json:
            print_json(result.model_dump_json(indent=2))
    return True


def _run(settings: RunConfig, folder: Path, resume: bool, as_json: bool) -> None:
    try:
        from alignbench.cli.views.run import Terminal
        from alignbench.runtime.processes import shutdown
        from alignbench.training.progress import Silent
        from alignbench.training.run import run as train

        result = train(settings, folder, console=Silent() if as_json else Terminal(), resume=resume)
        shutdown()
    except KeyboardInterrupt:
        begun = (folder / "config.yaml").is_file()
        after = f"resume with: alignbench run --resume {folder}" if begun else "nothing has been written"
        if launch.is_first():
            typer.echo(f"alignbench: interrupted; {after}", err=True)
        raise typer.Exit(130) from None
    if as_json and launch.is_first():
        print_json(result.model_dump_json(indent=2))


def _show_forecast(settings: RunConfig, folder: Path, as_json: bool) -> None:
    from alignbench.cli.views.run import show_forecast
    from alignbench.files.writing import refuse_taken
    from alignbench.forecast.costs import forecast

    refuse_taken(folder, "choose another --out")
    expected = forecast(settings)
    if as_json:
        print_json(expected.model_dump_json(indent=2))
    else:
        show_forecast(expected, settings, folder)
