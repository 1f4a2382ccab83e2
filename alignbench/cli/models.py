"""Commands on models that are there: `eval`, `export` and `serve-scorer`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from alignbench.cli.front import front
from alignbench.cli.options import Commands, config_of, eval_settings, names, results_folder, without_defaults
from alignbench.config.run_config import RunConfig, load_config, parse_assignments
from alignbench.errors import UserError
from alignbench.runtime.streams import print_json

commands = Commands("Evaluate and export models")
commands.command()(front)


@commands.command("eval")
def eval_(
    pipeline: Annotated[str | None, typer.Option(help="A local diffusers folder, or the name of a backbone.")] = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a run, finished or interrupted; several are compared (see --sweep)."),
    ] = None,
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
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE,VALUE,... of guidance, evaluation.KEY or inference.KEY: evaluates every checkpoint at every "
            "combination, and says whether their ranking at the first one survives; can be repeated."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the record and its tables; it must not exist. (default: none; with --sweep or several checkpoints "
            "results/<time>-eval)"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON document on stdout.")] = False,
) -> None:
    """Evaluates pipelines, checkpoints of runs or existing images, with the metrics that a run uses."""
    if sum(bool(source) for source in (pipeline, checkpoint, images)) != 1:
        raise UserError("choose what to evaluate: one of --pipeline, --checkpoint, --images")
    if (images is None) != (prompts is None):
        raise UserError("--images and --prompts go together")
    assigned = parse_assignments(sets or [])
    settings = eval_settings(assigned)
    options = without_defaults({"backbone": pipeline, "task": task})
    of_run = [s for s in sets or [] if not s.startswith("evals.")]
    runs: list[Path | None] = [*checkpoint] if checkpoint else [None]
    configs = [load_config(file=config_of(run) if run else None, options=options, sets=of_run) for run in runs]
    config, run = configs[0], runs[0]
    chosen = names(evals or "")
    if sweep or len(runs) > 1:
        if images is not None:
            raise UserError("--sweep varies how images are drawn; images that are there already cannot be drawn anew")
        _eval_grid(configs, runs, sweep or [], out or results_folder("eval"), chosen, settings, as_json)
        return

    from alignbench.cli.views.records import EvalView
    from alignbench.scoring import score as scoring

    with EvalView(silent=as_json) as view:
        if images is not None and prompts is not None:
            record = scoring.score_images(images, prompts, config, out, evals=chosen, settings=settings, advance=view.advance)
        else:
            record = scoring.score_model(config, out, run=run, evals=chosen, settings=settings, advance=view.advance)
    if as_json:
        print_json(record.model_dump_json(indent=2))
    else:
        view.end(record, out)


def _eval_grid(
    configs: list[RunConfig],
    runs: list[Path | None],
    sweep: list[str],
    out: Path,
    evals: list[str],
    settings: dict[str, Any],
    as_json: bool,
) -> None:
    """Evaluates several models by several protocols and prints how their rankings agree."""
    from alignbench.cli.views.protocol import show_protocols
    from alignbench.cli.views.records import EvalView
    from alignbench.comparison.sweep_requests import flattened, parse_sweeps
    from alignbench.scoring.protocol_grid import Model, score_grid

    asked = {key: values or [] for key, values in flattened(parse_sweeps(sweep)).items()}
    models = [Model(config, run) for config, run in zip(configs, runs, strict=True)]
    with EvalView(silent=as_json) as view:
        grid = score_grid(models, asked, out, evals=evals, settings=settings, advance=view.advance)
    if as_json:
        print_json(grid.model_dump_json(indent=2))
    else:
        show_protocols(grid, out)


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
