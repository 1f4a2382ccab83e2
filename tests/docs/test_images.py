"""Every image of the pages is on a page, and the list of images says which command makes it."""

import re

import pytest

from tests.docs.test_links import PAGES, links, text_of
from tests.support.command_line import ROOT
from tests.support.documented import commands

FOLDER = ROOT / "docs" / "images"
LIST = FOLDER / "README.md"
IMAGES = sorted(file.name for file in FOLDER.iterdir() if file != LIST)
LARGEST = 1_000_000
"""Bytes of an image at most, so that a page of the repository loads fast."""


@pytest.mark.parametrize("name", IMAGES)
def test_each_image_is_on_a_page_and_small(name: str) -> None:
    shown = {(page.parent / link).resolve() for page in PAGES if page != LIST for link in links(text_of(page))}
    assert FOLDER / name in shown
    assert (FOLDER / name).stat().st_size <= LARGEST


def test_the_list_has_each_image_with_the_number_of_a_command() -> None:
    rows = re.findall(r"^\| !?\[[^]]*\]\((\S+)\) \|.*\| (\d) \| `(\S+)` \|$", text_of(LIST), re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == IMAGES
    numbers = [int(number) for _, number, _ in rows]
    assert numbers == list(range(1, len(list(commands(LIST))) + 1))
    suffixes = [(name.rpartition(".")[2], file.rpartition(".")[2]) for name, _, file in rows]
    assert all(of_image == of_file for of_image, of_file in suffixes)
