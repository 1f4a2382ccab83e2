"""What `mkdocs.yml` names is there; `make docs` builds the site itself."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import yaml

from tests.support.command_line import ROOT


class Loader(yaml.SafeLoader):
    """Reads the file without the functions that it names."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
GENERATED = "reference/"


def places(item: Any) -> Iterator[str]:
    """The pages and folders of an item of the navigation."""
    if isinstance(item, dict):
        item = list(item.values())
    if isinstance(item, list):
        for content in item:
            yield from places(content)
    else:
        yield item


def test_every_page_and_folder_of_the_navigation_exists() -> None:
    named = list(places(SITE["nav"]))
    assert [place for place in named if place != GENERATED and not (ROOT / place).exists()] == []
    assert GENERATED in named
    assert len(named) == len(set(named))


def test_every_module_of_the_reference_exists() -> None:
    modules = SITE["extra"]["reference"]
    assert [module for module in modules if find_spec(module) is None] == []
    assert len(modules) == len(set(modules))


def test_the_page_of_methods_lists_the_page_of_each_method() -> None:
    folder = ROOT / "docs" / "methods"
    listed = (folder / "README.md").read_text(encoding="utf-8")
    pages = sorted(page.name for page in folder.glob("*.md") if page.name != "README.md")
    assert [page for page in pages if f"]({page})" not in listed] == []
