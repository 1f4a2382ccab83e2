"""What a viewer shows is what comes through the door, or one sentence says why not."""

import ast
import io
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from alignbench import UserError
from alignbench.files import images
from alignbench.files.images import ImageFiles, decode_image, image_size, list_images, open_image
from alignbench.scorer import as_arrays
from tests.support.properties import one_sentence_at_most

ROOT = Path(__file__).parents[3]
SHADES = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
COLORS = np.stack([SHADES, SHADES[::-1], 255 - SHADES], axis=2)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG written by hand; `rows` without filter bytes."""
    stride = len(rows) // height
    raw = b"".join(b"\0" + rows[stride * y : stride * (y + 1)] for y in range(height))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_no_other_module_opens_images() -> None:
    """Nor do others of its readers come in by a side door."""
    for folder in ("alignbench", "evals", "objectives", "samplers"):
        for file in (ROOT / folder).rglob("*.py"):
            calls = [n.func for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
            opened = [ast.unparse(call) for call in calls if ast.unparse(call).endswith(("Image.open", "imread", "Image.load"))]
            assert not opened or file.name == "images.py", f"{file} calls {opened}"


# Each turns what is shown back into what is stored.
STORED = {
    1: COLORS,
    2: COLORS[:, ::-1],
    3: COLORS[::-1, ::-1],
    4: COLORS[::-1],
    5: COLORS.transpose(1, 0, 2),
    6: COLORS.transpose(1, 0, 2)[::-1],
    7: COLORS.transpose(1, 0, 2)[::-1, ::-1],
    8: COLORS.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_an_image_is_turned_as_its_exif_tag_says(kind: str) -> None:
    exact: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    for tag, stored in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        shown = pixels(encoded(Image.fromarray(stored.copy()), kind, exif=exif, **exact.get(kind, {}))).astype(int)
        assert shown.shape == COLORS.shape, tag
        assert np.abs(shown - COLORS).max() <= (4 if kind == "JPEG" else 0), tag


def test_a_damaged_or_unknown_exif_tag_turns_nothing() -> None:
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0\0\0\0\0"):
        assert pixels(encoded(Image.fromarray(COLORS), "PNG", exif=exif)).tolist() == COLORS.tolist()


def test_an_image_in_memory_is_turned_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = Image.open(io.BytesIO(encoded(Image.fromarray(STORED[6].copy()), "PNG", exif=exif)))
    assert as_arrays([opened])[0].tolist() == COLORS.tolist()


SIXTEEN = SHADES.astype(np.uint16) * 257
"""The same shades with 16 bits: 255 is 65535."""
GREY = {
    "png": encoded(Image.fromarray(SIXTEEN), "PNG"),
    "tiff": encoded(Image.fromarray(SIXTEEN), "TIFF"),
    "tiff, compressed": encoded(Image.fromarray(SIXTEEN), "TIFF", compression="tiff_lzw"),
    "tiff, big-endian": encoded(Image.frombytes("I;16B", (6, 4), SIXTEEN.astype(">u2").tobytes()), "TIFF"),
    "tiff, white is zero": encoded(Image.fromarray(65535 - SIXTEEN), "TIFF", tiffinfo={262: 0}),
    "tiff, floats": encoded(Image.fromarray((SHADES / 255).astype(np.float32)), "TIFF"),
    "png, with alpha": png(6, 4, 16, 4, np.stack([SIXTEEN, np.full_like(SIXTEEN, 65535)], 2).astype(">u2").tobytes()),
    "png, colours": png(6, 4, 16, 2, np.repeat(SIXTEEN[..., None], 3, 2).astype(">u2").tobytes()),
}  # fmt: skip


@pytest.mark.parametrize("data", GREY.values(), ids=GREY)
def test_sixteen_bits_and_floats_are_scaled(data: bytes) -> None:
    assert pixels(data).tolist() == np.repeat(SHADES[..., None], 3, 2).tolist()


def test_values_are_rounded() -> None:
    """128 of 65535 is 0.498 of 255, and 129 is 0.502."""
    assert pixels(encoded(Image.fromarray(np.array([[128, 129]], np.uint16)), "PNG"))[0, :, 0].tolist() == [0, 1]


def test_values_without_a_known_white_are_refused() -> None:
    for values in (np.array([[0, 255]], np.float32), np.array([[0, np.nan]], np.float32), np.array([[-0.1, 1]], np.float32)):
        with pytest.raises(UserError, match=r"floats are not all in 0\.\.1"):
            decode_image(encoded(Image.fromarray(values), "TIFF"))
    with pytest.raises(UserError, match="32 bits or a sign"):
        decode_image(encoded(Image.fromarray(np.array([[0, 70000]], np.int32)), "TIFF"))


def test_twelve_bits_are_scaled_by_their_own_white() -> None:
    """Two pixels of a TIFF in three bytes: 0x000 and 0xFFF."""
    tags = [(256, 4, 2), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 4, 1), (279, 4, 3)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    data = b"II*\0" + struct.pack("<I", 12) + b"\x00\x0f\xff\0" + struct.pack("<H", len(tags)) + entries + b"\0" * 4
    assert pixels(data)[0, :, 0].tolist() == [0, 255]


def palette(*colors: tuple[int, int, int]) -> bytes:
    return chunk(b"PLTE", bytes(sum(colors, ())))


def clear(*values: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


RED, BLUE = (255, 0, 0), (0, 0, 255)
HIDDEN = {  # two pixels, of which the first is transparent and the second is not
    "grey, 1 bit": (png(2, 1, 1, 0, b"\x40", clear(0)), 255),
    "grey, 1 bit, white": (png(2, 1, 1, 0, b"\x80", clear(1)), 0),
    "grey, 2 bits": (png(2, 1, 2, 0, b"\x60", clear(1)), 170),
    "grey, 4 bits": (png(2, 1, 4, 0, b"\x35", clear(3)), 85),
    "grey, 8 bits": (png(2, 1, 8, 0, b"\x07\x08", clear(7)), 8),
    "grey, 16 bits": (png(2, 1, 16, 0, struct.pack(">HH", 2570, 2571), clear(2570)), 10),
    "grey with alpha": (png(2, 1, 8, 4, b"\x07\x00\x08\xff"), 8),
    "grey with alpha, 16 bits": (png(2, 1, 16, 4, struct.pack(">4H", 9, 0, 2570, 65535)), 10),
    "colours": (png(2, 1, 8, 2, bytes((*RED, *BLUE)), clear(*RED)), BLUE),
    "colours with alpha": (png(2, 1, 8, 6, bytes((*RED, 0, *BLUE, 255))), BLUE),
    "colours with alpha, 16 bits": (png(2, 1, 16, 6, struct.pack(">8H", 65535, 0, 0, 0, 0, 0, 65535, 65535)), BLUE),
    "palette": (png(2, 1, 8, 3, b"\x00\x01", palette(RED, BLUE), chunk(b"tRNS", b"\x00")), BLUE),
    "palette, second entry": (png(2, 1, 4, 3, b"\x10", palette(BLUE, RED), chunk(b"tRNS", b"\xff\x00")), BLUE),
    "gif": (encoded(Image.open(io.BytesIO(png(2, 1, 8, 3, b"\x00\x01", palette(RED, BLUE)))), "GIF", transparency=0), BLUE),
    "webp": (encoded(Image.fromarray(np.array([[[*RED, 0], [*BLUE, 255]]], np.uint8)), "WEBP", lossless=True), BLUE),
    "tiff": (encoded(Image.fromarray(np.array([[[*RED, 0], [*BLUE, 255]]], np.uint8)), "TIFF"), BLUE),
}  # fmt: skip


@pytest.mark.parametrize(("data", "seen"), HIDDEN.values(), ids=HIDDEN)
def test_hidden_colours_are_not_seen(data: bytes, seen: int | tuple[int, int, int]) -> None:
    assert pixels(data)[0].tolist() == [[255] * 3, list(seen) if isinstance(seen, tuple) else [seen] * 3]


def test_half_transparent_pixels_are_blended_with_white() -> None:
    for mode in ("RGBA", "LA", "RGBa"):
        image = Image.new("RGBA", (1, 1), (0, 0, 0, 51)).convert(mode)
        assert as_arrays([image])[0].tolist() == [[[204] * 3]], mode  # 255 (1 - 51 / 255)


def test_a_transparent_colour_that_cannot_be_told_is_refused() -> None:
    with pytest.raises(UserError, match="transparent colour with 16 bits"):
        decode_image(png(1, 1, 16, 2, struct.pack(">3H", 1, 2, 3), clear(1, 2, 3)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "PA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (2, 3), "white")
    made = image.convert("L").convert("LA").convert("PA") if mode == "PA" else image.convert(mode)
    assert np.abs(as_arrays([made])[0].astype(int) - np.full((3, 2, 3), 255)).max() <= (1 if mode == "LAB" else 0)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt"])
def test_texts_of_any_length_are_passed_over(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses more than a megabyte of one text and 64 of all."""
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1000)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 5000)
    for after in (False, True):
        notes = PngImagePlugin.PngInfo()
        for i in range(4):
            add = notes.add_itxt if kind == "iTXt" else notes.add_text
            add(f"workflow {i}", "x" * 3000, zip=kind != "tEXt")
            notes.chunks = [(*c[:2], after) for c in notes.chunks]
        assert pixels(encoded(Image.fromarray(COLORS), "PNG", pnginfo=notes)).tolist() == COLORS.tolist()


