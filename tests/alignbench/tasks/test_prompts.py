import json
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from alignbench import UserError
from alignbench.files.reading import read_table
from alignbench.tasks.prompts import interleaved, read_image_folder, read_prompts, same_prompts_together

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


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "\n\n", "holds no prompt"),
        ("p.jsonl", '{"promt": "a"}', "has no column 'prompt'; did you mean 'promt'"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}', "line 2: 'prompt' must be a text, got 3"),
        ("p.jsonl", "{", "cannot read the prompts in .* line 1 is damaged"),
        ("p.csv", "prompt,image\n", "holds no prompt"),
        ("p.csv", "prompt\n' '\n\"  \"\n", "line 3: 'prompt' is empty"),
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
    (tmp_path / "pictures" / "notes.txt").write_text("no image")
    (tmp_path / "p.txt").write_text("first\nsecond")
    found = read_image_folder(tmp_path / "pictures", tmp_path / "p.txt")
    assert found.images.load(range(4))[:, 0, 0, 0].tolist() == [1, 2, 9, 10]
    assert (found.prompts, found.owners) == (["first", "second"], [0, 0, 1, 1])


def test_a_column_names_each_picture_and_rows_of_one_prompt_belong_together(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / "pictures", f"{name}.png", ord(name))
    pd.DataFrame({"prompt": ["x", "y", "x"], "image": ["c.png", "a.png", "b.png"]}).to_csv(tmp_path / "p.csv", index=False)
    found = read_image_folder(tmp_path / "pictures", tmp_path / "p.csv")
    assert [chr(grey) for grey in found.images.load(range(3))[:, 0, 0, 0]] == ["c", "a", "b"]
    assert (found.prompts, found.owners) == (["x", "y"], [0, 1, 0])


def test_numbers_that_do_not_match_and_unreadable_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("first\nsecond")
    with pytest.raises(UserError, match="is not a folder of images"):
        read_image_folder(tmp_path / "nowhere", tmp_path / "p.txt")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    with pytest.raises(UserError, match="holds no image"):
        read_image_folder(pictures, tmp_path / "p.txt")
    for name in "abc":
        save(pictures, f"{name}.png", 0)
    with pytest.raises(UserError, match="holds 3 images for the 2 prompts"):
        read_image_folder(pictures, tmp_path / "p.txt")
    (pictures / "d.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(UserError, match=r"cannot open the image .*d\.png"):
        read_image_folder(pictures, tmp_path / "p.txt")
    (tmp_path / "p.csv").write_text("prompt,image\nx,z.png\n")
    with pytest.raises(UserError, match=r"z\.png: there is no such file"):
        read_image_folder(pictures, tmp_path / "p.csv")


def test_images_of_a_prompt_that_is_written_in_several_ways_belong_together() -> None:
    prompts, owners = same_prompts_together(["A cat", "a dog", "a  CAT", "a cow"], [0, 0, 1, 1, 2, 2, 3, 3])
    assert prompts == ["A cat", "a dog", "a cow"]
    assert owners == [0, 0, 1, 1, 0, 0, 2, 2]


ROWS = [("c.png", 'the word "SUN"'), ("a.png", 'the word "CAT"'), ("b.png", "one, two")]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in "abc":
        save(tmp_path / "pictures", f"{name}.png", ord(name))
    return tmp_path / "pictures"


def paired(pictures: Path, file: Path) -> list[tuple[str, str]]:
    found = read_image_folder(pictures, file)
    names = [f"{chr(grey)}.png" for grey in found.images.load(range(len(found.images)))[:, 0, 0, 0]]
    return [(name, found.prompts[owner]) for name, owner in zip(names, found.owners, strict=True)]


@pytest.mark.parametrize("heading", ["Image", " image ", "file", "filename", "file_name", "image_path", "Image Path", "path"])
@pytest.mark.parametrize("prompt", ["prompt", "Prompt", "caption", "text"])
def test_images_are_named_under_any_usual_heading(pictures: Path, tmp_path: Path, heading: str, prompt: str) -> None:
    pd.DataFrame(ROWS, columns=[heading, prompt]).to_csv(tmp_path / "p.csv", index=False)
    assert paired(pictures, tmp_path / "p.csv") == ROWS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", "bild,prompt\nc.png,x\na.png,y\nb.png,z\n"),
        ("p.csv", "id,prompt\nc,x\na,y\nb,z\n"),
        ("p.jsonl", '{"ref": "c.png", "prompt": "x"}\n{"ref": "a.png", "prompt": "y"}\n{"ref": "b.png", "prompt": "z"}'),
        ("p.txt", "c.png: x\na.png: y\nb.png: z\n"),
        ("p.txt", "x\tc.png\ny\ta.png\nz\tb.png\n"),
        ("p.csv", "file,path,prompt\nc.png,d/c.png,x\na.png,d/a.png,y\nb.png,d/b.png,z\n"),
    ],
)
def test_nothing_is_dealt_out_in_order_where_a_table_names_images_otherwise(
    pictures: Path, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"names images in its column|has the columns 'file' and 'path'"):
        read_image_folder(pictures, tmp_path / name)
    assert len(read_prompts(tmp_path / name)) == 3


def test_a_column_with_the_images_names_or_anything_else_does_no_harm(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("id,seed,prompt\na,3,x\nb,1,y\nc,2,1\n")
    assert paired(pictures, tmp_path / "p.csv") == [("a.png", "x"), ("b.png", "y"), ("c.png", "1")]


def test_numbers_of_rows_are_compared_with_those_of_files(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / "pictures", f"{number:03}.png", number)
    (tmp_path / "right.csv").write_text("id,prompt\n0,x\n1,y\n2,z\n")
    assert read_image_folder(tmp_path / "pictures", tmp_path / "right.csv").prompts == ["x", "y", "z"]
    (tmp_path / "wrong.jsonl").write_text(
        "\n".join(json.dumps({"id": i, "prompt": p}) for i, p in ((2, "x"), (0, "y"), (1, "z")))
    )
    with pytest.raises(UserError, match="names images in its column 'id'"):
        read_image_folder(tmp_path / "pictures", tmp_path / "wrong.jsonl")


def test_prompts_stand_beside_images_of_any_kind(pictures: Path, tmp_path: Path) -> None:
    for image in (None, ["x.png"], 7, {"bytes": "a" * 9000, "path": "x.png"}, ""):
        (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "image": image}))
        assert read_prompts(tmp_path / "p.jsonl") == ["a"]
        with pytest.raises(UserError, match=r"line 1: 'image' (is empty|must be a text)") as caught:
            read_image_folder(pictures, tmp_path / "p.jsonl")
        assert len(str(caught.value)) < 400
    pd.DataFrame({"prompt": ["a"], "image": [{"bytes": b"\xff" * 9000, "path": "x.png"}]}).to_parquet(tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == ["a"]
    with pytest.raises(UserError, match=r"the column 'image' holds struct<.*, not texts"):
        read_image_folder(pictures, tmp_path / "p.parquet")


def test_lines_of_one_prompt_belong_together(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("x\ny\nx \n")
    assert read_image_folder(pictures, tmp_path / "p.txt").owners == [0, 1, 0]
