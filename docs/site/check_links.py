"""Checks that each link within a built site leads to a file, and to an anchor in it: `python docs/site/check_links.py site`.

Links to other sites are not followed.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The anchors of a page and what it links or shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes the anchors and the targets of an element."""
        for key, value in attrs:
            if value and (key == "id" or (tag == "a" and key == "name")):
                self.anchors.add(value)
            elif value and key in ("href", "src"):
                self.targets.append(value)


def broken_links(site: Path) -> list[str]:
    """Returns a line for each link that leads nowhere: the page and the link."""
    pages = {file.resolve(): Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    broken = []
    for file, page in pages.items():
        for target in dict.fromkeys(page.targets):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            start = site if parts.path.startswith("/") else file.parent
            path = (start / unquote(parts.path).lstrip("/")).resolve() if parts.path else file
            anchor = unquote(parts.fragment)
            if not path.is_file() or (anchor and path in pages and anchor not in pages[path].anchors):
                broken.append(f"{file.relative_to(site.resolve())}: {target}")
    return broken


if __name__ == "__main__":
    lines = broken_links(Path(sys.argv[1]))
    print("\n".join(lines) or "all links lead somewhere")
    sys.exit(bool(lines))
