"""Reads prompts from files, and existing images with the prompts that they belong to.

A prompt file is plain text with a prompt per line, a JSON list of texts, or a table (CSV, TSV, JSON lines, a JSON list of
objects, Parquet) with a column `prompt`. Other columns are ignored, except the one that names the images where images are read.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from alignbench.errors import UserError
from alignbench.files.images import SUFFIXES, ImageFiles, list_images
from alignbench.files.paths import local_path
from alignbench.files.text import excerpt, prompt_identity
from alignbench.files.text_files import Table, read_table, stripped

T = TypeVar("T")

PROMPT = ("prompt", "caption", "text")
"""Headings of the column of prompts, in any case; the first one is preferred."""
IMAGE = (
    *("image", "image_file", "image_path", "image_name", "image_file_name", "image_file_path"),
    *("file", "file_name", "file_path", "path", "picture", "img", "img_path"),
)
"""Headings of the column that names each row's image, in any case and with any separator between words; the first one is
preferred."""


@dataclass(frozen=True)
class PromptedImages:
    """Images with their prompts.

    Attributes:
        images: the images, of any sizes; each is opened when it is scored.
        prompts: the distinct prompts.
        owners: for each image, the index of its prompt.
    """

    images: ImageFiles
    prompts: list[str]
    owners: list[int]


def read_prompts(file: Path, *, pipe: bool = True) -> list[str]:
    """Reads the prompts of a file, in its order, without white space at their ends.

    Args:
        file: the prompt file.
        pipe: whether a pipe such as /dev/stdin is read too, waiting for it.

    Raises:
        UserError: the file cannot be read, has no column `prompt`, has entries that are not text, or has no prompt.
    """
    table = _read_table(file, pipe)
    return table.texts(table.require(*PROMPT))


def read_image_folder(folder: Path, prompts_file: Path) -> PromptedImages:
    """Reads the images of a folder with their prompts.

    A table with a column `image` (or another of `IMAGE`) names each image's file, relative to the folder. Otherwise the
    folder's images are sorted by name, with numbers by their value (2.png before 10.png), and divided among the rows in order,
    with an equal number for each row. Rows with the same prompt are combined.

    Args:
        folder: the folder of images.
        prompts_file: the prompt file.

    Raises:
        UserError: the folder has no images, the numbers of images and prompts do not match, or an image cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of images")
    table = _read_table(prompts_file, pipe=True)
    rows = table.texts(table.require(*PROMPT))
    named = table.find(*IMAGE)
    if named is not None:
        files, owners = [local_path(name, folder) for name in table.texts(named)], list(range(len(rows)))
    else:
        files = list_images(folder)
        if not files:
            raise UserError(f"{folder} holds no image ({', '.join(SUFFIXES)})")
        if len(files) % len(rows):
            raise UserError(
                f"{folder} holds {len(files)} images for the {len(rows)} prompts of {prompts_file}; each prompt needs "
                "the same number, or a table whose column `image` names the file of each row"
            )
        _refuse_another_order(table, files)
        owners = [i // (len(files) // len(rows)) for i in range(len(files))]
    prompts, owners = same_prompts_together(rows, owners)
    return PromptedImages(ImageFiles(files), prompts, owners)


def same_prompts_together(prompts: Sequence[str], owners: Sequence[int]) -> tuple[list[str], list[int]]:
    """Combines prompts that differ only in case and blanks, so that they count once in means over prompts.

    Args:
        prompts: the prompts.
        owners: for each image, the index of its prompt.

    Returns:
        The distinct prompts, and the index of each image's prompt among them.
    """
    first = {prompt_identity(prompt): i for i, prompt in reversed(list(enumerate(prompts)))}
    kept = sorted(first.values())
    number = {i: k for k, i in enumerate(kept)}
    return [prompts[i] for i in kept], [number[first[prompt_identity(prompts[owner])]] for owner in owners]


def interleaved(lists: Sequence[list[T]]) -> list[T]:
    """Merges lists by taking one item of each in turn, so that any first part of the result has some of each list."""
    longest = max(len(items) for items in lists)
    return [items[i] for i in range(longest) for items in lists if i < len(items)]


def _read_table(file: Path, pipe: bool) -> Table:
    return read_table(file, "prompts", *PROMPT, lines=True, pipe=pipe)


def _refuse_another_order(table: Table, files: list[Path]) -> None:
    """Refuses to assign images to rows by order if the rows themselves name other images, or these in another order.

    Raises:
        UserError: a column of any heading, or the lines of a plain text, name images, and not these images in this order.
    """
    order = {name: i for i, file in enumerate(files) for name in (file.name, _number(file.stem))}
    prompts = table.require(*PROMPT)
    for heading in table.headings:
        try:
            values = table.values(heading)
        except UserError:  # a type that cannot be a name, such as the images' pixels
            continue
        if not all(isinstance(value, str | int) for value in values):
            continue
        names = [stripped(str(value)) for value in values]
        called = [order.get(name, order.get(_number(name), -1)) for name in names]
        if called == list(range(len(files))):
            continue
        are_these = heading != prompts and len(names) == len(files) and min(called) >= 0
        if are_these or all(map(_names_image, names)):
            raise UserError(
                f"{table.file} names images in its column {excerpt(heading)}, and not in the order of their names; pair them "
                "with prompts by a table with the columns 'image' and 'prompt', or remove the names"
            )


def _number(name: str) -> str:
    """Removes leading zeros of a name that is a number."""
    return name.lstrip("0") or "0" if name.isdecimal() else name


def _names_image(value: str) -> bool:
    """Tells whether a text is the name of an image, or begins or ends with one, as in a list `a.png: the prompt`."""
    parts = re.split(r"[\s,;:|]+", value)
    return any(part.strip("\"'").lower().endswith(SUFFIXES) for part in (parts[0], parts[-1]))
