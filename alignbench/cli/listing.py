"""The command `runs`: the runs below a folder, finished or not."""

from pathlib import Path
from typing import Annotated

import typer

from alignbench.cli.options import Commands
from alignbench.errors import UserError
from alignbench.runtime.streams import print_json

commands = Commands("Train and compare")


@commands.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Folder that contains runs, at any depth.")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as one JSON document on stdout.")] = False,
) -> None:
    """Lists the runs below a folder, finished or not: state, pair, reward, diversity and time."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    from alignbench.records.run_list import run_rows

    rows = run_rows(folder)
    if as_json:
        import json

        print_json(json.dumps({"folder": str(folder), "runs": rows}, indent=2))
        return
    from alignbench.cli.views.comparison import show_runs

    show_runs(rows, folder)
