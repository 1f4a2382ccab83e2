"""Opens the components of a local diffusers folder, each with a class of an installed package that its family allows.

`model_index.json` says which class saved a component. That class is compared with what the family expects and never imported
by its name, and only the component's own folder is read. (`DiffusionPipeline.from_pretrained` of older diffusers versions
imports any module that the file names.)
"""

import importlib
import json
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignbench.backbones.pipelines.trust import INDEX, check_folder, lacking
from alignbench.errors import UserError, first_line

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
TOKENIZERS = frozenset(
    {"CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"}
)
RENAMED = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Names of classes in transformers 5, with names that transformers 4 has as well."""
UNUSED = frozenset({"image_encoder", "feature_extractor"})
"""Components that are not needed to draw from a prompt, and are ignored."""
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Stem of the name of a weights file, for each library."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
ABSENT = [None, None]
"""Entry of the index for a component that is left out."""
LFS = b"version https://git-lfs"


def tokenizer_of(encoder: str) -> str:
    """The name of the tokenizer that belongs to a text encoder."""
    return encoder.replace("text_encoder", "tokenizer")


class Components:
    """The components in a folder's index, which are checked before anything is opened.

    Attributes:
        folder: the folder.
        classes: for each component, the library and the name of the class that opens it; None if the folder leaves it out.
        empty: whether the folder has no weights at all.
        variants: for each model, the variant in the names of its weights files (`fp16`); None for plain names.
    """

    def __init__(
        self,
        folder: Path,
        index: Mapping[str, Any],
        models: Mapping[str, str],
        optional: Collection[str],
        further: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        """Checks the folder.

        Args:
            folder: the folder.
            index: the content of `model_index.json`.
            models: for each component with weights, the library.Class that opens it.
            optional: components that the pipeline can do without.
            further: classes that are allowed beside the common ones: of a `tokenizer` and of a `scheduler`.

        Raises:
            UserError: the folder contains code, names other classes, or lacks files.
        """
        check_folder(folder)
        self.folder = folder
        more = {kind: frozenset(classes) for kind, classes in (further or {}).items()}
        schedulers = frozenset({SCHEDULER}) | more.get("scheduler", frozenset())
        allowed: dict[str, tuple[str, frozenset[str]]] = {"scheduler": ("diffusers", schedulers)}
        for name, cls in models.items():
            library, _, class_name = cls.partition(".")
            allowed[name] = library, frozenset({class_name})
            if name.startswith("text_encoder"):
                allowed[tokenizer_of(name)] = "transformers", TOKENIZERS | more.get("tokenizer", frozenset())
        named = {n: v for n, v in index.items() if isinstance(v, list) and not n.startswith("_") and n not in UNUSED}
        if foreign := sorted(set(named) - set(allowed)):
            raise UserError(f"{folder / INDEX} names a component {foreign[0]!r}, which a {index['_class_name']} does not have")
        self.classes = {name: self._checked(name, named.get(name, ABSENT), *allowed[name], optional) for name in allowed}
        for name in models:
            if name.startswith("text_encoder") and self.classes[name] and not self.classes[tokenizer_of(name)]:
                raise UserError(f"{folder / INDEX} has a {name} but no {tokenizer_of(name)}")
        # A folder of config files only is allowed: they tell what a model needs. A folder with some weights must have all of
        # them.
        present = [name for name in models if self.classes[name]]
        self.empty = not any(file for name in present for file in (folder / name).glob("*.safetensors"))
        self.variants = {} if self.empty else {name: self._variant(name) for name in present}

    def _checked(
        self, name: str, entry: list[Any], library: str, allowed: Collection[str], optional: Collection[str]
    ) -> tuple[str, str] | None:
        """The library and class that open a component; None if it is left out."""
        index = self.folder / INDEX
        if entry == ABSENT:
            if name in optional:
                return None
            raise UserError(f"{index} leaves out {name}, which alignbench needs")
        if len(entry) != 2 or entry[0] != library or entry[1] not in allowed:
            given, expected = ".".join(map(str, entry)), " or ".join(sorted(allowed))
            raise UserError(f"{index} names {given} as its {name}; alignbench opens {library}'s {expected}")
        config = "scheduler_config.json" if name == "scheduler" else "config.json"
        config = "tokenizer_config.json" if name.startswith("tokenizer") else config
        if not (self.folder / name / config).is_file():
            otherwise = f", or set {' and '.join(sorted(optional))} to [null, null] in {INDEX}" if name in optional else ""
            raise UserError(f"{self.folder} lacks {name}/{config}, though {INDEX} names a {name}: download it{otherwise}")
        return library, str(entry[1])

    def _variant(self, name: str) -> str | None:
        """The variant in the names of a model's weights files; None for plain names.

        Raises:
            UserError: the model has no safetensors weights, some are missing or damaged, or it has several variants but no
                plain weights.
        """
        folder, stem = self.folder / name, STEMS[self._class(name)[0]]
        form = re.compile(rf"{stem}(?:\.(?P<single>\w+))?\.safetensors|{stem}\.safetensors\.index(?:\.(?P<index>\w+))?\.json")
        found: dict[str | None, list[Path]] = {}
        for file in sorted(folder.iterdir()):
            if match := form.fullmatch(file.name):
                found.setdefault(match["single"] or match["index"], []).append(file)
        if not found:
            other = next((f.name for f in sorted(folder.iterdir()) if f.suffix in PICKLED), None)
            held = f"it has {other}, but alignbench reads only safetensors" if other else f"there is no {stem}.safetensors"
            raise UserError(f"{folder} lacks weights: {held}")
        if None not in found and len(found) > 1:
            variants = ", ".join(str(variant) for variant in found)
            raise UserError(f"{folder} has weights of several variants ({variants}) and no plain ones; keep one variant")
        variant = None if None in found else next(iter(found))
        for file in found[variant]:
            for part in _shards(file) if file.suffix == ".json" else [file]:
                _check_weights(part)
        return variant

    def _class(self, name: str) -> tuple[str, str]:
        found = self.classes[name]
        assert found is not None
        return found

    def open(self, name: str, dtype: torch.dtype) -> Any:
        """Opens a component with its weights, on the CPU.

        Raises:
            UserError: the component cannot be opened, or its files lack some of its weights.
        """
        library, cls = self._find(name)
        if not issubclass(cls, nn.Module):
            return self._guarded(name, lambda: cls.from_pretrained(self.folder / name, local_files_only=True))
        options = {
            "torch_dtype" if library == "diffusers" else "dtype": dtype,
            "variant": self.variants[name] if self.variants else self._variant(name),
            "use_safetensors": True,
            "local_files_only": True,
            "output_loading_info": True,
        }
        module, loading = self._guarded(name, lambda: cls.from_pretrained(self.folder / name, **options))
        if missing := lacking(module, loading):
            raise UserError(f"{self.folder / name} lacks {len(missing)} of its weights, among them {missing[0]}")
        return module

    def open_on_meta(self, name: str, dtype: torch.dtype) -> Any:
        """Builds a component from its config; a module then has shapes and types, but no values."""
        library, cls = self._find(name)
        if not issubclass(cls, nn.Module):
            return self.open(name, dtype)
        return self._guarded(name, lambda: _on_meta(library, cls, self.folder / name, dtype))

    def _find(self, name: str) -> tuple[str, Any]:
        library, class_name = self._class(name)
        module = importlib.import_module({"diffusers": "diffusers", "transformers": "transformers"}[library])
        return library, getattr(module, RENAMED.get(class_name, class_name))

    def _guarded(self, name: str, opening: Any) -> Any:
        try:
            with warnings.catch_warnings():
                # Older versions do not know the new name of the option, dtype.
                warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
                return opening()
        except Exception as error:  # readers raise various errors for incomplete folders
            what = self._class(name)[1]
            raise UserError(f"{self.folder / name} does not open as a {what}: {first_line(error)}") from error


def _on_meta(library: str, cls: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        if library == "diffusers":
            module = cls.from_config(cls.load_config(folder, local_files_only=True))
        else:
            module = cls(cls.config_class.from_pretrained(folder, local_files_only=True))
    moved: nn.Module = module.to("meta", dtype)  # computed buffers would have values
    return moved


def _shards(index: Path) -> list[Path]:
    """The weights files that an index names; all of them lie beside it."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index} is not an index of weights in the same folder") from None
    return [index.parent / name for name in names]


def _check_weights(file: Path) -> None:
    """Reads the header of a weights file."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(f"{file.parent} lacks {file.name}: download it")
    try:
        with safe_open(file, "pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        with file.open("rb") as head:
            pointer = head.read(len(LFS)) == LFS
        why = "a Git LFS pointer instead of weights: run git lfs pull" if pointer else f"damaged or incomplete ({error})"
        raise UserError(f"{file} is {why}") from None
