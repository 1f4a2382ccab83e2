"""The one door through which images come in: whatever a file holds, what leaves here is RGB with 8 bits a channel.

An image is what a viewer shows: turned as its EXIF tag says, 16-bit values scaled, transparent pixels over white. Colour
values are taken as sRGB; embedded colour profiles are not applied. No other module calls `Image.open`.
"""

import io
import os
import re
import stat
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from alignbench.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Pillow decodes these itself; what it hands to other programs, as it does EPS to Ghostscript, must never be among them."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Of the files that count as images when a folder is listed. What a file really is, its content says."""
MAX_PIXELS = 100_000_000
"""Of one image; known from its header before it is decompressed."""
MAX_BYTES = 2**30
"""Of one file."""
PART_IMAGES, PART_PIXELS = 256, 2**25
"""Of many files: what is held in memory at a time."""
BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels."""

_ORIENTATION = 0x0112
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_PNG = b"\x89PNG\r\n\x1a\n"
_NOTES = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""PNG chunks of any length that do not change what is shown here."""


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name with numbers by their value (2.png before 10.png).

    Hidden files are none of them: `._1.png` is what macOS leaves beside `1.png` on foreign disks.
    """
    files = [f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")]
    return sorted(files, key=lambda file: (_natural(file.name), file.name))


def open_image(file: Path) -> Image.Image:
    """An image file in mode RGB, as a viewer shows it.

    Raises:
        UserError: it is not a regular file, none of FORMATS, damaged, an animation, too large, or has no 8-bit equivalent.
            The sentence names the file.
    """
    try:
        return decode_image(_read(file))
    except UserError as error:
        raise UserError(f"cannot open the image {file}: {error}") from None


def decode_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """An image in mode RGB from the bytes of its file.

    Raises:
        UserError: as `open_image`; the sentence is the reason alone.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _opened(data, formats) as image:
                if getattr(image, "is_animated", False) and image.format != "MPO":  # whose other images viewers do not show
                    raise UserError("it holds several images; save the one that is meant by itself")
                _correct_transparency(image, data)
                return as_rgb(image)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes its decoder raise
        raise UserError(_reason(error, formats)) from None


def image_size(data: bytes, formats: tuple[str, ...] = FORMATS) -> tuple[int, int]:
    """Width and height as the header says, before anything is decompressed or turned; raises as `decode_image`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _opened(data, formats) as image:
                return image.size
    except UserError:
        raise
    except Exception as error:
        raise UserError(_reason(error, formats)) from None


def as_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode as RGB: turned as its EXIF tag says, over white where it is transparent.

    Raises:
        UserError: its values have no known black and white.
    """
    image.load()  # first: the tag may stand behind the pixels
    turn = _TURNED.get(_orientation(image))
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        shown = Image.fromarray(_grey(image)).convert("RGB")
    elif image.has_transparency_data:
        straight = image.convert("LA") if image.mode == "La" else image
        rgba = straight.convert("RGBA")
        shown = Image.alpha_composite(Image.new("RGBA", rgba.size, (*BACKGROUND, 255)), rgba).convert("RGB")
    else:
        shown = image.convert("RGB")
    return shown if turn is None else shown.transpose(turn)


