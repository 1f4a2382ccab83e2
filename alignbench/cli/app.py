"""The command line. Nothing heavy is imported before a command needs it, so that `--help` and `list` answer at once."""

from typing import Annotated, Any

import typer
import typer.core

from alignbench import __version__
from alignbench.cli import comparing, data, listing, models, plugins, tuning, verification
from alignbench.cli import run as training
from alignbench.cli.options import Commands
from alignbench.errors import UserError
from alignbench.runtime import import_path, launch, variables


class _RunFirst(typer.core.TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: name != "run")


app = Commands(
    "Train and compare",
    name="alignbench",
    cls=_RunFirst,
    help="Compares alignment objectives and rollout samplers for flow-matching text-to-image models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (training, comparing, listing, tuning, verification, models, plugins, data):
    app.add_typer(group.commands)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"alignbench {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    variables.check()
    if not import_path.current_folder_exists():
        raise UserError("the current folder has been removed; change to another one first")
    command = context.invoked_subcommand
    if launch.count() > 1 and command != "run":
        raise UserError(
            f"`{command}` cannot run under a distributed launcher (WORLD_SIZE={launch.count()}); only `run` can. Start it "
            "without the launcher, or unset WORLD_SIZE"
        )


def failure(error: BaseException) -> str:
    """The line on stderr for an error that ends a command."""
    return f"alignbench: error: {error}"
