"""What stands in a YAML file, or in `--set`, is what is read, or one sentence says where it is wrong."""

import copy
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from alignbench import UserError
from alignbench.files.yaml_files import MAX_BYTES, MAX_VALUES, WrittenFloat, parse, parse_value, read_yaml, to_yaml
from tests.support.properties import nested

TEXTS = st.text(max_size=10) | st.text(alphabet="0123456789._-+eExob:~#yYnN <=!&*", max_size=8)
DATA = nested(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS, TEXTS)


def problem(text: str) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        parse(text)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("2.50", 2.5),
        (".5", 0.5),
        ("-3", -3),
        ("0", 0),
        ("-.inf", float("-inf")),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        # Numbers, truths and dates of YAML 1.1 alone: texts.
        *((t, t) for t in ("012", "0o14", "0x10", "0b1", "1_000", "1_0.5", "1:30", "+5", "yes", "no", "On", "y", "2024-01-01")),
        # As a number it would be another.
        ("1e999", "1e999"),
        ("=", "="),
        ("<<", "<<"),
    ],
)
def test_a_plain_value_is_what_stands_there_in_a_file_and_on_the_command_line(text: str, value: Any) -> None:
    for read in (parse(f"x: {text}")["x"], parse_value(text)):
        assert read == value
        assert isinstance(read, type(value))


def test_what_is_in_quotes_or_tagged_as_a_text_is_a_text() -> None:
    assert parse("[\"1\", '2', !!str 3, !!str true, 'no']") == ["1", "2", "3", "true", "no"]


def test_keys_are_texts_whatever_they_look_like() -> None:
    assert parse("{no: 1, 1e3: 2, 2024-01-01: 3, 1: 4, true: 5, ~: 6, 010: 7}") == {
        "no": 1, "1e3": 2, "2024-01-01": 3, "1": 4, "true": 5, "~": 6, "010": 7,
    }  # fmt: skip


def test_a_float_remembers_how_it_was_written_through_copies_and_processes() -> None:
    read = parse("x: 1.10")["x"]
    for same in (read, copy.deepcopy(read), pickle.loads(pickle.dumps(read))):
        assert isinstance(same, WrittenFloat)
        assert (str(same), float(same), f"{same:g}") == ("1.10", 1.1, "1.1")
    assert to_yaml({"x": read}) == "x: 1.10\n"


@pytest.mark.parametrize(
    "text", ["a: 1\nb: {c: 2}\na: 3\n", "1: x\nb: 0\n'1': y\n", "x: [0]\nb: {lr: 1, lr: 2}\n", "<<: {a: 1}\nb: 1\n<<: {c: 1}\n"]
)
def test_a_repeated_key_is_refused_with_its_line(text: str) -> None:
    assert "; remove one of them" in problem(text)
    assert problem(text).startswith(("line 3: the key", "line 2: the key 'lr' is already on line 2"))


def test_merges_give_what_is_not_overridden_and_the_first_of_several_wins() -> None:
    read = parse(
        "base: &b {lr: 1, decay: 2}\nmore: &m {lr: 5, eps: 6, <<: *b}\none: {<<: *b, lr: 3}\nboth: {lr: 9, <<: [*m, *b]}\n"
    )
    assert read["one"] == {"lr": 3, "decay": 2}
    assert read["more"] == {"lr": 5, "eps": 6, "decay": 2}
    assert read["both"] == {"lr": 9, "eps": 6, "decay": 2}
    # Nothing is shared: a change of one place is none of another.
    read["one"]["decay"] = 0
    assert read["base"]["decay"] == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a:\n\t- b", "line 2: a tab, but YAML allows only spaces here"),
        ("a: 1\nb: c: d", "line 2: mapping values are not allowed here; a text with ': ' in it needs quotes"),
        ("a: 1\nb: \x07", "line 2: a character that YAML does not allow ('\\x07')"),
        ("a: &x [*x]", "line 1: an alias makes it contain itself"),
        ("a: *x", "line 1: found undefined alias 'x'"),
        ("a: !!binary gA==", "line 1: the tag !!binary is not supported"),
        ("a: !!python/name:os.system x", "line 1: the tag !!python/name:os.system is not supported"),
        ("a: !!bool maybe", "line 1: 'maybe' is not a value of the tag !!bool"),
        ("a: !!null x", "line 1: 'x' is not a value of the tag !!null"),
        ("[a]: b", "line 1: a key must be a text, not a list or a mapping"),
        ("a: {<<: [1]}", "line 1: << merges mappings, but this is not a mapping"),
        ("a: 1\n---\nb: 2", "line 2: but found another document"),
        (f"a: {'9' * 5000}", "line 1: a whole number must fit into 64 bits"),
        ("a: " + "[" * 60 + "]" * 60, "line 1: it is nested too deeply, more than 50 levels"),
        ("[" * 1000, "it is nested too deeply"),
        ("#" * (MAX_BYTES + 1), "it is larger than 1 MiB"),
    ],
)
def test_what_makes_no_settings_is_refused_by_line(text: str, sentence: str) -> None:
    assert problem(text).startswith(sentence)


def test_aliases_that_unfold_without_end_are_refused_at_once() -> None:
    lines = ["a0: &a0 [" + ",".join("x" * 9) + "]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    began = time.perf_counter()
    assert problem("\n".join(lines)) == f"it has more than {MAX_VALUES:,} values; shorten it, or use fewer aliases"
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/data/my task #2.yaml", "/data/my task #2.yaml"),
        ("/data/a: b.jsonl", "/data/a: b.jsonl"),
        (" [1, {a: 1e-3}] ", [1, {"a": 1e-3}]),
        ('"[a]"', "[a]"),
        ("- x", "- x"),
        ("*.png", "*.png"),
        ("@x", "@x"),
    ],
)
def test_a_value_on_the_command_line_is_plain_or_yaml_with_brackets_or_quotes(text: str, value: Any) -> None:
    assert parse_value(text) == value


def test_a_value_that_begins_as_a_list_and_is_none_needs_quotes() -> None:
    with pytest.raises(ValueError, match=r"^a text that begins with \[ needs quotes around it$"):
        parse_value("[a].jsonl")


@given(DATA)
@example({"010": "1e-4", "no": ["yes", "~", "1:30", "0o7", "1_0", "<<", "=", "2024-01-01"]})
@example(["\x85", "a\u2028b", "\ufeff", "#", "a #b", "a: b", " a", "'", '"', "\n", "\ta"])
def test_data_of_any_kind_comes_back_from_yaml_here_and_by_yaml_1_1(data: Any) -> None:
    text = to_yaml(data)
    for read in (parse(text), yaml.safe_load(text)):
        assert read == data
        assert repr(read) == repr(data)  # 1 is not true


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a: 1".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        (b"a: 1\nb: \xe4\n", "line 2: it is not UTF-8; save it as UTF-8"),
    ],
)
def test_a_file_in_another_encoding_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        read_yaml(tmp_path / "x.yaml", "task file")
    assert str(caught.value).startswith(f"the task file {tmp_path / 'x.yaml'} is not valid YAML: ")


def test_a_byte_order_mark_and_ends_of_lines_of_windows_are_no_matter(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfseed: 3\r\npreset: smoke\r\n")
    assert read_yaml(tmp_path / "x.yaml") == {"seed": 3, "preset": "smoke"}
