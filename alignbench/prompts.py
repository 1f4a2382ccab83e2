"""Prompts from files, and pictures that were made elsewhere with the prompts they belong to.

A prompts file is plain text with a prompt a line, or a table (jsonl, csv, parquet) with a column `prompt`; further columns
are left alone, except `image` where pictures are read.
"""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from alignbench.errors import UserError, did_you_mean
from alignbench.text import prompt_identity

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

T = TypeVar("T")

TABLES = (".jsonl", ".csv", ".parquet")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Pictures:
    """Pictures with their prompts.

    Attributes:
        images: PIL images of any size and mode.
        prompts: the distinct entries that were asked for.
        owners: index of the prompt of each picture.
    """

    images: list["Image.Image"]
    prompts: list[str]
    owners: list[int]


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file, in its order.

    Raises:
        UserError: the file cannot be read, has no column `prompt`, holds something else than texts there, or no prompt.
    """
    if file.suffix.lower() in TABLES:
        return [str(p) for p in _read_table(file)["prompt"]]
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, ValueError) as error:  # no UTF-8, or a name that no file has
        raise UserError(f"cannot read the prompts in {file}: {getattr(error, 'strerror', None) or error}") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"{file} holds no prompt")
    return prompts


def read_pictures(folder: Path, prompts_file: Path) -> Pictures:
    """The pictures of a folder with their prompts.

    A table with a column `image` names each picture's file, relative to the folder; rows of one prompt belong together.
    Otherwise the folder's pictures, sorted by name with numbers by their value (2.png before 10.png), are dealt out to the
    prompts in order, an equal number to each.

    Raises:
        UserError: nothing is there, the numbers do not match, or a picture cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of pictures")
    if prompts_file.suffix.lower() in TABLES and "image" in (table := _read_table(prompts_file)):
        files = [folder / str(name) for name in table["image"]]
        prompts = list(dict.fromkeys(table["prompt"]))
        index = {prompt: i for i, prompt in enumerate(prompts)}
        owners = [index[prompt] for prompt in table["prompt"]]
    else:
        prompts = read_prompts(prompts_file)
        files = sorted((f for f in folder.iterdir() if f.suffix.lower() in PICTURES), key=_natural)
        if not files:
            raise UserError(f"{folder} holds no picture ({', '.join(PICTURES)})")
        if len(files) % len(prompts):
            raise UserError(
                f"{folder} holds {len(files)} pictures for the {len(prompts)} prompts of {prompts_file}; each prompt needs "
                "the same number, or a table whose column `image` names the file of each row"
            )
        owners = [i // (len(files) // len(prompts)) for i in range(len(files))]
    prompts, owners = same_prompts_together(prompts, owners)
    return Pictures([_opened(file) for file in files], prompts, owners)


def same_prompts_together(prompts: Sequence[str], owners: Sequence[int]) -> tuple[list[str], list[int]]:
    """One entry for prompts that differ in case and blanks alone, else they would count as several in means over prompts.

    Args:
        owners: index into `prompts` of each image.
    """
    first = {prompt_identity(prompt): i for i, prompt in reversed(list(enumerate(prompts)))}
    kept = sorted(first.values())
    number = {i: k for k, i in enumerate(kept)}
    return [prompts[i] for i in kept], [number[first[prompt_identity(prompts[owner])]] for owner in owners]


def interleaved(lists: Sequence[list[T]]) -> list[T]:
    """The lists' items in turns, until each is used up: any first part then has some of each."""
    longest = max(len(items) for items in lists)
    return [items[i] for i in range(longest) for items in lists if i < len(items)]


def _read_table(file: Path) -> "pd.DataFrame":
    """Columns `prompt` and, if it is there, `image`, all texts that are not empty."""
    import pandas as pd

    try:
        if file.suffix.lower() == ".csv":
            table = _read_csv(file)
        elif file.suffix.lower() == ".jsonl":
            lines = file.read_text(encoding="utf-8-sig").split("\n")
            table = pd.DataFrame([json.loads(line) for line in lines if line.strip()])
        else:
            table = pd.read_parquet(file).astype(object)  # else texts are decoded, or not, when they are looked at
    except Exception as error:  # whatever a damaged file makes its reader raise
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"cannot read the prompts in {file}: {why}") from None
    if "prompt" not in table:
        raise UserError(f"{file} has no column 'prompt'{did_you_mean('prompt', map(str, table.columns))}")
    if table.empty:
        raise UserError(f"{file} holds no prompt")
    table = table[[c for c in ("prompt", "image") if c in table]]
    for column in table:
        for row, value in enumerate(table[column], start=1):
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{file}, row {row}: {column!r} must be a text, got {value!r}")
            if not value.isascii() and value.encode(errors="ignore").decode() != value:
                raise UserError(f"{file}, row {row}: {column!r} is no valid Unicode: {value!r}")
    return table


def _read_csv(file: Path) -> "pd.DataFrame":
    """All texts, as they are. pandas' own reader takes what is before a comma too many for the name of the row."""
    import pandas as pd

    with file.open(encoding="utf-8-sig", newline="") as opened:
        head, *rows = [row for row in csv.reader(opened, strict=True) if row] or [[]]
    if len(set(head)) < len(head):
        raise ValueError("two columns have one name")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(head):
            raise ValueError(f"row {number} has {len(row)} fields and the head {len(head)}; a comma in a text needs quotes")
    return pd.DataFrame(rows, columns=head)


def _natural(file: Path) -> list[tuple[int, str]]:
    """Parts of the name, so that 2 comes before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name) if part]


def _opened(file: Path) -> "Image.Image":
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            return image.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise UserError(f"cannot open the picture {file}: {reason}") from None
