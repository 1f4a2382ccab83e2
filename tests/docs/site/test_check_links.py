"""The link check of the built site."""

from importlib import util
from pathlib import Path

from tests.support.command_line import ROOT

SPEC = util.spec_from_file_location("check_links", ROOT / "docs" / "site" / "check_links.py")
assert SPEC is not None
assert SPEC.loader is not None
check_links = util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_links)


def test_links_of_a_site_are_followed_to_files_and_anchors(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "index.html").write_text(
        '<h1 id="top">x</h1><a href="below/page.html#here"></a><a href="https://x.org/y#z"></a>'
    )
    (tmp_path / "below" / "page.html").write_text(
        '<a name="here"></a><a href="../index.html#top"></a><a href="#here"></a><a href="/index.html"></a>'
        '<img src="../a%20b.png">'
        '<a href="none.html"></a><a href="#gone"></a><a href="../index.html#gone"></a><img src="none.png"><a href=".."></a>'
    )
    (tmp_path / "a b.png").write_bytes(b"")
    lost = ["none.html", "#gone", "../index.html#gone", "none.png", ".."]
    assert check_links.broken_links(tmp_path) == [f"below/page.html: {link}" for link in lost]
