"""Names in every format, whatever they hold; each is read again by a parser that is not ours."""

import csv
import io
import math
import re
import unicodedata
import xml.etree.ElementTree as ET
from html import escape, unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib import pyplot as plt

from alignbench.figures.style import STYLE, legend_name, save
from alignbench.files.escaping import csv_frame, csv_text, latex, markdown, slug, slugs, visible
from tests.support.properties import HOSTILE

NAMES = HOSTILE | st.text(st.sampled_from("\\`*_[]<>|#~$&@:/w.+-=1) \x00\x1b\u202e\u2028\ufffea"), max_size=9)
MARKDOWN = MarkdownIt("gfm-like", {"linkify": False}).enable(["table", "strikethrough"])


@pytest.mark.parametrize("text", ["a b", "Ünï", "漢字", "می\u200cخواهم", "👨\u200d👩", "a\u00a0b"])
def test_letters_that_are_seen_or_shape_others_stay(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\x1b[31m", r"\x1b[31m"), ("a\u202eb", r"a\u202eb"), ("a\nb", r"a\nb"), ("\ud800", r"\ud800"), ("\ufffe", r"\ufffe")],
)
def test_letters_that_act_are_shown_as_escapes(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(NAMES)
def test_what_is_shown_is_xml_and_one_line_and_stays_as_it_is(text: str) -> None:
    shown = visible(text)
    assert visible(shown) == shown
    assert len(shown.splitlines()) <= 1
    assert not {"Cc", "Cs"} & set(map(unicodedata.category, shown))
    assert ET.fromstring(f"<a>{escape(shown)}</a>").text == (shown or None)
    assert unescape(escape(shown)) == shown


def text_of(inline: str) -> str:
    (token,) = [t for t in MARKDOWN.parse(f"x {inline}") if t.type == "inline"]
    return "".join(t.content for t in token.children or []).removeprefix("x ")


@given(NAMES)
@example("- a")
@example("1. a")
@example("https://evil.example")
def test_markdown_is_the_name_and_nothing_else(text: str) -> None:
    name, escaped = visible(" ".join(text.split())), markdown(text)
    assert text_of(escaped) == (name or "x")
    for around in ("# {}", "- {}", "| a |\n|---|\n| {} |", "{}"):
        opened = {t.type for t in MARKDOWN.parse(around.format(escaped))} - {"inline"}
        assert opened <= {t.type for t in MARKDOWN.parse(around.format("x"))} | {"paragraph_open", "paragraph_close"}
    assert not re.search(r"(?<!\\):(?=//)", escaped)


@given(NAMES)
def test_latex_has_no_bare_special(text: str) -> None:
    found = latex(text)
    bare = re.sub(r"\\(text\w+\{\}|[&%$#_{}])|\$(\\uparrow|\\downarrow|-)\$|^\{[[*]\}", "", found)
    assert not set("\\&%$#_{}~^<>|`") & set(bare)
    assert not found.startswith(("[", "*"))


@given(st.lists(st.tuples(NAMES, st.floats(allow_nan=False)), min_size=1, max_size=3), NAMES)
def test_csv_comes_back_and_has_no_formula(rows: list[tuple[str, float]], head: str) -> None:
    written = csv_frame(pd.DataFrame(rows, columns=[f"x{head}", head])).to_csv(index=False)
    heads, *found = csv.reader(io.StringIO(written))
    assert heads == [f"x{visible(head)}", csv_text(visible(head))]
    assert [(text, float(value)) for text, value in found] == [(csv_text(visible(name)), value) for name, value in rows]
    for text in (*heads, *(text for text, _ in found)):
        assert not text.startswith(tuple("=@\t\r＝＋－＠"))
        assert not text.startswith(("+", "-")) or math.isfinite(float(text))


def test_numbers_stay_numbers_in_a_csv() -> None:
    assert [csv_text(text) for text in ("-0.5", "+1e-3", "-1+1", "=1+1", "@a", "-a")] == [
        *("-0.5", "+1e-3", "'-1+1", "'=1+1", "'@a", "'-a")
    ]
    assert csv_frame(pd.DataFrame({"a": [-0.5, np.nan], "b": ["-", None]})).to_csv(index=False) == "a,b\n-0.5,'-\n,\n"


@given(st.lists(NAMES | st.text("a ._-A", max_size=4), max_size=6))
def test_no_two_names_share_a_file(names: list[str]) -> None:
    found = slugs(names)
    assert set(found) == set(names)
    assert len({name.casefold() for name in found.values()}) == len(set(names))
    for name in found.values():
        assert name not in ("", ".", "..")
        assert not set("/\\:\n\0 ") & set(name)
    assert slugs(["a b", "a_b", "A-b"]) == {"a b": "a_b", "a_b": "a_b_2", "A-b": "A_b_3"}


def test_long_names_make_short_files() -> None:
    assert slug("w" * 5000) == "w" * 60


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["costs $5_{ and $6^", "\x1b[31m\x00", "a--b ]]> <&\"'", "_hidden", "漢字 \u202e", "\\frac{$"])
def test_svg_of_any_label_is_xml_and_no_formula(tmp_path: Path, name: str) -> None:
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(2, 2), layout="constrained")
        axis.plot([0, 1], [0, 1], label=legend_name(visible(name)))
        axis.set(title=visible(name), xticks=[0, 1], xticklabels=[visible(name)] * 2)
        axis.legend()
    for suffix in (".svg", ".png"):
        save(figure, tmp_path / f"plot{suffix}")
    assert ET.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")
