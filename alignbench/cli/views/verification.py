"""How the findings of `verify` are shown."""

from collections import Counter

import typer
from rich.markup import escape
from rich.table import Table

from alignbench.cli.console import new_console, print_table
from alignbench.verification.record import State, Verification

COLORS: dict[State, str] = {"not equal": "red", "equal": "green", "equal within tolerance": "green", "consistent": "default"}


def replaying(cell: str, done: int, total: int) -> None:
    """Tells on stderr which cell is replayed now."""
    typer.echo(f"{done + 1}/{total}  replaying {cell}", err=True)


def show_verification(found: Verification) -> None:
    """Prints the findings on stdout, and what was not checked on stderr."""
    for note in found.notes:
        typer.echo(f"alignbench: {note}", err=True)
    rich = new_console()
    table = Table(title=escape(found.folder), title_justify="left")
    for column in ("cell", "finding", "detail"):
        table.add_column(column)
    for cell in found.replayed:
        table.add_row(escape(cell.cell), f"[{COLORS[cell.state]}]{cell.state}[/]", escape(cell.detail))
    if found.replayed:
        print_table(rich, table)
    if not found.problems:
        states = Counter(cell.state for cell in found.cells)
        counts = ", ".join(f"{states[state]} {state}" for state in COLORS if states[state])
        runs = f"{len(found.cells)} run{'s' if len(found.cells) != 1 else ''}"
        rich.print(f"the records of {runs} agree; {counts}")
