"""Whatever a file of prompts holds, its prompts come back as they are, or one sentence says why not."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image

from alignbench import UserError
from alignbench.files.text_files import MAX_CHARACTERS, stripped
from alignbench.tasks.prompts import read_image_folder, read_prompts
from alignbench.training.pairs import read_pairs
from tests.support.properties import one_sentence_at_most

TEXTS = st.text(min_size=1).map(stripped).filter(bool)
LINES = TEXTS.filter(lambda text: not set("\n\r\0") & set(text))
TRICKY = [
    'say "a, b"',
    "'",
    "NA",
    "nan",
    "2020",
    "1e5",
    "a\x85b\u2028c\u2029d\x0be",
    'one, "two"',
    "a; b\tc",
    "{a} [b]",
    "é ，\U0001f600",
    "#",
    "\\N",
    "-",
]
BOM = b"\xef\xbb\xbf"
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


def as_csv(prompts: list[str], delimiter: str = ",") -> str:
    opened = io.StringIO()
    writer = csv.writer(opened, delimiter=delimiter)
    writer.writerows([["other", "Prompt"], *([str(i), prompt] for i, prompt in enumerate(prompts))])
    return opened.getvalue()


def as_lines(prompts: list[str], end: str = "\n\n", ascii_only: bool = True) -> str:
    return end.join(json.dumps({"prompt": p, "other": 10**30}, ensure_ascii=ascii_only) for p in prompts)


def as_parquet(prompts: list[str]) -> bytes:
    opened = io.BytesIO()
    pd.DataFrame({"prompt": prompts, "other": range(len(prompts))}).to_parquet(opened)
    return opened.getvalue()


TABLES: list[tuple[str, Callable[[list[str]], str]]] = [
    ("p.csv", as_csv),
    ("p.CSV", lambda prompts: as_csv(prompts, ";")),
    ("p.csv", lambda prompts: as_csv(prompts, "\t")),
    ("p.tsv", lambda prompts: as_csv(prompts, "\t")),
    ("p.tsv", as_csv),
    ("p", as_csv),
    ("p.txt", lambda prompts: as_csv(prompts, ";")),
    ("p.jsonl", as_lines),
    ("p.NDJSON", lambda prompts: as_lines(prompts, "\r\n", ascii_only=False)),
    ("p.json", lambda prompts: as_lines(prompts, "\r")),
    ("p.txt", lambda prompts: as_lines(prompts, ascii_only=False)),
    ("p.json", json.dumps),
    ("p.jsonl", lambda prompts: json.dumps(prompts, indent=2)),
    ("p.json", lambda prompts: json.dumps([{"id": i, "prompt": p} for i, p in enumerate(prompts)], indent=4)),
    ("p", lambda prompts: json.dumps([{"prompt": p} for p in prompts])),
]


@given(st.lists(TEXTS | st.sampled_from(TRICKY), min_size=1, max_size=4), st.sampled_from(TABLES), ENCODINGS)
def test_prompts_of_a_table_are_those_that_were_written(
    folder: Path, prompts: list[str], table: tuple[str, Callable[[list[str]], str]], encoding: str
) -> None:
    name, written = table
    text = written(prompts)
    assume("\0" not in text)
    (folder / name).write_bytes(text.encode(encoding))
    assert read_prompts(folder / name) == prompts


@pytest.mark.parametrize("number", range(len(TABLES)))
def test_tricky_prompts_of_each_kind_of_table(folder: Path, number: int) -> None:
    name, written = TABLES[number]
    (folder / name).write_bytes(written(TRICKY).encode())
    assert read_prompts(folder / name) == TRICKY


@given(st.lists(TEXTS | st.sampled_from(TRICKY), min_size=1, max_size=4), st.sampled_from(["p.parquet", "p.PQ", "p.txt", "p"]))
def test_prompts_of_a_parquet_file_are_those_that_were_written(folder: Path, prompts: list[str], name: str) -> None:
    (folder / name).write_bytes(as_parquet(prompts))
    assert read_prompts(folder / name) == prompts


@given(
    st.lists(LINES | st.sampled_from(TRICKY), min_size=1, max_size=4),
    st.sampled_from(["\n", "\r", "\r\n", "\n \n"]),
    ENCODINGS,
)
@example(TRICKY, "\r\n", "utf-8-sig")
def test_prompts_of_a_text_are_its_lines(folder: Path, prompts: list[str], end: str, encoding: str) -> None:
    assume(not prompts[0].startswith(("{", "[")) and "prompt" not in prompts[0].lower())
    (folder / "p.txt").write_bytes(end.join(["", *prompts, ""]).encode(encoding))
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


@given(st.sampled_from(["txt", "csv", "tsv", "json", "jsonl", "parquet"]), RUBBISH)
@example("csv", b"prompt\na cat, a dog\n")
@example("csv", b"prompt,prompt\na,b\n")
@example("csv", b'prompt\n"a')
@example("csv", b"prompt\n" + b"a" * 200_000)
@example("jsonl", b'{"prompt": "a\\ud800"}')
@example("jsonl", b'{"prompt": ' + b"[" * 100_000)
@example("jsonl", b'{"prompt": ' + b"9" * 5000 + b"}")
@example("jsonl", b'["prompt"]\n{"prompt": "a"}')
@example("csv", b'"\n\0"')
@example("json", b"[" * 100_000)
@example("json", b'{"prompt": ' + b'{"a":' * 100_000)
@example("json", b'[{"prompt": "a"}, "b"]')
@example("txt", "a\n".encode("utf-16-le"))
@example("txt", b"\xff\xfea")
def test_any_file_holds_prompts_or_is_refused_in_one_sentence(folder: Path, kind: str, content: bytes) -> None:
    file = folder / f"any.{kind}"
    file.write_bytes(content)
    for read in (read_pairs, lambda f: read_image_folder(folder, f)):
        with one_sentence_at_most():
            read(file)
    with one_sentence_at_most():
        prompts = read_prompts(file)
        assert prompts
        assert all(prompt.encode().strip() and len(prompt) <= MAX_CHARACTERS for prompt in prompts)


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
    found = read_image_folder(made, made / "p.txt")
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
