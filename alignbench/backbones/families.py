"""Which backbone opens a local diffusers folder, told by its `model_index.json` alone; imports no torch."""

import os
from pathlib import Path
from typing import Any

from alignbench import registry
from alignbench.backbones.trust import read_json
from alignbench.errors import UserError
from alignbench.files.paths import local_path

INDEX = "model_index.json"
FAMILIES = {"StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux"}
"""Class of a pipeline -> the backbone that opens it."""


def is_folder(name: str, folder: Path | None = None) -> bool:
    """Whether the name of a backbone is that of a local folder; a plug-in's name is not, whatever lies in this folder.

    Args:
        folder: in which relative ones are; None for the current one.
    """
    # os.path.isdir takes any name, as long as it may be.
    return "/" in name or (os.path.isdir(local_path(name, folder)) and name not in registry.names("backbones"))


def name_or_folder(name: str, folder: Path) -> str:
    """The name of a plug-in as it is, or the path of a local folder; a relative one starts at `folder`."""
    return str(local_path(name, folder)) if is_folder(name, folder) else name


def read_index(folder: Path) -> dict[str, Any]:
    """A diffusers folder's `model_index.json`: the pipeline's class, and component -> [library, class].

    Raises:
        UserError: it has none, or one that cannot be read.
    """
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} is no diffusers folder: it has no {INDEX}")
    index = read_json(folder, INDEX)
    if not isinstance(index.get("_class_name"), str):
        raise UserError(f"{folder / INDEX} names no pipeline")
    return index


def family(folder: Path) -> str:
    """Name of the backbone that opens this folder.

    Raises:
        UserError: it is no diffusers folder, or one of another pipeline.
    """
    found = read_index(folder)["_class_name"]
    if found not in FAMILIES:
        raise UserError(f"{folder} holds a {found}; alignbench opens folders of {' and '.join(FAMILIES)}")
    return FAMILIES[found]


def opener(name: str) -> str:
    """The backbone that a name stands for: that of a folder's family, else the name itself.

    Raises:
        UserError: it is that of a folder that none opens.
    """
    return family(local_path(name)) if is_folder(name) else name


def section_of(name: str) -> str:
    """Likewise, for parts of a preset; a folder that none opens is refused where it is opened."""
    try:
        return opener(name)
    except UserError:
        return name
