"""Whatever a file of prompts holds, its prompts come back as they are, or one sentence says why not."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from alignbench import UserError
from alignbench.pairs import read_pairs
from alignbench.prompts import read_pictures, read_prompts
from tests.properties import one_sentence_at_most

TEXTS = st.text(min_size=1).filter(str.strip)
LINES = TEXTS.map(str.strip).filter(lambda text: not set("\n\r") & set(text))
TRICKY = [
    "\ufeffa",
    "a\0b",
    'say "a, b"',
    "'",
    "NA",
    "nan",
    "2020",
    "1e5",
    "a\x85b\u2028c\x0bd",
    "é ，\U0001f600",
    "#",
    "\\N",
    "-",
]
BOM = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


def as_csv(prompts: list[str]) -> bytes:
    opened = io.StringIO()
    csv.writer(opened).writerows([["other", "prompt"], *([str(i), prompt] for i, prompt in enumerate(prompts))])
    return opened.getvalue().encode()


def as_parquet(prompts: list[str]) -> bytes:
    opened = io.BytesIO()
    pd.DataFrame({"prompt": prompts, "other": range(len(prompts))}).to_parquet(opened)
    return opened.getvalue()


def as_lines(prompts: list[str], ascii_only: bool) -> bytes:
    return "\n\n".join(json.dumps({"prompt": p, "other": 10**30}, ensure_ascii=ascii_only) for p in prompts).encode()


TABLES: list[tuple[str, Callable[[list[str]], bytes]]] = [
    ("p.csv", as_csv),
    ("p.CSV", lambda prompts: BOM + as_csv(prompts)),
    ("p.jsonl", lambda prompts: as_lines(prompts, True)),
    ("p.jsonl", lambda prompts: BOM + as_lines(prompts, False)),
    ("p.parquet", as_parquet),
]


@given(st.lists(TEXTS | st.sampled_from(TRICKY), min_size=1, max_size=4), st.sampled_from(TABLES))
@example(TRICKY, TABLES[0])
@example(TRICKY, TABLES[1])
@example(TRICKY, TABLES[2])
@example(TRICKY, TABLES[3])
@example(TRICKY, TABLES[4])
def test_prompts_of_a_table_are_those_that_were_written(
    folder: Path, prompts: list[str], table: tuple[str, Callable[[list[str]], bytes]]
) -> None:
    name, written = table
    (folder / name).write_bytes(written(prompts))
    assert read_prompts(folder / name) == prompts


@given(
    st.lists(LINES | st.sampled_from(TRICKY[1:]), min_size=1, max_size=4),
    st.sampled_from(["\n", "\r\n", "\n \n"]),
    st.booleans(),
)
@example(TRICKY[1:], "\r\n", True)
def test_prompts_of_a_text_are_its_lines(folder: Path, prompts: list[str], end: str, marked: bool) -> None:
    (folder / "p.txt").write_bytes(BOM * marked + end.join(["", *prompts, ""]).encode())
    assert read_prompts(folder / "p.txt") == prompts


PARTS = [
    b"prompt",
    b"image",
    b",",
    b'"',
    b"\n",
    b"\r",
    b"\0",
    b"{",
    b"}",
    b":",
    b"[",
    b"a",
    b"1",
    b" ",
    b"\\ud800",
    b"\xff",
    b"\xc3\xa9",
    BOM,
]
RUBBISH = st.binary(max_size=40) | st.lists(st.sampled_from(PARTS), max_size=25).map(b"".join)


@given(st.sampled_from(["txt", "csv", "jsonl", "parquet"]), RUBBISH)
@example("csv", b"prompt\na cat, a dog\n")
@example("csv", b"prompt,prompt\na,b\n")
@example("csv", b'prompt\n"a')
@example("csv", b"prompt\n" + b"a" * 200_000)
@example("jsonl", b'{"prompt": "a\\ud800"}')
@example("jsonl", b'{"prompt": ' + b"[" * 100_000)
@example("jsonl", b'{"prompt": ' + b"9" * 5000 + b"}")
@example("jsonl", b'["prompt"]\n{"prompt": "a"}')
@example("csv", b'"\n\0"')
@example("txt", "a\n".encode("utf-16"))
def test_any_file_holds_prompts_or_is_refused_in_one_sentence(folder: Path, kind: str, content: bytes) -> None:
    file = folder / f"any.{kind}"
    file.write_bytes(content)
    for read in (read_pairs, lambda f: read_pictures(folder, f)):
        with one_sentence_at_most():
            read(file)
    with one_sentence_at_most():
        prompts = read_prompts(file)
        assert prompts
        assert all(prompt.encode().strip() for prompt in prompts)


@given(st.integers(0, 10**6), st.integers(1, 255), st.lists(TEXTS, min_size=1, max_size=3))
def test_a_damaged_parquet_file_is_read_or_refused_in_one_sentence(
    folder: Path, at: int, flip: int, prompts: list[str]
) -> None:
    content = bytearray(as_parquet(prompts))
    content[at % len(content)] ^= flip
    (folder / "damaged.parquet").write_bytes(content)
    with one_sentence_at_most():
        assert read_prompts(folder / "damaged.parquet")


@given(st.lists(st.text(alphabet="0123456789²٣a-", min_size=1, max_size=6), min_size=1, max_size=5, unique=True))
def test_pictures_of_any_names_are_dealt_out(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    made = tmp_path_factory.mktemp("pictures")
    (made / "p.txt").write_text("a prompt")
    for name in names:
        Image.new("L", (1, 1)).save(made / f"{name}.png")
    found = read_pictures(made, made / "p.txt")
    assert (found.owners, found.prompts) == ([0] * len(names), ["a prompt"])


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "\udcff"])
@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "parquet"])
def test_a_name_that_no_file_has_is_refused_in_one_sentence(tmp_path: Path, name: str, kind: str) -> None:
    for read in (read_prompts, read_pairs):
        with pytest.raises(UserError, match="cannot read the p"):
            read(tmp_path / f"{name}.{kind}")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": name, "rejected": name}))
    with pytest.raises(UserError):
        read_pairs(tmp_path / "pairs.jsonl")
