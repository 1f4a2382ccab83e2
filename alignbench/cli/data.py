"""Commands that make data and the small models that ship: `pairs`, `prompts`, `train-tiny` and `train-pickscore`."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from alignbench import tasks
from alignbench.cli.options import Commands
from alignbench.config.run_config import load_config, parse_assignments
from alignbench.errors import UserError
from alignbench.settings import validate

commands = Commands("Make data and small models")


@commands.command()
def pairs(
    out: Annotated[Path, typer.Option(help="Folder for pairs.jsonl and the images; it must not exist.")],
    backbone: Annotated[str, typer.Option(help="Model: a name, or a local diffusers folder.")] = "tiny",
    task: Annotated[str, typer.Option(help="Task whose training prompts are drawn and whose rewards rank the images.")] = "ocr",
    prompts: Annotated[int | None, typer.Option(min=1, help="Number of prompts. (default: all)")] = None,
    images: Annotated[
        int, typer.Option(min=2, help="Images drawn for each prompt, of which the best and the worst become a pair.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Noise seed.")] = 0,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="dotted.key=value of a run's configuration; can be repeated.")
    ] = None,
) -> None:
    """Writes preference pairs for offline DPO (`run --objective dpo --set pairs=DIR/pairs.jsonl`)."""
    settings = load_config(options={"backbone": backbone, "task": task, "seed": seed}, sets=sets or [])

    from alignbench.cli.console import counting
    from alignbench.evaluation.evaluate import MetricSuite
    from alignbench.load import load_configured_backbone
    from alignbench.training.pairs import write_pairs

    loaded = tasks.trained_task(settings)
    drawn = loaded.train_prompts[:prompts]
    suite = MetricSuite(loaded, settings.scorer_timeout)
    suite.require()
    policy = load_configured_backbone(settings)
    with counting("prompts") as advance:
        count = write_pairs(
            policy,
            suite,
            drawn,
            images,
            seed,
            out,
            lambda done, pairs: advance(done, len(drawn), f"{pairs} pairs"),
            normalise_rewards=settings.normalise_rewards,
        )
    print(f"wrote {count} pairs from {len(drawn)} prompts to {out / 'pairs.jsonl'}")


@commands.command()
def prompts(
    out: Annotated[Path, typer.Option(help="The .jsonl file to write; it must not exist.")],
    objects: Annotated[
        str, typer.Option(help="coco, for COCO's 80 object classes; or drawn, for the shapes of the task `geneval`.")
    ] = "coco",
    each: Annotated[
        int | None, typer.Option(min=1, help="Prompts of each task type. (default: as many as GenEval's own list has)")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    exclude: Annotated[
        list[Path] | None, typer.Option(help="File of prompts that must not be written again; can be repeated.")
    ] = None,
) -> None:
    """Writes prompts of GenEval's six task types with the metadata that its metric needs, in GenEval's own format."""
    from alignbench.tasks import geneval_prompts
    from alignbench.tasks.prompts import read_prompts

    counts = dict.fromkeys(geneval_prompts.OFFICIAL_COUNTS, each) if each else geneval_prompts.OFFICIAL_COUNTS
    excluded = {prompt for file in exclude or [] for prompt in read_prompts(file)}
    entries = geneval_prompts.generate(objects, counts, seed, excluded)
    made = Counter(entry["tag"] for entry in entries)
    if not entries:
        raise UserError(f"no prompt about {objects!r} is left, since --exclude has them all")
    geneval_prompts.write(entries, out)
    few = [f"{made[tag]} of {count} {tag}" for tag, count in counts.items() if made[tag] < count]
    if few:
        beside = " beside those of --exclude" if exclude else ""
        typer.echo(f"alignbench: there are fewer prompts than asked for{beside}: {', '.join(few)}", err=True)
    print(f"wrote {len(entries)} prompts to {out}: {', '.join(f'{count} {tag}' for tag, count in made.items())}")


@commands.command("train-tiny")
def train_tiny(
    out: Annotated[Path, typer.Option(help="The diffusers folder to write.")],
    work: Annotated[
        Path, typer.Option(help="Folder for checkpoints; run the command again with the same folder to resume.")
    ] = Path("train-tiny"),
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of the training's settings, for instance seed=1; can be repeated."),
    ] = None,
) -> None:
    """Trains the embedded backbone `tiny` from scratch on drawn images; about two hours on two CPU cores."""
    from alignbench.embedded import train_tiny as training

    settings = validate(training.TinyTraining, parse_assignments(sets or []), where="train-tiny")
    training.train_tiny(settings, work, out)


@commands.command("train-pickscore")
def train_pickscore(
    out: Annotated[Path, typer.Option(help="The folder to write, which CLIPModel can open; it must not exist.")],
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of the training's settings, for instance steps=500; can be repeated."),
    ] = None,
) -> None:
    """Trains the small PickScore model for images of `tiny` on drawn preference pairs; minutes on one CPU core."""
    from alignbench.embedded import train_pickscore as training

    settings = validate(training.PickScoreTraining, parse_assignments(sets or []), where="train-pickscore")
    training.train_pickscore(settings, out)
