"""The command `front`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alignbench.cli.options import whole_numbers
from alignbench.config.run_config import load_config
from alignbench.errors import UserError
from alignbench.frontier import BEST_OF, IMAGES
from alignbench.runtime.streams import print_json

if TYPE_CHECKING:
    from alignbench.frontier.front import Front

FRONTS = Path("results") / "fronts"


def front(
    backbone: Annotated[str | None, typer.Option(help="Name or folder of the base model. (default: tiny)")] = None,
    task: Annotated[str | None, typer.Option(help="Task whose reward tilts the model: a name or a YAML file.")] = None,
    preset: Annotated[str | None, typer.Option(help="Settings of the evaluation: smoke, quick, matching or paper.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of a run's configuration.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="dotted.key=value, such as evaluation.prompts=12; repeatable.")
    ] = None,
    images: Annotated[int, typer.Option(min=4, help="Images of each prompt to draw from the base model.")] = IMAGES,
    betas: Annotated[
        str | None, typer.Option(help="Inverse temperatures on raw rewards, separated by commas. (default: as far as they go)")
    ] = None,
    best_of: Annotated[str, typer.Option(help="Values of n for best-of-n, separated by commas.")] = ",".join(map(str, BEST_OF)),
    out: Annotated[Path, typer.Option(help="Folder that holds fronts; one with the same content is read again.")] = FRONTS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the front as one JSON document on stdout.")] = False,
) -> None:
    """Computes the reward-diversity front of the tilted target from the base model's images; nothing is trained."""
    given = {"backbone": backbone, "task": task, "preset": preset}
    options = {key: value for key, value in given.items() if value is not None}
    loaded = load_config(file=config, options=options, sets=sets or [])
    strengths = _numbers(betas, "--betas", least=0.0) if betas else None
    sizes = whole_numbers(best_of, "--best-of") if best_of else []

    from alignbench.cli.views.records import EvalView

    with EvalView(silent=as_json) as status:
        from alignbench.frontier.making import front_of

        made, folder = front_of(loaded, out, images=images, betas=strengths, best_of=sizes, advance=status.advance)
    if as_json:
        print_json(_document(made, folder))
    else:
        from alignbench.cli.views.records import show_front

        show_front(made, folder)


def _numbers(text: str, option: str, least: float) -> list[float]:
    """Numbers separated by commas.

    Raises:
        UserError: one is not a number, or is below `least`.
    """
    numbers = []
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            raise UserError(f"{option}: {part.strip()!r} is not a number") from None
        if not least <= number < float("inf"):
            raise UserError(f"{option}: {part.strip()} must be at least {least:g} and finite")
        numbers.append(number)
    return numbers


def _document(made: "Front", folder: Path) -> str:
    from alignbench.frontier.front import summary

    rows = json.loads(summary(made).to_json(orient="records"))
    return json.dumps({**made.record.model_dump(mode="json"), "folder": str(folder), "points": rows}, indent=2)
