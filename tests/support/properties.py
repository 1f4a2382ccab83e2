"""Helpers of property tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st

from alignbench import UserError

HOSTILE = st.text(max_size=12) | st.sampled_from(
    [
        *("", ".", "..", "../../x", "/etc/x", "a/b", "a\\b", "a\0b", "x\ny", "a|b", "\ufeffa", "\u202egnp"),
        *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "](javascript:x)", "$x_{", "{{ 7 * 7 }}", "[/red]"),
    ]
)
"""Texts that something could take for a path, for markup or for a command."""


@contextmanager
def one_sentence_at_most() -> Iterator[None]:
    """Checks that its block works, or raises UserError with a single line."""
    try:
        yield
    except UserError as error:
        lines = str(error).splitlines()
        if len(lines) != 1 or not lines[0].strip():
            raise AssertionError(f"no single sentence: {lines}") from error


def nested(scalars: st.SearchStrategy[Any], keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Makes a strategy for scalars and for nested lists and dictionaries of them."""
    return st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
    )
