"""Prompts from files, and images that were made elsewhere with the prompts they belong to.

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
"""Headings of the column of prompts, in any case; the first goes before the others."""
IMAGE = (
    *("image", "image_file", "image_path", "image_name", "image_file_name", "image_file_path"),
    *("file", "file_name", "file_path", "path", "picture", "img", "img_path"),
)
"""Headings of the column that names each row's image, in any case and with any sign between words; the first goes before."""


@dataclass(frozen=True)
class PromptedImages:
    """Images with their prompts.

    Attributes:
        images: of any sizes; opened one after the other when they are scored.
        prompts: the distinct entries that were asked for.
        owners: index of the prompt of each image.
    """

    images: ImageFiles
    prompts: list[str]
    owners: list[int]


def read_prompts(file: Path, *, pipe: bool = True) -> list[str]:
    """The prompts of a file, in its order, without blanks around them.

    Args:
        file: to read.
        pipe: also read something that is not a regular file, such as /dev/stdin, and wait for it.

    Raises:
        UserError: the file cannot be read, has no column `prompt`, has entries that are not text, or has no prompt.
    """
    table = _read_table(file, pipe)
    return table.texts(table.require(*PROMPT))


def read_image_folder(folder: Path, prompts_file: Path) -> PromptedImages:
    """The images of a folder with their prompts.

    A table with a column `image` (or another of `IMAGE`) names each image's file, relative to the folder. Otherwise the
    folder's images, sorted by name with numbers by their value (2.png before 10.png), are dealt out to the rows in order, an
    equal number to each. Rows of one prompt belong together.

    Raises:
        UserError: nothing is there, the numbers do not match, or an image cannot be read.
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


def _read_table(file: Path, pipe: bool) -> Table:
    return read_table(file, "prompts", *PROMPT, lines=True, pipe=pipe)


def _refuse_another_order(table: Table, files: list[Path]) -> None:
    """Refuses to deal out images to rows which say themselves, under whatever heading, which images are theirs.

    Raises:
        UserError: a column, or the lines of a plain text, names images, and not just these in this order.
    """
    order = {name: i for i, file in enumerate(files) for name in (file.name, _number(file.stem))}
    prompts = table.require(*PROMPT)
    for heading in table.headings:
        try:
            values = table.values(heading)
        except UserError:  # of a type that names nothing, such as the images' pixels
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
                "with prompts by a table with the columns 'image' and 'prompt', or leave out what names no image of theirs"
            )


def _number(name: str) -> str:
    """Without leading zeros, where a name is a number."""
    return name.lstrip("0") or "0" if name.isdecimal() else name


def _names_image(value: str) -> bool:
    """Whether a text is the name of an image, or begins or ends with one, as in a list `a.png: the prompt`."""
    parts = re.split(r"[\s,;:|]+", value)
    return any(part.strip("\"'").lower().endswith(SUFFIXES) for part in (parts[0], parts[-1]))