def test_a_text_hides_no_end() -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("a", "b")
    data = encoded(Image.fromarray(COLORS), "PNG", pnginfo=notes)
    for end in (len(data) - 30, data.index(b"tEXt") + 2, data.index(b"tEXt") + 5):
        with pytest.raises(UserError):
            decode_image(data[:end])


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_and_several_pages_are_refused(kind: str) -> None:
    with pytest.raises(UserError, match="several images"):
        decode_image(animation(kind))
    assert pixels(encoded(Image.new("RGB", (4, 4), "red"), kind))[0, 0, 0] > 250


def test_of_a_photograph_with_a_second_view_the_first_is_shown() -> None:
    assert pixels(animation("MPO"))[0, 0].tolist() == pytest.approx([255, 0, 0], abs=3)


def test_an_image_above_the_limit_is_refused_by_its_header(tmp_path: Path) -> None:
    """One that nobody could unfold: 10 ** 18 pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 10**9, 10**9, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    for width, height in ((10**9, 10**9), (10_001, 10_000)):
        (tmp_path / "bomb.png").write_bytes(data.replace(struct.pack(">II", 10**9, 10**9), struct.pack(">II", width, height)))
        for look in (open_image, lambda file: image_size(file.read_bytes())):
            with pytest.raises(UserError):
                look(tmp_path / "bomb.png")
    width, height = 10_001, 10_000
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(UserError, match=r"cannot open the image .*bomb\.png: it has more than 100,000,000 pixels"):
        open_image(tmp_path / "bomb.png")


def test_a_file_above_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    Image.fromarray(COLORS).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="bytes, more than 10"):
        open_image(tmp_path / "a.png")


def test_nothing_but_regular_files_is_read(tmp_path: Path) -> None:
    """A pipe would wait for ever, a device give without end."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "not there")
    (tmp_path / "empty.png").touch()
    for name, reason in {
        "pipe.png": "not a regular file",
        "zero.png": "not a regular file",
        "folder.png": "Is a directory",
        "nowhere.png": "there is no such file",
        "empty.png": "it is damaged, or not one of the formats PNG, JPEG",
        "a\0b.png": "null byte",
        f"{'a' * 300}.png": "name too long",
    }.items():
        with pytest.raises(UserError, match=f"(?i)cannot open the image .*: .*{reason}"):
            open_image(tmp_path / name)


