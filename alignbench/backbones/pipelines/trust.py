"""What a model's folder may contain: weights and settings, but no code and no links to other places.

`check_folder` checks every folder of a model, of a backbone or of an eval, before anything in it is opened. The classes that
open it come only from installed packages, whatever the folder names. Weights are safetensors, or are read inside
`plain_weights`.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignbench.errors import UserError
from alignbench.files import json_files

CODE = (".py", ".pyw", ".pyc", ".pyo", ".pyd", ".so", ".dylib", ".dll")
"""Suffixes of files that Python imports."""
INDEX = "model_index.json"
"""The file that names the pipeline's class and its components."""
CONFIG = "config.json"
"""End of the names of all files in which diffusers and transformers look for the class of a component."""
MAX_CONFIG_BYTES = 4 * 2**20
ADAPTER = "adapter_config.json"
"""Name of a file that makes transformers open another model instead of the folder."""


def check_folder(folder: Path) -> None:
    """Checks a model's folder, at any depth, without importing or opening its models.

    Raises:
        UserError: the folder contains code, a link to another place, something that is not a file, or a configuration that asks
            for code.
    """
    root = folder.resolve()
    inside = [root]
    if root.parent.name == "snapshots":  # the hub's cache, whose files are links into a folder beside it
        inside.append(root.parent.parent / "blobs")
    for path in _walk(folder):
        name, place = path.name.lower(), path.relative_to(folder)
        if name.endswith(CODE) or ".so." in name:
            raise UserError(f"{folder} contains code ({place}), which alignbench does not run from a model's folder; remove it")
        if path.is_symlink() and not any(path.resolve().is_relative_to(part) for part in inside):
            raise UserError(f"{folder} has a link to another place ({place} -> {os.readlink(path)}); replace it by the file")
        if not path.is_dir() and not (path.is_file() and stat.S_ISREG(path.stat().st_mode)):
            raise UserError(f"{folder} contains something that is not a file ({place}); remove it")
        if name == ADAPTER:
            raise UserError(f"{folder} contains an adapter for another model ({place}); alignbench opens whole models")
        if name.endswith(CONFIG):
            _check_config(folder, place)


def read_json(folder: Path, place: Path | str) -> dict[str, Any]:
    """Reads a JSON file of a model's folder.

    Raises:
        UserError: the file does not exist, is too large, or does not hold keys and values.
    """
    file = folder / place
    if not file.is_file():
        raise UserError(f"{folder} has no {place}")
    return json_files.read_json(file, "configuration", MAX_CONFIG_BYTES)


def lacking(module: Any, loading: Mapping[str, Any]) -> list[str]:
    """Parameters that the files of a model lacked, so that its library drew them at random.

    Args:
        module: the model.
        loading: the loading info that `from_pretrained` returns with output_loading_info.
    """
    parameters = {name for name, _ in module.named_parameters()}
    return sorted(parameters & set(loading["missing_keys"]))


@contextmanager
def plain_weights() -> Iterator[None]:
    """Makes torch.load read only tensors and plain containers, even if a package's own code asks for any pickle."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    kept = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        os.environ.pop(names[0])
        os.environ.update({name: value for name, value in kept.items() if value is not None})


def _walk(folder: Path) -> Iterator[Path]:
    """All files and folders, in an order that does not depend on the file system; links are not followed."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(place, name) for name in sorted([*folders, *files]))


def _check_config(folder: Path, place: Path) -> None:
    for key, value in _pairs(read_json(folder, place)):
        if key == "auto_map" and value:
            raise UserError(f"{folder / place} names code of its own (auto_map), which alignbench does not run")
        if key.endswith("attn_implementation") and "/" in str(value):
            raise UserError(f"{folder / place} asks for code from the hub ({key}: {value}); remove that key")
        if key == "quantization_config" and value:
            raise UserError(f"{folder / place} is for quantised weights (quantization_config), which alignbench does not open")


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys with their values, at any depth."""
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _pairs(inner)
