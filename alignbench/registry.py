"""Finds plug-ins by name: a file in one of the packages, an entry point, or `package.module:Class`.

Nothing is imported before it is asked for: `describe` reads docstrings with `ast`, so that listing needs no torch.
"""

import ast
import importlib
import inspect
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

ENTRY_POINT_PREFIX = "alignbench."


def names(kind: str) -> list[str]:
    """All names that `find` knows for a kind, without importing one."""
    return sorted({*_files(kind), *_entry_points(kind)})


def describe(kind: str) -> dict[str, str]:
    """Name -> first line of the module's docstring, read without importing the module."""
    files, points = _files(kind), _entry_points(kind)
    described = {}
    for name in names(kind):
        file = files.get(name) or _entry_point_file(points[name])
        described[name] = _first_line(file) if file else f"from {points[name].value}"
    return described


def find(kind: str, name: str, base: type) -> type[Any]:
    """The class that `name` stands for.

    Args:
        kind: one of `PACKAGES`.
        name: a file's name in the kind's package, an entry point, or `package.module:Class`.
        base: what the class must derive from.

    Raises:
        UserError: the name is unknown, does not import, or names no single class of that base.
    """
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        return _class_in(_import(kind, name, module_name, import_path.import_named), class_name, base, name)
    if name in _files(kind):
        module = _import(kind, name, f"{PACKAGES[kind]}.{name}")
        return _only_class_in(module, base, name)
    if name in (points := _entry_points(kind)):
        try:
            found = points[name].load()
        except Exception as error:
            raise UserError(f"{_one(kind)} {name!r} ({points[name].value}) does not import: {error}") from error
        return _checked(found, base, name)
    raise UserError(_why_not(kind, name) or f"there is no {_one(kind)} {name!r}{did_you_mean(name, names(kind))}")


def create(kind: str, name: str, base: type, settings: dict[str, Any]) -> Any:
    """An instance of the plug-in: its class called with its validated `Settings`.

    Raises:
        UserError: unknown name, unknown setting, a setting out of its range, or a class that cannot be called with them.
    """
    from alignbench.settings import validate

    cls = find(kind, name, base)
    valid = validate(cls.Settings, settings, where=f"{_one(kind)} {name}")
    try:
        plugin = cls(valid)
    except TypeError as error:  # an abstract method is missing, or __init__ takes something else
        raise UserError(f"{_one(kind)} {name} cannot be made: {error}") from error
    plugin.name = name
    return plugin


def file_name(name: str) -> str:
    """A plug-in's name as part of a file's: dotted paths and folders have signs that a file name must not."""
    return name.replace("/", "_").replace(":", "_")


def _one(kind: str) -> str:
    return kind.removesuffix("s")


def _folders(kind: str) -> list[Path]:
    spec = util.find_spec(PACKAGES[kind])
    return [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []


def _files(kind: str) -> dict[str, Path]:
    return {f.stem: f for folder in _folders(kind) for f in sorted(folder.glob("*.py")) if _is_plugin(f)}


def _why_not(kind: str, name: str) -> str | None:
    """Why a file of that name, which is there, is no plug-in."""
    for file in (folder / f"{name}.py" for folder in _folders(kind)):
        if name.isidentifier() and not name.startswith("_") and file.is_file():
            try:
                ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError, OSError) as error:
                return f"{_one(kind)} {name!r} cannot be read: {error}"
            return f"{file} is no {_one(kind)}: its docstring must begin with '{name}: ' and say what it is"
    return None


def _is_plugin(file: Path) -> bool:
    """A module whose docstring's first line is `name: what it is`; helpers beside plug-ins have none of that form."""
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


def _first_line(file: Path) -> str:
    return _docstring(file).split("\n", 1)[0].partition(": ")[2]


def _import(kind: str, name: str, module: str, by: Callable[[str], ModuleType] = importlib.import_module) -> ModuleType:
    try:
        return by(module)
    except Exception as error:
        raise UserError(f"{_one(kind)} {name!r} does not import: {type(error).__name__}: {error}") from error


def _own_classes(module: Any, base: type, *, abstract: bool = False) -> Iterator[type]:
    for value in vars(module).values():
        is_plugin = inspect.isclass(value) and issubclass(value, base) and inspect.isabstract(value) == abstract
        if is_plugin and value.__module__ == module.__name__:
            yield value


def _only_class_in(module: Any, base: type, name: str) -> type:
    found = list(_own_classes(module, base))
    if len(found) != 1:
        unfinished = [
            f"{c.__name__} without {', '.join(sorted(getattr(c, '__abstractmethods__', ())))}"
            for c in _own_classes(module, base, abstract=True)
        ]
        listed = ", ".join([c.__name__ for c in found] or unfinished) or "none"
        raise UserError(f"{module.__file__} must define exactly one {base.__name__} for {name!r}; it defines {listed}")
    return found[0]


def _class_in(module: Any, class_name: str, base: type, name: str) -> type:
    if not hasattr(module, class_name):
        known = [c.__name__ for c in _own_classes(module, base)]
        raise UserError(f"{name!r}: module {module.__name__} has no {class_name!r}{did_you_mean(class_name, known)}")
    return _checked(getattr(module, class_name), base, name)


def _checked(found: Any, base: type, name: str) -> type:
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise UserError(f"{name!r} is no {base.__name__} class; derive it from alignbench.{base.__name__}")
    return found