def test_no_other_program_is_run_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert shutil.which("gs") == str(tmp_path / "gs")
    eps = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "1.png").write_text(eps)
    with pytest.raises(UserError, match="not one of the formats PNG, JPEG"):
        open_image(tmp_path / "1.png")
    assert not (tmp_path / "ran").exists()


def test_a_folder_lists_images_alone_by_number(tmp_path: Path) -> None:
    others = "._2.png", ".hidden.png", ".DS_Store", "Thumbs.db", "desktop.ini", "a.txt"
    for name in ("10.png", "2.JPG", "1.gif", "1.PNG", "01.png", *others):
        (tmp_path / name).touch()
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "3.png").touch()
    assert [file.name for file in list_images(tmp_path)] == ["1.PNG", "1.gif", "01.png", "2.JPG", "10.png"]


def test_files_are_opened_one_after_the_other(tmp_path: Path) -> None:
    for i, size in enumerate([(4, 2), (4, 2), (3, 5)]):
        Image.new("RGB", size, (i, 0, 0)).save(tmp_path / f"{i}.png")
    found = ImageFiles(list_images(tmp_path))
    assert found.sizes == [(4, 2), (4, 2), (3, 5)]
    assert found.load([1, 0])[:, 0, 0, 0].tolist() == [1, 0]
    assert [array.shape for array in found.load([0, 2])] == [(2, 4, 3), (5, 3, 3)]
    Image.new("RGB", (1, 1)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match=r"0\.png has changed"):
        found.load([0, 1])


WHOLE = {
    "png": encoded(Image.fromarray(COLORS), "PNG"),
    "png, 16 bits": GREY["png"],
    "jpeg": encoded(Image.fromarray(COLORS), "JPEG"),
    "jpeg, progressive": encoded(Image.fromarray(COLORS), "JPEG", progressive=True),
    "webp": encoded(Image.fromarray(COLORS), "WEBP", lossless=True),
    "gif": encoded(Image.fromarray(COLORS), "GIF"),
    "bmp": encoded(Image.fromarray(COLORS), "BMP"),
    "tiff": encoded(Image.fromarray(COLORS), "TIFF"),
    "tiff, compressed": encoded(Image.fromarray(COLORS), "TIFF", compression="tiff_lzw"),
}


@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 10**6))
def test_a_file_that_was_cut_off_is_whole_or_refused(kind: str, at: int) -> None:
    """Only what comes after the last pixel may be missing."""
    data = WHOLE[kind]
    try:
        found = pixels(data[: at % len(data)])
    except UserError:
        return
    assert found.tolist() == pixels(data).tolist()


@given(st.sampled_from(sorted(WHOLE)), st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
@example("tiff", [(4, 255)])
def test_a_damaged_file_is_an_image_or_one_sentence(kind: str, flips: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE[kind])
    for at, flip in flips:
        data[at % len(data)] ^= flip
    with one_sentence_at_most():
        found = decode_image(bytes(data))
        assert (found.mode, found.width * found.height <= images.MAX_PIXELS) == ("RGB", True)


@given(st.binary(max_size=60), st.sampled_from([b"", *(data[:16] for data in WHOLE.values())]))
def test_any_bytes_are_an_image_or_one_sentence(rest: bytes, start: bytes) -> None:
    with one_sentence_at_most():
        decode_image(start + rest)
