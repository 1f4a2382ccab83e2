"""Provides what libraries expect and not every machine has: a writable home folder, and a user name."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def prepare() -> None:
    """Sets variables without which matplotlib and torch would warn or fail; the user's own values are kept."""
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
