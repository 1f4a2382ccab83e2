"""One door for text, JSON and tables: content before suffix, errors with file and line, and limits."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignbench import UserError
from alignbench.files import text_files
from alignbench.files.text import excerpt
from alignbench.files.text_files import Table, read_table


def table(file: Path, content: str | bytes, **options: bool) -> Table:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(file, "prompts", "prompt", **options)


def rows(found: Table) -> list[list[str]]:
    return [list(found.values(heading)) for heading in found.headings]


def test_what_spreadsheets_leave_around_a_table_is_no_row_of_it(tmp_path: Path) -> None:
    found = table(tmp_path / "t.csv", "sep=;\r\nprompt;image;\r\na, b;x;;\r\n;;\r\n\r\nc;y;\r\n")
    assert (found.texts("prompt"), found.texts("image")) == (["a, b", "c"], ["x", "y"])
    assert found.place(1) == f"{tmp_path / 't.csv'}, line 6"


def test_the_head_tells_the_delimiter(tmp_path: Path) -> None:
    for head, row in (("n;prompt", "1;a, b"), ("\tPrompt", "0\ta; b"), (";prompt", "0;a, b"), ("prompt,n", "a; b,1")):
        for suffix in ("csv", "tsv", "txt"):
            found = table(tmp_path / f"t.{suffix}", f"{head}\n{row}\n", lines=True)
            assert [found.texts(found.require("prompt"))[0][0], len(found.headings)] == ["a", 2], (head, suffix)


def test_blanks_may_stand_between_a_comma_and_a_quote(tmp_path: Path) -> None:
    assert rows(table(tmp_path / "t.csv", 'image, prompt\na.png, "one, ""two"""\n')) == [["a.png"], ['one, "two"']]
    assert rows(table(tmp_path / "t.csv", 'image,prompt\na.png,"one, ""two"""\n'))[1] == ['one, "two"']
    assert rows(table(tmp_path / "t.csv", 'image,prompt\na.png, "one" two\n'))[1] == [' "one" two']


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", "prompt,n\na,1\nb, c,2\n", r"line 3 has 3 fields and the header row 2; .*',' needs quotes"),
        ("t.csv", 'prompt,n\n"a\nb",1\nc\n', "line 4 has 1 fields"),
        ("t.csv", 'prompt,n\na,1\n"b,2\nc,3', "line 3: unexpected end"),
        ("t.csv", "Prompt,prompt \na,b\n", "has the columns 'Prompt' and 'prompt'; call only one"),
        ("t.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', "line 3 is damaged, column"),
        ("t.jsonl", '{"prompt": "a"}\n' + "[" * 100_000, "line 2 is damaged, it is nested too deeply"),
        ("t.json", '[{"prompt": "a"},\n {"prompt" "b"}]', "line 2, column 12"),
        ("t.json", '[{"prompt": "a"}, 3]', "entry 2 is 3; the list must hold only objects"),
        ("t.jsonl", '{"prompt": "a", "prompt": "b"}', "line 1 is damaged, it has the key 'prompt' twice"),
        (
            "t.tsv",
            'prompt\tn\n"SUN" on a sign\t1\n',
            "line 2: .*; a text with quotes must be in quotes, and its own quotes doubled",
        ),
        ("t.json", "3", "line 1 must be an object in braces"),
        ("t.txt", "a cat\nd\xe9j\xe0 vu\n".encode("latin-1"), "line 2 is not valid UTF-8"),
        ("t.txt", "a\nb\n".encode("utf-16-le"), "line 1 holds a NUL"),
        ("t.yaml", "- a\n", ".yaml is not one of the formats"),
        ("t.csv", '{"prompts": ["a"]}', "has no column 'prompt'"),
        ("t.csv", "".join(f"{'x' * 200}{i}," for i in range(1000)) + "\nx" + "," * 1000, "has no column 'prompt'"),
    ],
)
def test_what_is_damaged_is_named_by_its_line(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        table(tmp_path / name, content).require("prompt")
    assert len(str(caught.value)) < 1500


def test_a_pipe_is_read_where_it_may_be_and_never_waited_for_elsewhere(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t")
    with pytest.raises(UserError, match="it is not a regular file"):
        read_table(tmp_path / "t", "prompts", "prompt")
    pd.DataFrame({"prompt": ["a"]}).to_parquet(tmp_path / "p.parquet")
    for content in (b"prompt,n\na,1\n", b'{"prompt": "a"}', b'["a"]', b"a\n", (tmp_path / "p.parquet").read_bytes()):
        writer = threading.Thread(target=(tmp_path / "t").write_bytes, args=[content])
        writer.start()
        found = read_table(tmp_path / "t", "prompts", "prompt", lines=True, pipe=True)
        writer.join()
        assert found.texts("prompt") == ["a"]


def written(folder: Path, column: pa.Array) -> Path:
    # Without pandas' schema, which would give the type of the column as it was here.
    pq.write_table(pa.table({"prompt": column}), folder / "t.parquet", compression="zstd", store_schema=False)
    return folder / "t.parquet"


def one_text(folder: Path, rows: int, characters: int) -> Path:
    return written(folder, pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), pa.array(["é" * characters])))


def test_a_text_that_a_small_parquet_file_repeats_is_kept_once(tmp_path: Path) -> None:
    """As plain texts these would be 40 GB."""
    file = one_text(tmp_path, 200_000, 99_000)
    assert file.stat().st_size < 10_000
    texts = read_table(file, "prompts", "prompt").texts("prompt")
    assert len(texts) == 200_000
    assert len(set(map(id, texts))) == 1


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda folder: one_text(folder, 5_001, 1), "it has 5,001 rows; at most 5,000 are read"),
        (lambda folder: one_text(folder, 1, 100_001), "row 1: 'prompt' has 100,001 characters"),
        (lambda folder: written(folder, pa.array(["x" * 2**22])), "its column 'prompt' takes 4 MiB in memory"),
        (lambda folder: written(folder, pa.array([["a"]])), "the column 'prompt' holds list<.*>, not texts"),
    ],
)
def test_a_parquet_file_that_unfolds_to_too_much_is_refused(
    tmp_path: Path, made: Callable[[Path], Path], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MAX_ROWS", 5_000)
    monkeypatch.setattr(text_files, "MAX_BYTES", 2**20)
    with pytest.raises(UserError, match=says):
        read_table(made(tmp_path), "prompts", "prompt").texts("prompt")


def test_large_text_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_ROWS", 5)
    for name, content in (("t.txt", "a\n" * 7), ("t.csv", "prompt\n" + "a\n" * 6), ("t.jsonl", '{"prompt": "a"}\n' * 7)):
        with pytest.raises(UserError, match="rows"):
            table(tmp_path / name, content, lines=True)
    monkeypatch.setattr(text_files, "MAX_BYTES", 2**20)
    with pytest.raises(UserError, match="it is larger than 1 MiB"):
        table(tmp_path / "t.txt", "a" * (2**20 + 5), lines=True)
    with pytest.raises(UserError, match="it is larger than 1 MiB"):
        read_table(Path("/dev/zero"), "prompts", "prompt", pipe=True)


def test_a_value_in_a_sentence_is_short_however_long_or_deep_it_is() -> None:
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep]
    for value in (deep, list(range(20_000)), "x" * 9000, {"a": "b" * 9000}, b"\xff" * 9000, 10**4000):
        assert len(excerpt(value)) <= 80
    assert excerpt("a cat") == "'a cat'"
