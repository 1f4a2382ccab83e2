"""The messages that the page on troubleshooting quotes are those of the code."""

import ast
import re
from functools import cache

import pytest

from tests.support.command_line import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
LEAST = 6
"""Letters of a piece of a message that say something."""
SPANS = re.findall(r"`([^`]+)`", PAGE.read_text(encoding="utf-8"))
QUOTED = [span for span in SPANS if "..." in span or len(span.split()) > 5]
"""The spans of code that are messages, not commands or settings."""


@cache
def texts() -> tuple[str, ...]:
    """Every text in the source; what an f-string fills in is left out, which splits it."""
    found: list[str] = []
    for folder in ("alignbench", "objectives", "samplers", "evals"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            found += [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return tuple(found)


def unknown(message: str) -> list[str]:
    """The pieces of a quoted message that no text of the source has."""
    pieces = [piece.strip() for piece in message.split("...")]
    return [piece for piece in pieces if len(piece) >= LEAST and not any(piece in text for text in texts())]


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_in_the_source(message: str) -> None:
    assert unknown(message) == []


def test_a_message_that_no_code_has_is_found() -> None:
    assert unknown("there is no task ...; ask your neighbour") == ["; ask your neighbour"]
    assert len(QUOTED) > 20
