"""Finds plug-ins by name: a file in one of the packages, an entry point, or `package.module:Class`.

No plug-in is imported before it is used. `describe` reads docstrings with `ast`, so that listing needs no torch.
"""

import ast
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata, util
from pathlib import Path
from types import ModuleType
from typing import Any

from alignbench.errors import UserError, did_you_mean
from alignbench.runtime import import_path

PACKAGES = {
    "objectives": "objectives",
    "samplers": "samplers",
    "evals": "evals",
    "backbones": "alignbench.backbones",
}
"""Kind -> the import package in which a file's name is the plug-in's name."""

BASES = {
    "objectives": ("alignbench.objective", "Objective"),
    "samplers": ("alignbench.sampler", "Sampler"),
    "evals": ("alignbench.scorer", "Metric"),
    "backbones": ("alignbench.backbone", "Backbone"),
}
"""Kind -> the module and the name of the class that its plug-ins derive from, which is imported only when it is needed."""

ENTRY_POINT_PREFIX = "alignbench."
"""What the entry point group of a kind begins with; the kind follows."""


def names(kind: str) -> list[str]:
    """Lists the names that `find` knows for a kind, without importing a plug-in."""
    return sorted({*_files(kind), *_entry_points(kind)})


def describe(kind: str) -> dict[str, str]:
    """Reads what each plug-in is: name -> first line of its module's docstring, without importing the module."""
    files, points = _files(kind), _entry_points(kind)
    lines = {}
    for name in names(kind):
        file = files.get(name) or _entry_point_file(points[name])
        lines[name] = _first_line(file) if file else f"from {points[name].value}"
    return lines


def strengths() -> dict[str, dict[str, Any]]:
    """Reads which setting each objective declares as its strength, without importing it: name -> {setting, values}."""
    files, points = _files("objectives"), _entry_points("objectives")
    declarations = {}
    for name in names("objectives"):
        file = files.get(name) or _entry_point_file(points[name])
        declared = _declared_strength(file) if file else None
        if declared:
            declarations[name] = {"setting": declared[0], "values": list(declared[1])}
    return declarations


def find(kind: str, name: str, base: type) -> type[Any]:
    """Finds and imports the class that a name stands for.

    Args:
        kind: one of `PACKAGES`.
        name: a file's name in the kind's package, an entry point, or `package.module:Class`.
        base: the class that it must derive from.

    Raises:
        UserError: the name is unknown, its module cannot be imported, or it does not stand for exactly one class of that base.
    """
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        return _class_in(_import(kind, name, module_name, import_path.import_named), class_name, base, name)
    if _has_file(kind, name):
        module = _import(kind, name, f"{PACKAGES[kind]}.{name}")
        return _only_class_in(module, base, name)
    if name in (points := _entry_points(kind)):
        try:
            cls = points[name].load()
        except Exception as error:
            raise UserError(f"{_one(kind)} {name!r} ({points[name].value}) cannot be imported: {error}") from error
        return _checked(cls, base, name)
    raise UserError(_why_not(kind, name) or f"there is no {_one(kind)} {name!r}{did_you_mean(name, names(kind))}")


def setting_names(kind: str, name: str) -> list[str]:
    """Names the settings of a plug-in, for hints in messages; none if it cannot be imported."""
    module, base = BASES[kind]
    try:
        cls = find(kind, name, getattr(importlib.import_module(module), base))
    except UserError:
        return []
    return list(cls.Settings.model_fields)


def create(kind: str, name: str, base: type, settings: dict[str, Any]) -> Any:
    """Makes an instance of a plug-in: its class, called with its validated settings.

    Args:
        kind: one of `PACKAGES`.
        name: as in `find`.
        base: the class that it must derive from.
        settings: setting -> value; the others have their defaults.

    Raises:
        UserError: the name or a setting is unknown, a setting is out of its range, or the class cannot be called with them.
    """
    from alignbench.settings import validate

    cls = find(kind, name, base)
    valid = validate(cls.Settings, settings, where=f"{_one(kind)} {name}")
    try:
        plugin = cls(valid)
    except TypeError as error:  # an abstract method is missing, or __init__ takes something else
        raise UserError(f"{_one(kind)} {name} cannot be created: {error}") from error
    plugin.name = name
    return plugin


