import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from alignbench import UserError
from alignbench.prompts import interleaved, read_pictures, read_prompts
from alignbench.reading import read_table

WANTED = ['the word "É, 12"', "2020", "NA"]


def save(folder: Path, name: str, grey: int, size: tuple[int, int] = (4, 4)) -> None:
    folder.mkdir(exist_ok=True)
    Image.new("L", size, grey).save(folder / name)


def test_every_kind_of_file_gives_the_same_prompts(tmp_path: Path) -> None:
    table = pd.DataFrame({"prompt": WANTED, "other": [1, 2, 3]})
    (tmp_path / "p.txt").write_text("\n\n".join(WANTED), encoding="utf-8")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": p, "other": 1}) for p in WANTED))
    table.to_csv(tmp_path / "p.csv", index=False)
    table.to_parquet(tmp_path / "p.parquet")
    for kind in ("txt", "jsonl", "csv", "parquet"):
        assert read_prompts(tmp_path / f"p.{kind}") == WANTED, kind


def test_a_mark_of_byte_order_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    for name, text in (("p.txt", "2020\n"), ("p.csv", "prompt\n2020\n"), ("p.jsonl", '{"prompt": "2020"}\n')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read_prompts(tmp_path / name) == ["2020"], name


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "\n\n", "holds no prompt"),
        ("p.jsonl", '{"promt": "a"}', "has no column 'prompt'; did you mean 'promt'"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}', "row 2: 'prompt' must be a text, got 3"),
        ("p.jsonl", "{", "cannot read the prompts"),
        ("p.csv", "prompt,image\n", "holds no prompt"),
        ("p.csv", "prompt\n' '\n\"  \"\n", "row 2: 'prompt' must be a text"),
        ("p.parquet", "nonsense", "cannot read the prompts"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says):
        read_prompts(tmp_path / name)
    with pytest.raises(UserError, match="cannot read the prompts"):
        read_prompts(tmp_path / f"missing-{name}")


def test_a_parquet_file_whose_texts_are_no_utf8_is_refused(tmp_path: Path) -> None:
    """The file is whole, but for one byte of a text."""
    for read, refused in ((read_prompts, "cannot read the prompts"), (read_table, "cannot read")):
        pd.DataFrame({"prompt": ["é"]}).to_parquet(tmp_path / "p.parquet", compression=None)
        assert list(read(tmp_path / "p.parquet")) in (["é"], ["prompt"])
        content = (tmp_path / "p.parquet").read_bytes().replace("é".encode(), b"\xc3(")
        (tmp_path / "p.parquet").write_bytes(content)
        with pytest.raises(UserError, match=refused):
            read(tmp_path / "p.parquet")


def test_several_files_take_turns() -> None:
    assert interleaved([["a", "b", "c"], ["1"], ["x", "y"]]) == ["a", "1", "x", "b", "y", "c"]


def test_sorted_pictures_are_dealt_out_by_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1, 9):
        save(tmp_path / "pictures", f"{number}.png", number)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    (tmp_path / "p.txt").write_text("first\nsecond")
    found = read_pictures(tmp_path / "pictures", tmp_path / "p.txt")
    assert [int(np.asarray(i)[0, 0]) for i in found.images] == [1, 2, 9, 10]
    assert (found.prompts, found.owners) == (["first", "second"], [0, 0, 1, 1])


def test_a_column_names_each_picture_and_rows_of_one_prompt_belong_together(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / "pictures", f"{name}.png", ord(name))
    pd.DataFrame({"prompt": ["x", "y", "x"], "image": ["c.png", "a.png", "b.png"]}).to_csv(tmp_path / "p.csv", index=False)
    found = read_pictures(tmp_path / "pictures", tmp_path / "p.csv")
    assert [chr(np.asarray(i)[0, 0]) for i in found.images] == ["c", "a", "b"]
    assert (found.prompts, found.owners) == (["x", "y"], [0, 1, 0])


def test_numbers_that_do_not_match_and_unreadable_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("first\nsecond")
    with pytest.raises(UserError, match="is no folder of pictures"):
        read_pictures(tmp_path / "nowhere", tmp_path / "p.txt")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    with pytest.raises(UserError, match="holds no picture"):
        read_pictures(pictures, tmp_path / "p.txt")
    for name in "abc":
        save(pictures, f"{name}.png", 0)
    with pytest.raises(UserError, match="holds 3 pictures for the 2 prompts"):
        read_pictures(pictures, tmp_path / "p.txt")
    (pictures / "d.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(UserError, match=r"cannot open the picture .*d\.png"):
        read_pictures(pictures, tmp_path / "p.txt")
    (tmp_path / "p.csv").write_text("prompt,image\nx,z.png\n")
    with pytest.raises(UserError, match=r"z\.png: there is no such file"):
        read_pictures(pictures, tmp_path / "p.csv")
