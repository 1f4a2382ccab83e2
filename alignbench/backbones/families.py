"""Decides from `model_index.json` which backbone opens a local diffusers folder. Imports no torch."""

import os
from pathlib import Path
from typing import Any

from alignbench import registry
from alignbench.backbones.pipelines.trust import INDEX, read_json
from alignbench.errors import UserError
from alignbench.files.paths import local_path

FAMILIES = {
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2_klein",
    "QwenImagePipeline": "qwen_image",
    "ZImagePipeline": "z_image",
    "SanaPipeline": "sana",
    "WanPipeline": "wan",
}
"""For each class of pipelines, the backbone that opens it."""


def is_folder(name: str, folder: Path | None = None) -> bool:
    """Whether the name of a backbone is the path of a local folder. A plug-in's name is not, even if such a folder exists.

    Args:
        name: the name.
        folder: folder to which relative paths refer; None for the current one.
    """
    # Unlike Path.is_dir, os.path.isdir accepts names of any length.
    return "/" in name or (os.path.isdir(local_path(name, folder)) and name not in registry.names("backbones"))


def name_or_folder(name: str, folder: Path) -> str:
    """The name of a plug-in unchanged, or the path of a local folder; relative paths refer to `folder`."""
    return str(local_path(name, folder)) if is_folder(name, folder) else name


def read_index(folder: Path) -> dict[str, Any]:
    """Reads `model_index.json` of a diffusers folder: the pipeline's class, and [library, class] for each component.

    Raises:
        UserError: the folder does not have this file, or it cannot be read.
    """
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} is not a diffusers folder (no {INDEX})")
    index = read_json(folder, INDEX)
    if not isinstance(index.get("_class_name"), str):
        raise UserError(f"{folder / INDEX} does not name a pipeline (_class_name)")
    return index


def family(folder: Path) -> str:
    """The name of the backbone that opens this folder.

    Raises:
        UserError: the folder is not a diffusers folder, or has an unsupported pipeline.
    """
    pipeline = read_index(folder)["_class_name"]
    if pipeline not in FAMILIES:
        raise UserError(f"{folder} has a {pipeline}; alignbench opens folders of {', '.join(FAMILIES)}")
    return FAMILIES[pipeline]


def opener(name: str) -> str:
    """The backbone for a name: the one that opens the folder of this name, or else the name itself.

    Raises:
        UserError: no backbone opens the folder.
    """
    return family(local_path(name)) if is_folder(name) else name


def section_of(name: str) -> str:
    """The backbone for a name, for parts of a preset. A folder that no backbone opens is refused later, when it is opened."""
    try:
        return opener(name)
    except UserError:
        return name
