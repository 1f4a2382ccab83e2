"""What libraries expect of a machine and not every machine has: a home folder that can be written, a name for the user."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def prepare() -> None:
    """Gives matplotlib and torch what they would otherwise warn about or fail on; a user's own choices stay."""
    home = Path(os.path.expanduser("~"))
    if not os.access(home, os.W_OK | os.X_OK):
        private = None
        for variable in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"):
            if variable not in os.environ:
                if private is None:
                    private = tempfile.mkdtemp(prefix="alignbench-")
                    atexit.register(shutil.rmtree, private, ignore_errors=True)
                os.environ[variable] = private
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        os.environ["USER"] = _user_name()


def _user_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"user{os.getuid()}"
