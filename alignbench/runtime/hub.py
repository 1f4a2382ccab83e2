"""The Hugging Face hub: which weights are on this machine, and whether the others can be downloaded.

The hub's own client retries for minutes if a model has several files. Without a network, a user should read within seconds what
is missing, and weights that are on the machine should load as fast as with a network.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from alignbench.errors import UserError

SECONDS = 5.0
"""Seconds within which the hub must answer."""


def require(wanted: Mapping[str, str]) -> None:
    """Makes sure that weights are available before anything is loaded. If the hub does not answer, it is not asked again.

    Args:
        wanted: for each OWNER/NAME or OWNER/NAME/FILE, what needs it. Files and folders of this machine are skipped.

    Raises:
        UserError: some weights are not on this machine, and the hub does not answer; the message names all of them.
    """
    from huggingface_hub import constants

    names = {name: user for name, user in wanted.items() if not is_local(name)}
    if not names or answers():
        return
    # The client has no function for this. From now on it uses only files of this machine, without a delay.
    constants.HF_HUB_OFFLINE = True
    missing: dict[str, list[str]] = {}
    for name, user in names.items():
        if not is_cached(name):
            missing.setdefault(user, []).append(name)
    if missing:
        listed = "; ".join(f"{' and '.join(several)} for {user}" for user, several in missing.items())
        raise UserError(
            f"not on this machine, and {constants.ENDPOINT} does not answer: {listed}; download them on a machine with "
            "internet access (hf download NAME), or set local folders instead (docs/evals.md)"
        )


def is_local(name: str) -> bool:
    """Whether a name is a file or folder of this machine, or can only be one."""
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
    """Whether the hub can be reached and may be used (HF_HUB_OFFLINE); this is tested once per process."""
    import requests
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        requests.head(constants.ENDPOINT, timeout=SECONDS)
    except requests.RequestException:
        return False
    return True
