"""The JSON reader: what it reads, and the sentences with which it refuses."""

import json
from pathlib import Path

import pytest

from alignbench import UserError
from alignbench.files.json_files import parse_json, read_json


def test_a_byte_order_mark_is_not_part_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": [1]}).encode())
    assert read_json(tmp_path / "t.json", "record") == {"a": [1]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{\n", "cannot read the record in .*: it is not valid JSON .line 2, column 1"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "it has the key 'a' twice"),
        (b"\xff", "is not UTF-8 text"),
        (b"[1]", "does not hold keys and values"),
    ],
)
def test_other_content_is_refused_with_its_place(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_json(tmp_path / "t.json", "record")


def test_any_json_value_can_be_parsed() -> None:
    assert parse_json('[1, {"a": null}]') == [1, {"a": None}]
