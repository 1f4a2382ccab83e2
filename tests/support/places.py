"""Places in the code, named by function and content, so that line breaks, quotes, comments and moved lines do not matter."""

import ast
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("alignbench", "objectives", "samplers", "evals")
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class PlaceError(ValueError):
    """A place does not exist, or exists more than once."""


@dataclass(frozen=True)
class Place:
    """An expression or a statement in a function, class or module."""

    name: str
    """The dotted name of the function, class or module: `alignbench.flow.step`."""
    code: str
    """The expression or statement. It is in there once."""

    def file(self, tree: Path) -> Path:
        """The module's file in a tree."""
        return _file_and_inner(self.name, tree)[0]

    def replaced(self, new: str, tree: Path) -> str:
        """The source text of the whole file with `new` in this place.

        Raises:
            PlaceError: the function is not there, or the code is not in it exactly once.
        """
        file, inner = _file_and_inner(self.name, tree)
        module = ast.parse(file.read_text(encoding="utf-8"))
        old, by = ast.parse(self.code).body, ast.parse(new).body
        if len(old) != 1:
            raise PlaceError(f"{self.name}: one expression or one statement is named at a time, not {len(old)}: {self.code}")
        scope = _definition(module, inner, self.name)
        if isinstance(old[0], ast.Expr) and len(by) == 1 and isinstance(by[0], ast.Expr):
            swap = _Swap(old[0].value, by[0].value)
        else:
            swap = _Swap(old[0], by)
        swap.visit(scope)
        if swap.count != 1:
            raise PlaceError(f"{self.name} has this code {swap.count} times, not once: {self.code}{self._hint(swap, tree)}")
        return ast.unparse(ast.fix_missing_locations(module))

    def _hint(self, swap: "_Swap", tree: Path) -> str:
        if swap.count:
            return "\nname a longer piece, which is there once"
        elsewhere = [name for name in _all_functions(tree) if swap.key in _keys(name[1])]
        return f"\nit is now in {', '.join(name for name, _ in elsewhere)}" if elsewhere else ""


class _Swap(ast.NodeTransformer):
    """Replaces each node that equals a given one, and counts them."""

    def __init__(self, old: ast.AST, new: ast.AST | list[ast.stmt]) -> None:
        self.key = ast.dump(old)
        self.new = new
        self.count = 0

    def visit(self, node: ast.AST) -> ast.AST | list[ast.stmt]:
        if ast.dump(node) == self.key:
            self.count += 1
            return deepcopy(self.new)
        return self.generic_visit(node)


def _file_and_inner(name: str, tree: Path) -> tuple[Path, list[str]]:
    """The file of the longest beginning of a dotted name that is a module, and the rest of the name."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        stem = tree.joinpath(*parts[:length])
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file.is_file():
                return file, parts[length:]
    raise PlaceError(f"{name}: no module of this name")


def _definition(module: ast.Module, inner: list[str], name: str) -> ast.AST:
    """The function or class that a dotted name within a module means."""
    scope: ast.AST = module
    for part in inner:
        found = [node for node in _definitions(scope) if node.name == part]
        if len(found) != 1:
            raise PlaceError(f"{name}: {len(found)} definitions of {part}, not one")
        scope = found[0]
    return scope


def _definitions(scope: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """The functions and classes that a scope defines, without nested ones."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, _DEFINITIONS):
            yield node
        else:
            yield from _definitions(node)


def _all_functions(tree: Path) -> Iterator[tuple[str, ast.AST]]:
    """The top-level functions and the methods of all packages, with their dotted names."""
    for package in PACKAGES:
        for file in sorted((tree / package).rglob("*.py")):
            module = ".".join(file.relative_to(tree).with_suffix("").parts)
            for outer in _definitions(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(outer, ast.ClassDef):
                    yield f"{module}.{outer.name}", outer
                else:
                    yield from ((f"{module}.{outer.name}.{method.name}", method) for method in _definitions(outer))


def _keys(scope: ast.AST) -> set[str]:
    return {ast.dump(node) for node in ast.walk(scope) if isinstance(node, (ast.expr, ast.stmt))}
