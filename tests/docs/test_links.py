"""Every relative link on a page leads to a file of the repository, and to a heading in it."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.command_line import ROOT
from tests.support.documented import MARKDOWN

FOLDERS = ("docs", "alignbench", "results/gaussian_mixture", "results/reference")
KINDS = ("*.md", "*.ipynb")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for kind in KINDS for page in (ROOT / folder).rglob(kind))])


def text_of(page: Path) -> str:
    """The Markdown of a page or of a notebook."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def links(text: str) -> list[str]:
    """What a page links and shows, but for other sites."""
    tokens = MARKDOWN.parse(text)
    inside = [child for token in tokens for child in token.children or ()]
    targets = [str(token.attrGet("href") or token.attrGet("src") or "") for token in inside]
    return [target for target in targets if target and not urlsplit(target).scheme]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and the docs site make them."""
    tokens = MARKDOWN.parse(page.read_text(encoding="utf-8"))
    headings = [after for token, after in pairwise(tokens) if token.type == "heading_open"]
    texts = ["".join(child.content for child in heading.children or ()) for heading in headings]
    slugs = [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts]
    before: Counter[str] = Counter()
    unique = set()
    for slug in slugs:
        unique.add(f"{slug}-{before[slug]}" if before[slug] else slug)
        before[slug] += 1
    return unique


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere, or to a folder, which the docs site cannot show."""
    lost = []
    for link in links(text_of(page)):
        parts = urlsplit(link)
        target = page.parent / unquote(parts.path) if parts.path else page
        if not target.is_file() or (parts.fragment and target.suffix == ".md" and parts.fragment not in anchors(target)):
            lost.append(link)
    return lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert broken(page) == []


def test_a_link_to_a_missing_file_or_heading_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# The `front` of p(x), and more\n\n## Twice\n\n## Twice\n")
    page = tmp_path / "page.md"
    good = "[a](other.md#the-front-of-px-and-more) [b](other.md#twice-1) [c](#here) [d](https://example.org/x) ![e](other.md)"
    page.write_text(f"# Here\n\n{good}\n\n[f](none.md) [g](other.md#twice-2) ![h](none.png) [i](#there) [j](.)\n")
    assert broken(page) == ["none.md", "other.md#twice-2", "none.png", "#there", "."]
