"""Reads all images: whatever a file holds, the result is RGB with 8 bits per channel.

An image is read as a viewer shows it: rotated by its EXIF tag, 16-bit values scaled, transparent pixels over white. Colour
values are interpreted as sRGB, and embedded colour profiles are not applied. No other module calls `Image.open`.
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
"""Formats that Pillow decodes itself. Formats that it passes to other programs, such as EPS to Ghostscript, must not be
added."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Suffixes of files that count as images when a folder is listed. The content decides how a file is read."""
MAX_PIXELS = 100_000_000
"""Largest number of pixels of one image, which the header tells before the image is decompressed."""
MAX_BYTES = 2**30
"""Largest size of one file."""
PART_IMAGES, PART_PIXELS = 256, 2**25
"""Largest number of images, and of pixels, that are in memory at a time."""
BACKGROUND = (255, 255, 255)
"""Colour behind transparent pixels."""

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
"""PNG chunks that can have any length and do not affect the result."""


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name with numbers by their value (2.png before 10.png).

    Hidden files are left out: macOS leaves `._1.png` beside `1.png` on foreign disks.
    """
    files = [f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")]
    return sorted(files, key=lambda file: (_natural(file.name), file.name))


def open_image(file: Path) -> Image.Image:
    """Reads an image file as an image in mode RGB, as a viewer shows it.

    Raises:
        UserError: the file is not a regular file, does not have one of FORMATS, is damaged, an animation or too large, or has
            no 8-bit equivalent. The message names the file.
    """
    try:
        return decode_image(_read(file))
    except UserError as error:
        raise UserError(f"cannot open the image {file}: {error}") from None


def decode_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Decodes the bytes of an image file into an image in mode RGB.

    Raises:
        UserError: as for `open_image`, but the message is only the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _opened(data, formats) as image:
                if getattr(image, "is_animated", False) and image.format != "MPO":  # of an MPO, viewers show one
                    raise UserError("it holds several images; save a single one")
                _correct_transparency(image, data)
                return as_rgb(image)
    except UserError:
        raise
    except Exception as error:  # decoders raise various errors for damaged files
        raise UserError(_reason(error, formats)) from None


def image_size(data: bytes, formats: tuple[str, ...] = FORMATS) -> tuple[int, int]:
    """Width and height from the header, before anything is decompressed or rotated; raises as `decode_image`."""
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
    """Converts a Pillow image of any mode to RGB, rotated by its EXIF tag, with white behind transparent pixels.

    Raises:
        UserError: it is unknown which of its values are black and white.
    """
    image.load()  # first, because the tag may follow the pixels
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
    """Image files that are opened each time they are used, so that memory does not grow with their number.

    Attributes:
        files: the files.
        sizes: width and height of each. Every file is decoded once for them, so a damaged file is reported at the start.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self.sizes = [open_image(file).size for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def parts(self) -> list[list[int]]:
        """The indices of all images, in parts of at least one and at most PART_IMAGES images, with at most PART_PIXELS
        pixels."""
        parts: list[list[int]] = []
        pixels = 0
        for i, (width, height) in enumerate(self.sizes):
            pixels += width * height
            if not parts or len(parts[-1]) == PART_IMAGES or pixels > PART_PIXELS:
                parts.append([])
                pixels = width * height
            parts[-1].append(i)
        return parts

    def load(self, indices: Sequence[int]) -> np.ndarray:
        """Loads some of the images: uint8 [N, H, W, 3], or an object array [N] if their sizes differ.

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
    """A sort key for a name, so that 2 comes before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _read(file: Path) -> bytes:
    """Reads a regular file; a pipe or a device is refused without waiting for it."""
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
    except (OSError, ValueError) as error:  # ValueError: a name that a file cannot have
        raise UserError(str(getattr(error, "strerror", None) or error)) from None


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def _opened(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Opens an image and reads only its header."""
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
    """Removes the texts and the colour profile of a PNG, which Pillow would decompress; other data is unchanged."""
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
    """Converts a PNG's transparent colour to the scale of the decoded values.

    Pillow scales grey values of 2 and 4 bits to 8 bits and cuts colours of 16 bits to 8 bits, but not the transparent colour.
    """
    if image.format != "PNG" or "transparency" not in image.info:
        return
    depth = data[len(_PNG) + 16]
    transparent = image.info["transparency"]
    if image.mode == "L" and depth in (2, 4):
        image.info["transparency"] = transparent * 255 // (2**depth - 1)
    if image.mode == "RGB" and depth == 16:
        raise UserError("it has a transparent colour with 16 bits per channel; save it with an alpha channel, or with 8 bits")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # viewers ignore a damaged tag as well
        return 1


def _grey(image: Image.Image) -> np.ndarray:
    """Converts a grey image with 16 bits, or with floats from 0 to 1, to uint8 [H, W]; a transparent value becomes white."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise UserError("its floats are not all in 0..1, so that black and white are unknown; save it with 8 bits")
        share = values.astype(np.float64)
    else:
        if image.mode == "I" and image.format != "PNG":  # older versions of Pillow open a 16-bit PNG in this mode
            raise UserError("its values have 32 bits or a sign, so that black and white are unknown; save it with 8 bits")
        bits = tags.get(_BITS_PER_SAMPLE, (16,))
        share = values.astype(np.float64) / (2 ** int(bits[0]) - 1)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        share = 1 - share
    grey = np.round(255 * share.clip(0, 1)).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = BACKGROUND[0]
    return grey
