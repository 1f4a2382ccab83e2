"""Commands on plug-ins: `list`, `show`, `new`, `check` and `diagnose`."""

import itertools
import json
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from alignbench import registry, tasks
from alignbench.authoring import scaffold
from alignbench.cli.options import Commands, config_of, eval_settings, names, results_folder, whole_numbers, without_defaults
from alignbench.config.run_config import RunConfig, load_config, parse_assignments
from alignbench.errors import UserError, did_you_mean
from alignbench.files.writing import reserved
from alignbench.runtime.streams import print_json

KINDS = (*registry.PACKAGES, "tasks")

commands = Commands("Find, write and check plug-ins")


@commands.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(help=f"One of {', '.join(KINDS)}. (default: all)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Lists objectives, samplers, evals, backbones and tasks, with one line each."""
    if kind is not None and kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}{did_you_mean(kind, KINDS)}")
    listed = {k: tasks.describe() if k == "tasks" else registry.describe(k) for k in ([kind] if kind else KINDS)}
    if as_json:
        strengths = {"strengths": registry.strengths()} if "objectives" in listed else {}
        print(json.dumps(listed | strengths, indent=2))
        return
    width = max(len(name) for lines in listed.values() for name in lines)
    for k, lines in listed.items():
        print(k)
        for name, line in lines.items():
            print(f"  {name:<{width}}  {line}")


