"""Commands on records of others: `verify` and `leaderboard`."""

from pathlib import Path
from typing import Annotated

import typer

from alignbench.cli.options import Commands, names
from alignbench.errors import UserError
from alignbench.runtime.streams import print_json

commands = Commands("Train and compare")


@commands.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a comparison or of a run.")],
    cells: Annotated[
        str | None, typer.Option(help="Cells to replay, separated by commas: the names of folders below runs/.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Number of cells to replay, which are drawn at random. (default: 3)")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Replay every cell.")] = False,
    records_only: Annotated[
        bool, typer.Option("--records-only", help="Replay nothing; only compare the records with each other.")
    ] = False,
    allow_revisions: Annotated[
        bool,
        typer.Option("--allow-revisions", help="Accept cells of several git revisions, and replay at least one of each."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="New folder that keeps the replays. (default: a temporary one, which is removed)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as one JSON document on stdout.")] = False,
) -> None:
    """Checks the records of a comparison, replays some of its cells, and says whether they come out equal.

    Exit code 0: all is equal; 1: a replay is not; 2: a record is altered, truncated or of another protocol.
    """
    asked = {"--cells": cells, "--sample": sample, "--all": every, "--records-only": records_only}
    given = [option for option, value in asked.items() if value]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} exclude each other; give one of them")
    if out is not None and records_only:
        raise UserError("--out keeps replays, and --records-only makes none; leave one of them out")

    from alignbench.cli.views.verification import replaying, show_verification
    from alignbench.verification.verify import SAMPLE
    from alignbench.verification.verify import verify as verify_folder

    found = verify_folder(
        folder,
        cells=names(cells or ""),
        sample=sample or SAMPLE,
        every=every,
        records_only=records_only,
        allow_revisions=allow_revisions,
        out=out,
        began=replaying,
    )
    if as_json:
        print_json(found.model_dump_json(indent=2))
    else:
        show_verification(found)
    for problem in found.problems:
        typer.echo(f"alignbench: error: {problem}", err=True)
    if found.exit_code:
        raise typer.Exit(found.exit_code)


@commands.command()
def leaderboard(
    folders: Annotated[list[Path], typer.Argument(help="Entries: folders of comparisons or runs, each with its records.")],
    out: Annotated[Path, typer.Option(help="The page to write, such as leaderboard.html.")],
) -> None:
    """Writes a page that ranks the methods of several folders, whose records are checked first.

    An entry whose records do not agree is refused with the reason, on the page and here; the exit code is then 1.
    """
    from alignbench.verification.leaderboard import write_leaderboard

    board = write_leaderboard(folders, out)
    for entry in board.entries:
        print(f"{entry.name}: taken, {len(entry.runs)} run{'s' if len(entry.runs) != 1 else ''}")
    for refusal in board.refused:
        typer.echo(f"alignbench: {refusal.name} is refused: {refusal.reason}", err=True)
    print(out)
    if board.refused:
        raise typer.Exit(1)
