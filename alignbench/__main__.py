"""Runs the command line (`python -m alignbench`), and turns failures into one line and an exit code."""

import os
import sys
from typing import NoReturn

# By default OpenMP threads wait actively, and two busy processes on few cores then slow each other down sevenfold. A short
# active wait costs two processes little and saves a single one a tenth of its time. This must precede torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from alignbench.runtime import import_path, streams

import_path.leave_out_current_folder()  # before a library looks for its optional modules there
streams.open_closed()

from alignbench.cli.app import app, failure  # noqa: E402
from alignbench.errors import RunError, UserError  # noqa: E402
from alignbench.runtime import launch, surroundings  # noqa: E402
from alignbench.runtime.signals import interrupt_on_every_end  # noqa: E402


def main() -> NoReturn:
    """Runs the command and exits with 0 (done), 1 (the run failed), 2 (the input is wrong) or 130 (interrupted by a signal)."""
    interrupt_on_every_end()
    import_path.leave_out_current_folder()
    surroundings.prepare()
    with streams.tolerant() as output:
        code = _command()
        problem = output.problem()
        if problem is not None:
            print(failure(RunError(problem)), file=sys.stderr)
    sys.exit(code or (1 if problem else 0))


def _command() -> int:
    """Runs the command line and returns its exit code."""
    try:
        app(standalone_mode=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except (UserError, RunError) as error:
        if launch.speaks():  # several processes all end with the same error, and one of them prints it
            print(failure(error), file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    main()
