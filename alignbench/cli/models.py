"""Commands on models that are there: `eval`, `export` and `serve-scorer`."""

from pathlib import Path
from typing import Annotated

import typer

from alignbench.cli.front import front
from alignbench.cli.options import Commands, config_of, names, without_defaults
from alignbench.config.run_config import load_config, parse_assignments
from alignbench.errors import UserError
from alignbench.runtime.streams import print_json

commands = Commands("Evaluate and export models")
commands.command()(front)


@commands.command("eval")
def eval_(
    pipeline: Annotated[str | None, typer.Option(help="A local diffusers folder, or the name of a backbone.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of a run, finished or interrupted.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of existing images; it needs --prompts.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompt file of the images: txt, csv, tsv, json, jsonl or parquet, or a pipe. A column `image` names the file "
            "of each row. Without one, images are sorted by name and split evenly over the prompts in order."
        ),
    ] = None,
    evals: Annotated[
        str | None, typer.Option(help="Metrics, separated by commas; see `list evals`. (default: those of the task)")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Prompts and metrics: a name or a YAML file. (default: the run's, else ocr)")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="dotted.key=value of a run's configuration, or evals.NAME.key=value of a metric; can be repeated."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for eval.json and evals.parquet; it must not exist. (default: none)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON document on stdout.")] = False,
) -> None:
    """Evaluates a pipeline, a run's checkpoint or existing images, with the metrics that a run uses."""
    if sum(source is not None for source in (pipeline, checkpoint, images)) != 1:
        raise UserError("choose what to evaluate: one of --pipeline, --checkpoint, --images")
    if (images is None) != (prompts is None):
        raise UserError("--images and --prompts go together")
    assigned = parse_assignments(sets or [])
    settings = assigned.pop("evals", {})
    if not (isinstance(settings, dict) and all(isinstance(of_one, dict) for of_one in settings.values())):
        raise UserError("--set evals takes evals.NAME.key=value")
    options = without_defaults({"backbone": pipeline, "task": task})
    file = config_of(checkpoint) if checkpoint else None
    config = load_config(file=file, options=options, sets=[s for s in sets or [] if not s.startswith("evals.")])
    chosen = names(evals or "")

    from alignbench.cli.views import EvalView
    from alignbench.scoring import score as scoring

    with EvalView(silent=as_json) as view:
        if images is not None and prompts is not None:
            record = scoring.score_images(images, prompts, config, out, evals=chosen, settings=settings, advance=view.advance)
        else:
            record = scoring.score_model(config, out, run=checkpoint, evals=chosen, settings=settings, advance=view.advance)
    if as_json:
        print_json(record.model_dump_json(indent=2))
    else:
        view.end(record, out)


@commands.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or interrupted.")],
    out: Annotated[Path | None, typer.Option(help="Output folder; it must not exist. (default: RUN/export)")] = None,
    which: Annotated[
        str,
        typer.Option(
            help="Which weights: `last`, which the record describes, or `best`, those with the highest training reward "
            "(`best_window` in `show run`)."
        ),
    ] = "last",
) -> None:
    """Exports a run's weights for plain diffusers, as a LoRA file for `load_lora_weights` or as a pipeline folder."""
    config = load_config(file=config_of(run))
    folder = out or run / "export"

    from alignbench.training import exporting

    print(exporting.export(config, run, folder, which))


@commands.command("serve-scorer")
def serve_scorer(
    name: Annotated[str, typer.Argument(help="Scorer: a name or a dotted path; see `list evals`.")],
    host: Annotated[str, typer.Option(help="Address to listen on. Anyone who can reach it can use the scorer.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8765,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the scorer's settings; can be repeated.")
    ] = None,
    max_mb: Annotated[int, typer.Option(min=1, help="Largest request, in MiB.")] = 64,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; further ones are asked to try again later.")] = 32,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the token that each request must carry. "
            "(default: the variable ALIGNBENCH_SCORER_TOKEN, if it is set)"
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another host name by which clients reach this machine; can be repeated.")
    ] = None,
) -> None:
    """Serves a scorer over HTTP, for `run --scorer-url` or the metric `remote`, until Ctrl-C."""
    from alignbench.load import load_scorer
    from alignbench.scoring.serving import serve

    scorer = load_scorer(name, **parse_assignments(sets or []))
    serve(scorer, host, port, max_mb * 2**20, queue=queue, token_file=token_file, allowed_hosts=allow_host or [])
