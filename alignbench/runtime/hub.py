"""The Hugging Face hub: what of it is on this machine, and whether it can be asked for the rest.

The hub's own client asks again and again, minutes for a model of several files. Without a network a user should read in
seconds what is missing, and what is already on the machine should load as fast as with one.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from alignbench.errors import UserError

SECONDS = 5.0
"""In which the hub must answer."""


def require(wanted: Mapping[str, str]) -> None:
    """Makes sure that weights can be had, before anything is loaded. Where the hub does not answer, it is not asked again.

    Args:
        wanted: OWNER/NAME, or OWNER/NAME/FILE -> what needs it. Files and folders of this machine are passed over.

    Raises:
        UserError: some of them are not on this machine and the hub does not answer; they are all named.
    """
    from huggingface_hub import constants

    names = {name: user for name, user in wanted.items() if not is_local(name)}
    if not names or answers():
        return
    # The client has no call for it. What it is asked for from now on it takes from this machine alone, at once.
    constants.HF_HUB_OFFLINE = True
    missing: dict[str, list[str]] = {}
    for name, user in names.items():
        if not is_cached(name):
            missing.setdefault(user, []).append(name)
    if missing:
        listed = "; ".join(f"{' and '.join(several)} for {user}" for user, several in missing.items())
        raise UserError(
            f"not on this machine, and {constants.ENDPOINT} does not answer: {listed}; fetch them where there is a network "
            "(hf download NAME), or set local folders in their place (docs/evals.md)"
        )


def is_local(name: str) -> bool:
    """Whether it is a file or folder here, or could only be one."""
    return name.startswith((".", "/", "~")) or Path(name).exists()


def is_cached(name: str) -> bool:
    """Whether the hub's cache has files of OWNER/NAME, or OWNER/NAME/FILE."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    try:
        folder = Path(snapshot_download(f"{owner}/{repository}" if repository else owner, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError):
        return False
    return (folder / file).exists()


@cache
def answers() -> bool:
    """Whether the hub can be reached and may be asked (HF_HUB_OFFLINE); found out once in a process."""
    import requests
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        requests.head(constants.ENDPOINT, timeout=SECONDS)
    except requests.RequestException:
        return False
    return True
