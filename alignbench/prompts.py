"""Prompts from files, and pictures that were made elsewhere with the prompts they belong to.

A prompts file is plain text with a prompt a line, or a table (jsonl, csv, parquet) with a column `prompt`; further columns
are left alone, except `image` where pictures are read.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from alignbench.errors import UserError, did_you_mean

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
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
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
    return Pictures([_opened(file) for file in files], prompts, owners)


def interleaved(lists: Sequence[list[T]]) -> list[T]:
    """The lists' items in turns, until each is used up: any first part then has some of each."""
    longest = max(len(items) for items in lists)
    return [items[i] for i in range(longest) for items in lists if i < len(items)]


def _read_table(file: Path) -> "pd.DataFrame":
    """Columns `prompt` and, if it is there, `image`, all texts that are not empty."""
    import pandas as pd

    try:
        if file.suffix.lower() == ".csv":
            table = pd.read_csv(file, dtype=str, keep_default_na=False)
        elif file.suffix.lower() == ".jsonl":
            table = pd.read_json(file, lines=True, dtype=False, convert_dates=False, encoding="utf-8-sig")
        else:
            table = pd.read_parquet(file)
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise UserError(f"cannot read the prompts in {file}: {getattr(error, 'strerror', None) or error}") from None
    if "prompt" not in table:
        raise UserError(f"{file} has no column 'prompt'{did_you_mean('prompt', map(str, table.columns))}")
    if table.empty:
        raise UserError(f"{file} holds no prompt")
    table = table[[c for c in ("prompt", "image") if c in table]]
    for column in table:
        for row, value in enumerate(table[column], start=1):
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{file}, row {row}: {column!r} must be a text, got {value!r}")
    return table


def _natural(file: Path) -> list[tuple[int, str]]:
    """Parts of the name, so that 2 comes before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name) if part]


def _opened(file: Path) -> "Image.Image":
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            return image.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise UserError(f"cannot open the picture {file}: {reason}") from None
