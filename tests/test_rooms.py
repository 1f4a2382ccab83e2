"""A package is small enough to be read at a glance, and the map of the architecture shows all of them."""

from pathlib import Path

import pytest

import alignbench

HOME = Path(alignbench.__file__).parent
MOST_IN_A_PACKAGE = 15
MOST_AT_THE_TOP = 14


@pytest.mark.parametrize("package", sorted(p.parent for p in HOME.rglob("__init__.py")), ids=lambda p: p.name)
def test_a_package_has_few_modules(package: Path) -> None:
    modules = [module.name for module in package.glob("*.py") if module.name != "__init__.py"]
    assert len(modules) <= (MOST_AT_THE_TOP if package == HOME else MOST_IN_A_PACKAGE), sorted(modules)


def test_the_map_of_the_architecture_names_each_package_once() -> None:
    page = (HOME.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = page.split("    alignbench/")[1].split("\n    objectives/")[0].split("\n      ")
    named = [line.split("/")[0] for line in lines if "/ " in line[:22]]
    packages = [p.name for p in HOME.iterdir() if (p / "__init__.py").exists()]
    assert sorted(named) == sorted(packages)
