"""`python -m alignbench`: runs the command line and turns failures into one line and an exit code."""

import os
import sys
from typing import NoReturn

# Two busy processes on few cores slow each other sevenfold when threads wait actively, as they do by default; a short
# active wait costs two processes little and saves one alone a tenth of its time. This must precede torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from alignbench import launch
from alignbench.cli import app, failure
from alignbench.errors import RunError, UserError
from alignbench.signals import interrupt_on_every_end


def main() -> NoReturn:
    """Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 130 interrupted, by whichever signal."""
    interrupt_on_every_end()
    if os.getcwd() not in sys.path:  # the installed command; plug-ins in the current folder are for both, and hide nothing
        sys.path.append(os.getcwd())
    try:
        app(standalone_mode=True)
    except (UserError, RunError) as error:
        if launch.is_first():  # of several processes all end with the same error
            print(failure(error), file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    sys.exit(0)


if __name__ == "__main__":
    main()