def file_name(name: str) -> str:
    """Makes a plug-in's name fit to be part of a file name, in which dotted paths and folders must not occur."""
    return name.replace("/", "_").replace(":", "_")


def _one(kind: str) -> str:
    """The kind in the singular."""
    return kind.removesuffix("s")


def _folders(kind: str) -> list[Path]:
    spec = util.find_spec(PACKAGES[kind])
    return [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []


def _files(kind: str) -> dict[str, Path]:
    return {f.stem: f for folder in _folders(kind) for f in sorted(folder.glob("*.py")) if _is_plugin(f)}


def _has_file(kind: str, name: str) -> bool:
    """Tells whether `_files` knows the name, without reading the other plug-ins."""
    file = f"{name}.py"
    return any(folder.is_dir() and file in os.listdir(folder) and _is_plugin(folder / file) for folder in _folders(kind))


def _why_not(kind: str, name: str) -> str | None:
    """Tells why a file of that name is not a plug-in; None if there is no such file."""
    for file in (folder / f"{name}.py" for folder in _folders(kind)):
        if name.isidentifier() and not name.startswith("_") and file.is_file():
            try:
                ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError, OSError) as error:
                return f"{_one(kind)} {name!r} cannot be read: {error}"
            return f"{file} is not a plug-in ({_one(kind)}): its docstring must begin with '{name}: ' and say what it is"
    return None


def _is_plugin(file: Path) -> bool:
    """Tells whether a docstring's first line is `name: what it is`; that of a helper beside the plug-ins is not."""
    return not file.stem.startswith("_") and _docstring(file).startswith(f"{file.stem}: ")


def _entry_points(kind: str) -> dict[str, metadata.EntryPoint]:
    return {p.name: p for p in metadata.entry_points(group=ENTRY_POINT_PREFIX + kind)}


def _entry_point_file(point: metadata.EntryPoint) -> Path | None:
    try:
        spec = util.find_spec(point.module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin else None


def _docstring(file: Path) -> str:
    try:
        return _docstring_at(file, file.stat().st_mtime_ns)
    except (SyntaxError, UnicodeDecodeError, OSError):
        return ""


@cache
def _docstring_at(file: Path, written: int) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def _declared_strength(file: Path) -> tuple[str, tuple[float, ...]] | None:
    """The literal arguments of `strength = Strength(setting, values)` in a class of the file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Assign(targets=[ast.Name("strength")], value=ast.Call(func=ast.Name("Strength"), args=[setting, values])):
                return ast.literal_eval(setting), ast.literal_eval(values)
    return None


def _first_line(file: Path) -> str:
    return _docstring(file).split("\n", 1)[0].partition(": ")[2]


def _import(kind: str, name: str, module: str, by: Callable[[str], ModuleType] = importlib.import_module) -> ModuleType:
    try:
        return by(module)
    except Exception as error:
        raise UserError(f"{_one(kind)} {name!r} cannot be imported: {type(error).__name__}: {error}") from error


def _own_classes(module: Any, base: type, *, abstract: bool = False) -> Iterator[type]:
    for value in vars(module).values():
        is_plugin = inspect.isclass(value) and issubclass(value, base) and inspect.isabstract(value) == abstract
        if is_plugin and value.__module__ == module.__name__:
            yield value


def _only_class_in(module: Any, base: type, name: str) -> type:
    classes = list(_own_classes(module, base))
    if len(classes) != 1:
        unfinished = [
            f"{c.__name__} without {', '.join(sorted(getattr(c, '__abstractmethods__', ())))}"
            for c in _own_classes(module, base, abstract=True)
        ]
        listed = ", ".join([c.__name__ for c in classes] or unfinished) or "none"
        raise UserError(f"{module.__file__} must define exactly one {base.__name__} for {name!r}; it defines {listed}")
    return classes[0]


def _class_in(module: Any, class_name: str, base: type, name: str) -> type:
    if not hasattr(module, class_name):
        candidates = [c.__name__ for c in _own_classes(module, base)]
        raise UserError(f"{name!r}: module {module.__name__} has no {class_name!r}{did_you_mean(class_name, candidates)}")
    return _checked(getattr(module, class_name), base, name)


def _checked(cls: Any, base: type, name: str) -> type:
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        raise UserError(f"{name!r} is not a {base.__name__} class; derive it from alignbench.{base.__name__}")
    return cls
