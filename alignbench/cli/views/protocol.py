"""What a person sees of `eval` over a grid of protocols."""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from alignbench.cli.console import format_interval, new_console, print_table
from alignbench.scoring.protocol_record import FILE, ProtocolGrid


def show_protocols(grid: ProtocolGrid, out: Path) -> None:
    """Prints the means of each method by each protocol, how the rankings agree, and the flips beyond chance."""
    rich = new_console(160)
    table = Table(title="means over prompts", title_justify="left")
    for column in ("metric", "method", *map(escape, grid.points)):
        table.add_column(column, justify="left" if column in ("metric", "method") else "right")
    for method in grid.methods:
        rows = (f"{grid.rows_per_image(method, p):,}" for p in range(len(grid.points)))
        table.add_row("model rows per image", escape(method), *rows)
    for metric in grid.higher_is_better:
        for method in grid.methods:
            means = (f"{grid.mean(method, p, metric):.4g}" for p in range(len(grid.points)))
            table.add_row(escape(metric), escape(method), *means)
    print_table(rich, table)
    if grid.agreement:
        ranks = Table(title=f"rank correlation (Kendall's tau-b) with {escape(grid.points[0])}", title_justify="left")
        for column in ("protocol", "metric", "tau (95 % interval)"):
            ranks.add_column(column, justify="right" if column.startswith("tau") else "left")
        for found in grid.agreement:
            ranks.add_row(escape(found.point), escape(found.metric), format_interval(found.tau, sign=""))
        print_table(rich, ranks)
        surely = [flip for flip in grid.flips if flip.beyond_chance]
        for flip in surely:
            rich.print(f"[bold red]flip:[/bold red] {escape(flip.sentence)} (p {flip.p:.2g})")
        rest = len(grid.flips) - len(surely)
        rich.print(
            f"{len(surely)} pairs of methods change their order beyond chance, {rest} others within it; "
            "intervals are over prompts"
        )
    rich.print(f"written to [bold]{escape(str(out))}[/bold]: {FILE}, protocols.parquet, cells/")