@commands.command()
def show(
    kind: Annotated[
        str, typer.Argument(help="One of objective, sampler, eval and backbone; or run, for the configuration of a run.")
    ],
    name: Annotated[str | None, typer.Argument(help="Name or dotted path of the plug-in; none for run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Shows what a plug-in does, its source, and each setting with its type, default and meaning."""
    from alignbench.authoring.describing import describe
    from alignbench.cli.views.records import show_description

    description = describe(kind, name)
    if as_json:
        print_json(description.model_dump_json(indent=2))
    else:
        show_description(description)


@commands.command()
def new(
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(scaffold.KINDS)}.")],
    name: Annotated[str, typer.Argument(help="Name of the plug-in: lower-case letters, digits and underscores.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of both files. (default: their places in a checkout; elsewhere the current folder)"),
    ] = None,
) -> None:
    """Writes a working plug-in and its test as a starting point. Existing files are never overwritten."""
    made = scaffold.new(kind, name, out)
    print(f"wrote {made.plugin}\nwrote {made.test}\n\n{made.next}")


@commands.command()
def check(
    objective: Annotated[str, typer.Option(help="Alignment objective: a name or a dotted path.")] = "tmpo",
    sampler: Annotated[str, typer.Option(help="Rollout sampler: a name or a dotted path.")] = "dynamic_tree",
    backbone: Annotated[str, typer.Option(help="Model: a name, a dotted path, or a local diffusers folder.")] = "tiny",
    config: Annotated[Path | None, typer.Option(help="YAML file with any keys of a run's configuration.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="dotted.key=value, for instance sampler.steps=8; can be repeated.")
    ] = None,
    iterations: Annotated[int, typer.Option(min=0, help="Training iterations of the learning check; 0 skips it.")] = 20,
    lr: Annotated[
        float | None, typer.Option(min=0, help="Learning rate of the learning check. (default: three times the preset's)")
    ] = None,
    eval_: Annotated[
        str | None,
        typer.Option(
            "--eval",
            help="Put metrics of diversity on trial instead: names, separated by commas. The trial plants losses of diversity "
            "of known degrees and says which of them each metric detects, and which harmless changes it takes for one.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="With --eval: fewer prompts, a third of the time.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="With --eval: seed of all draws. (default: 0)")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="With --eval: output folder; it must not exist. (default: results/<time>-trial-NAME)"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Checks a plug-in: its plan, costs, importance ratio, gradients and learning. The exit code is 1 if a check fails.

    With --eval it measures what a metric of diversity sees, and fails on nothing.
    """
    if eval_ is not None:
        if config is not None:
            raise UserError(
                "--eval takes no --config: a trial has its own images; set the metric with --set evals.NAME.key=value"
            )
        _put_on_trial(names(eval_), sets or [], quick, seed or 0, out, as_json)
        return
    if quick or seed is not None or out is not None:
        raise UserError("--quick, --seed and --out belong to --eval; add it, or leave them out")
    options = {"objective": objective, "sampler": sampler, "backbone": backbone}
    settings = load_config(file=config, options=options, sets=sets or [])

    from alignbench.authoring import checking, checking_folder
    from alignbench.backbones import families
    from alignbench.cli.views.records import Checklist

    subject = checking.subject_of(settings)
    lr = checking.LEARNING_RATE * settings.optimizer.lr if lr is None else lr
    of_the_folder = checking_folder.run_checks(subject) if families.is_folder(backbone) else ()
    with Checklist(silent=as_json) as view:
        checks = chain(of_the_folder, checking.run_checks(subject, iterations=iterations, lr=lr))
        results = [view.add(result) for result in checks]
    if as_json:
        print(json.dumps([result.model_dump() for result in results], indent=2))
    if any(result.failed for result in results):
        raise typer.Exit(1)


def _put_on_trial(chosen: Sequence[str], sets: Sequence[str], quick: bool, seed: int, out: Path | None, as_json: bool) -> None:
    """Plants losses of diversity and shows what these metrics see."""
    assigned = parse_assignments(sets)
    settings = eval_settings(assigned)
    if assigned:
        raise UserError("--set of a trial takes evals.NAME.key=value")
    if not chosen:
        raise UserError("--eval needs the name of a metric; `list evals` shows them")

    from alignbench.cli.console import counting
    from alignbench.cli.views.trial import show_trial
    from alignbench.trial import trial

    evals = trial.choices(chosen, settings)
    name = out or results_folder("trial", chosen[0])
    with nullcontext(name) if out else reserved(name) as folder, counting("prompts") as advance:
        record = trial.put_on_trial(evals, folder, size=trial.QUICK if quick else trial.FULL, seed=seed, advance=advance)
    if as_json:
        print_json(record.model_dump_json(indent=2))
    else:
        show_trial(record, folder)


@commands.command()
def diagnose(
    sampler: Annotated[
        str | None, typer.Option(help="Rollout sampler: a name or a dotted path. (default: the run's, else dynamic_tree)")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Model: a name, a dotted path, or a local diffusers folder. (default: tiny)")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder of a run, finished or interrupted, whose policy draws the rollouts. (default: none)"),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task whose training prompts and rewards are used. (default: the run's, else ocr)")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Number of training prompts.")] = 4,
    groups: Annotated[
        int | None,
        typer.Option(min=8, help="Groups per prompt. (default: 24; 400 on gaussian_mixture, where they take seconds)"),
    ] = None,
    beta: Annotated[
        float, typer.Option(min=0, help="Inverse temperature of the target, for rewards with standard deviation 1.")
    ] = 2.0,
    progress: Annotated[float, typer.Option(min=0, max=1, help="Training progress (0 to 1) at which plans are drawn.")] = 0.5,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of noise and plans. (default: the run's, else 0)")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder; it must not exist. (default: results/<time>-diagnose-NAME)")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any keys of a run's configuration.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="dotted.key=value, for instance sampler.levels=3; can be repeated.")
    ] = None,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients",
            help="Compare gradient estimates with the exact gradient instead; --sampler may be a list, and --groups is the "
            "number of estimates (default: 256).",
        ),
    ] = False,
    objective: Annotated[
        str | None, typer.Option(help="With --gradients: objectives, separated by commas. (default: the run's, else tmpo)")
    ] = None,
    rules: Annotated[
        str | None,
        typer.Option(help="With --gradients: rules of stochastic steps, such as sde:0.7,memoryless. (default: the sampler's)"),
    ] = None,
    leaves: Annotated[
        str | None, typer.Option(help="With --gradients: group sizes K, such as 9,27. (default: the sampler's)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON document on stdout.")] = False,
) -> None:
    """Measures how correlated the rollouts of a sampler's groups are, and how much that biases averages over a group.

    With --gradients it measures the bias and the noise of the gradients that objectives estimate from such rollouts.
    """
    if checkpoint is not None and config is not None:
        raise UserError("--checkpoint uses the run's own configuration; change it with --set instead of --config")
    file = config_of(checkpoint) if checkpoint else config
    options = {"backbone": backbone, "task": task, "seed": seed}
    if gradients:
        pairs = itertools.product(names(objective) if objective else [None], names(sampler) if sampler else [None])
        configs = [
            load_config(file=file, options=without_defaults(options | {"objective": o, "sampler": s}), sets=sets or [])
            for o, s in pairs
        ]
        _diagnose_gradients(configs, rules, leaves, checkpoint, prompts, groups, progress, out, as_json)
        return
    if objective or rules or leaves:
        raise UserError("--objective, --rules and --leaves belong to --gradients; add it, or leave them out")
    settings = load_config(file=file, options=without_defaults(options | {"sampler": sampler}), sets=sets or [])
    name = out or results_folder("diagnose", settings.sampler.name)

    from alignbench.cli.console import counting
    from alignbench.cli.views.records import show_diagnosis
    from alignbench.diagnosis import diagnose as diagnosis

    with nullcontext(name) if out else reserved(name) as folder, counting("rounds of groups") as advance:
        record = diagnosis.diagnose(
            settings, folder, run=checkpoint, prompts=prompts, rounds=groups, beta=beta, progress=progress, advance=advance
        )
    if as_json:
        print_json(record.model_dump_json(indent=2))
    else:
        show_diagnosis(record, folder)


def _diagnose_gradients(
    configs: Sequence[RunConfig],
    rules: str | None,
    leaves: str | None,
    checkpoint: Path | None,
    prompts: int,
    repetitions: int | None,
    progress: float,
    out: Path | None,
    as_json: bool,
) -> None:
    """Tries every configuration with every rule and every group size."""
    from alignbench.cli.console import counting
    from alignbench.cli.views.records import show_gradients
    from alignbench.diagnosis.gradients import Rule, Trial, diagnose_gradients

    chosen_rules = [Rule.parse(text) for text in names(rules)] if rules else [None]
    sizes = whole_numbers(leaves, "--leaves") if leaves else [None]
    trials = [Trial(*parts) for parts in itertools.product(configs, chosen_rules, sizes)]
    name = out or results_folder("diagnose", "gradients")
    with nullcontext(name) if out else reserved(name) as folder, counting("combinations") as advance:
        record = diagnose_gradients(
            trials, folder, run=checkpoint, prompts=prompts, repetitions=repetitions, progress=progress, advance=advance
        )
    if as_json:
        print_json(record.model_dump_json(indent=2))
    else:
        show_gradients(record, folder)