class ImageFiles:
    """Image files that are opened anew whenever they are asked for, so that memory does not grow with their number.

    Attributes:
        sizes: width and height of each. To know them every file is decoded once, so that a damaged one is told at once.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self.sizes = [open_image(file).size for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def parts(self) -> list[list[int]]:
        """The indices of all, in parts of at most PART_IMAGES images and PART_PIXELS pixels, but of one image at least."""
        found: list[list[int]] = []
        pixels = 0
        for i, (width, height) in enumerate(self.sizes):
            pixels += width * height
            if not found or len(found[-1]) == PART_IMAGES or pixels > PART_PIXELS:
                found.append([])
                pixels = width * height
            found[-1].append(i)
        return found

    def load(self, indices: Sequence[int]) -> np.ndarray:
        """Some of them: uint8 [N, H, W, 3], or an array of objects [N] where sizes differ.

        Raises:
            UserError: a file has changed since it was first read.
        """
        sizes = [self.sizes[i] for i in indices]
        alike = len(set(sizes)) == 1
        loaded = np.empty((len(indices), sizes[0][1], sizes[0][0], 3), np.uint8) if alike else np.empty(len(indices), object)
        for place, (i, (width, height)) in enumerate(zip(indices, sizes, strict=True)):
            array = np.asarray(open_image(self.files[i]))
            if array.shape[:2] != (height, width):
                raise UserError(f"the image {self.files[i]} has changed while it was being scored")
            loaded[place] = array
        return loaded


def _natural(name: str) -> list[tuple[int, str]]:
    """Parts of the name, so that 2 comes before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _read(file: Path) -> bytes:
    """The content of a regular file; a pipe or a device is refused without waiting for it."""
    try:
        with open(file, "rb", buffering=0, opener=_without_waiting) as opened:
            about = os.fstat(opened.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise UserError("it is not a regular file")
            if about.st_size > MAX_BYTES:
                raise UserError(f"it has {about.st_size:,} bytes, more than {MAX_BYTES:,}")
            return opened.readall()
    except FileNotFoundError:
        raise UserError("there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file has
        raise UserError(str(getattr(error, "strerror", None) or error)) from None


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def _opened(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """The image, of which only the header has been read."""
    image = Image.open(io.BytesIO(_without_notes(data)), formats=formats)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    return image


def _reason(error: Exception, formats: tuple[str, ...]) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {MAX_PIXELS:,} pixels; scale it down"
    if isinstance(error, UnidentifiedImageError):
        return f"it is damaged, or not one of the formats {', '.join(formats)}"
    return str(error) or type(error).__name__


def _without_notes(data: bytes) -> bytes:
    """A PNG without its texts and colour profile, which Pillow would unfold; anything else as it is."""
    if not data.startswith(_PNG) or not any(kind in data for kind in _NOTES):
        return data
    kept, start = [data[: len(_PNG)]], len(_PNG)
    while start + 8 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] not in _NOTES:
            kept.append(data[start:end])
        start = end
    return b"".join([*kept, data[start:]])


def _correct_transparency(image: Image.Image, data: bytes) -> None:
    """Makes a PNG's transparent colour one of the values that Pillow decodes to.

    Pillow widens grey of 2 and 4 bits to 8 and cuts colours of 16 bits to 8, but leaves the transparent colour as it stands.
    """
    if image.format != "PNG" or "transparency" not in image.info:
        return
    depth = data[len(_PNG) + 16]
    transparent = image.info["transparency"]
    if image.mode == "L" and depth in (2, 4):
        image.info["transparency"] = transparent * 255 // (2**depth - 1)
    if image.mode == "RGB" and depth == 16:
        raise UserError("it has a transparent colour at 16 bits a channel; save it with an alpha channel, or with 8 bits")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged tag turns nothing, in viewers too
        return 1


def _grey(image: Image.Image) -> np.ndarray:
    """uint8 [H, W] of a grey image with 16 bits, or with floats in 0..1; a transparent value is white."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise UserError("its floats are not all in 0..1, so that black and white are unknown; save it with 8 bits")
        share = values.astype(np.float64)
    else:
        if image.mode == "I" and image.format != "PNG":  # as which older Pillows open a PNG of 16 bits
            raise UserError("its values have 32 bits or a sign, so that black and white are unknown; save it with 8 bits")
        bits = tags.get(_BITS_PER_SAMPLE, (16,))
        share = values.astype(np.float64) / (2 ** int(bits[0]) - 1)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        share = 1 - share
    grey = np.round(255 * share.clip(0, 1)).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = BACKGROUND[0]
    return grey
