import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignbench.files.text import distinct, excerpt, normal_form, plain_form, prompt_identity

ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126))


@given(ASCII)
def test_printable_ascii_is_lowered_and_otherwise_kept(text: str) -> None:
    assert normal_form(text) == text.lower()
    assert plain_form(text) == text


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("\uff28\uff49\uff01", "hi!"),  # full-width
        ("cafe\u0301", "caf\u00e9"),  # decomposed
        ("\ufb01ne", "fine"),  # a ligature
        ("STRA\u00dfE", "strasse"),
        ("STRA\u1e9eE", "strasse"),
        ("\u03a3\u03c3\u03c2", "\u03c3\u03c3\u03c3"),  # three sigmas
        ("\u212b", "\u00e5"),  # the Angstrom sign
        ("don\u2019t \u201cgo\u201d \u2013 \u2026", 'don\'t "go" - ...'),
        ("13\u00bd", "131/2"),
        ("a\u200bb\ufeff\u00adc\u2060\ufe0f", "abc"),  # nothing that is seen
        ("\u3164\u2800", ""),  # blank letters
        ("a\u00a0b\u3000c\td", "a b c\td"),
    ],
)
def test_one_normal_form(text: str, form: str) -> None:
    assert normal_form(text) == form


@given(st.text())
def test_the_normal_form_is_its_own_and_that_of_every_spelling(text: str) -> None:
    form = normal_form(text)
    assert normal_form(form) == form
    for kind in ("NFC", "NFD", "NFKC", "NFKD"):
        assert normal_form(unicodedata.normalize(kind, text)) == form
    assert normal_form(text.casefold()) == form
    assert plain_form(plain_form(text)) == plain_form(text)


@pytest.mark.parametrize("other", ["a  Red\tCat ", "A RED CAT", "a red\u00a0cat", "a r\u200bed cat", "\uff41 red cat"])
def test_blanks_capitals_and_spellings_make_no_other_prompt(other: str) -> None:
    assert prompt_identity(other) == prompt_identity("a red cat")


@pytest.mark.parametrize("other", ["a redcat", "a red cat.", "a red cats", "a r\u00e9d cat"])
def test_other_prompts_stay_others(other: str) -> None:
    assert prompt_identity(other) != prompt_identity("a red cat")


def test_the_first_of_each_prompt_is_kept_in_order() -> None:
    assert distinct(["B  b", "a", "b B", "A", "c"]) == ["B  b", "a", "c"]


def test_an_excerpt_of_a_long_text_is_short() -> None:
    assert excerpt("it's") == '"it\'s"'
    assert len(excerpt("x" * 10**6)) <= 80
    assert excerpt("x" * 10**6).startswith("'xxxxxx")
