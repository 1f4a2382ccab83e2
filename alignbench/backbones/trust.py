"""What a model's folder may hold: weights and settings, but nothing that runs and nothing that points elsewhere.

Every folder of a model, a backbone's as well as an eval's, is looked through by `check_folder` before anything of it is opened.
The classes that open it come from installed packages alone, whatever the folder names; weights are safetensors, or are read
within `plain_weights`.
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
"""Ends of the names of files that Python imports."""
CONFIG = "config.json"
"""End of the names of all files in which diffusers and transformers look for the class of a part."""
MAX_CONFIG_BYTES = 4 * 2**20
ADAPTER = "adapter_config.json"
"""Makes transformers open the model that it names in place of the folder."""


def check_folder(folder: Path) -> None:
    """Looks through a model's folder, at any depth, without importing or opening anything of it.

    Raises:
        UserError: it holds code, a link that leaves it, something that is not a file, or a configuration that asks for code.
    """
    root = folder.resolve()
    inside = [root]
    if root.parent.name == "snapshots":  # the hub's cache, whose files are links into the folder beside it
        inside.append(root.parent.parent / "blobs")
    for path in _walk(folder):
        name, place = path.name.lower(), path.relative_to(folder)
        if name.endswith(CODE) or ".so." in name:
            raise UserError(f"{folder} holds code ({place}); alignbench runs none from a model's folder: remove it")
        if path.is_symlink() and not any(path.resolve().is_relative_to(part) for part in inside):
            raise UserError(f"{folder} holds a link that leaves it ({place} -> {os.readlink(path)}); copy the files there")
        if not path.is_dir() and not (path.is_file() and stat.S_ISREG(path.stat().st_mode)):
            raise UserError(f"{folder} holds something that is not a file ({place}); remove it")
        if name == ADAPTER:
            raise UserError(f"{folder} holds an adapter for another model ({place}); alignbench opens whole models")
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
    """Parameters that the files of a model did not hold, so that its library drew them at random.

    Args:
        loading: what `from_pretrained` answers to output_loading_info.
    """
    parameters = {name for name, _ in module.named_parameters()}
    return sorted(parameters & set(loading["missing_keys"]))


@contextmanager
def plain_weights() -> Iterator[None]:
    """While entered, torch.load reads tensors and plain containers alone, also where a package's own code asks for more."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    kept = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        os.environ.pop(names[0])
        os.environ.update({name: value for name, value in kept.items() if value is not None})


def _walk(folder: Path) -> Iterator[Path]:
    """All files and folders, in an order that does not depend on the disk; links are not followed."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(place, name) for name in sorted([*folders, *files]))


def _check_config(folder: Path, place: Path) -> None:
    for key, value in _pairs(read_json(folder, place)):
        if key == "auto_map" and value:
            raise UserError(f"{folder / place} names code of its own (auto_map); alignbench runs none from a model's folder")
        if key.endswith("attn_implementation") and "/" in str(value):
            raise UserError(f"{folder / place} asks for code from the hub ({key}: {value}); remove that key")
        if key == "quantization_config" and value:
            raise UserError(f"{folder / place} is of quantised weights (quantization_config), which alignbench does not open")


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _pairs(inner)
