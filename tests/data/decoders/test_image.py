from __future__ import annotations

import contextlib
import io
import itertools
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from millrace.data.decoders import image as decoder
from millrace.data.decoders.image import MAX_PIXELS, decode, size

# what Pillow says of the damaged files of these tests
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")

LOSSLESS = ["PNG", "BMP", "TIFF", "WEBP"]
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def encode(image: Image.Image | np.ndarray, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, form, **({"lossless": True} if form == "WEBP" else {}), **options)
    return file.getvalue()


@pytest.mark.parametrize("form", LOSSLESS)
def test_pixels_come_back(form: str) -> None:
    raw = encode(PIXELS, form)
    assert size(raw) == (7, 5)
    assert decode(raw).dtype == np.uint8 and np.array_equal(decode(raw), PIXELS)


def test_jpeg_is_what_pillow_decodes() -> None:
    raw = encode(np.kron(PIXELS, np.ones((20, 20, 1), np.uint8)), "JPEG")
    assert size(raw) == (140, 100)
    assert np.array_equal(decode(raw), np.asarray(Image.open(io.BytesIO(raw))))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (16, 16), (33, 47)])
def test_every_kind_of_jpeg_is_what_pillow_decodes(mode: str, shape: tuple[int, int]) -> None:
    ramp = np.random.default_rng(1).normal(0, 1, (*shape, 3)).cumsum(0).cumsum(1)
    pixels = np.clip(128 + 20 * ramp, 0, 255).astype(np.uint8)
    for quality, subsampling, progressive in itertools.product((30, 95), (0, 1, 2), (False, True)):
        options = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
        raw = encode(Image.fromarray(pixels).convert(mode), "JPEG", **options)
        assert np.array_equal(decode(raw), np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))), options


def test_pillow_opens_only_what_is_not_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bytes] = []
    there = decoder._open
    monkeypatch.setattr(decoder, "_open", lambda raw, most: opened.append(raw) or there(raw, most))
    large, exif = np.kron(PIXELS, np.ones((20, 20, 1), np.uint8)), Image.Exif()
    exif[0x0112] = 6
    plain = [encode(large, "JPEG"), encode(large, "JPEG", progressive=True, comment=b"made by hand")]
    for raw in plain:
        assert decode(raw).shape == (100, 140, 3) and not opened
    others = [
        encode(large, "JPEG", exif=exif),
        encode(large, "JPEG", xmp=b'<x:xmpmeta tiff:Orientation="6"/>'),
        encode(Image.fromarray(large).convert("CMYK"), "JPEG"),
        encode(large, "PNG"),
        plain[0][:-400],
    ]
    for raw in others:
        with contextlib.suppress(ValueError):
            decode(raw)
        assert opened.pop() == raw
    with pytest.raises(ValueError, match="more than 100"):
        decode(plain[0], 100)


def test_a_damaged_jpeg_is_judged_by_pillow() -> None:
    raw = bytearray(encode(np.kron(PIXELS, np.ones((20, 20, 1), np.uint8)), "JPEG"))
    draw = random.Random(0)
    for _ in range(200):
        damaged = bytearray(raw)
        damaged[draw.randrange(2, len(raw))] = draw.randrange(256)
        try:
            expected = np.asarray(Image.open(io.BytesIO(damaged)).convert("RGB"))
        except Exception:
            expected = None
        try:
            found = decode(bytes(damaged))
        except ValueError:
            found = None
        assert (found is None) == (expected is None)


def test_other_modes_become_rgb() -> None:
    grey, alpha = PIXELS[:, :, 0], np.dstack([PIXELS, PIXELS[:, :, :1]])
    three = np.repeat(grey[:, :, None], 3, axis=2)
    assert np.array_equal(decode(encode(grey, "PNG")), three)
    assert np.array_equal(decode(encode(alpha, "PNG")), PIXELS)
    assert np.array_equal(decode(encode(grey.astype(np.uint16) * 256 + 77, "PNG")), three)
    assert np.array_equal(decode(encode(Image.fromarray(grey > 99), "PNG")), (three > 99) * np.uint8(255))
    with pytest.raises(ValueError, match="its pixels have 32 bits"):
        decode(encode(PIXELS[:, :, 0].astype(np.float32), "TIFF"))
    cmyk = encode(Image.fromarray(PIXELS).convert("CMYK"), "JPEG")
    assert decode(cmyk).shape == (5, 7, 3)


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        raw = encode(frames[0], form, save_all=True, append_images=frames[1:])
        assert size(raw) == (6, 4) and decode(raw)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encode(np.kron(PIXELS, np.ones((16, 16, 1), np.uint8)), form, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(raw))))
    assert np.array_equal(decode(raw), expected)
    assert size(raw) == expected.shape[1::-1]


def test_damaged_exif_does_not_matter() -> None:
    raw = encode(PIXELS, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert size(raw) == (7, 5) and np.array_equal(decode(raw), PIXELS)


def bomb(width: int, height: int, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8193, 12000, 60000, 2**31 - 1])
def test_an_image_above_the_limit_is_refused_from_its_header(side: int) -> None:
    for call in (size, decode):
        with pytest.raises(ValueError, match="more than 67108864|exceeds limit|a damaged image"):
            call(bomb(side, side))
    assert MAX_PIXELS == 64 * 2**20
    with pytest.raises(ValueError, match="7 x 5 pixels, more than 34"):
        decode(encode(PIXELS, "PNG"), 34)
    assert decode(encode(PIXELS, "PNG"), 35).shape == (5, 7, 3)


LIMITED = """
import resource, sys
from millrace.data.decoders.image import decode, size
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
raw = sys.stdin.buffer.read()
for call in (size, decode):
    try: call(raw)
    except ValueError as error: print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_bomb_takes_no_memory() -> None:
    raw = bomb(30000, 30000, bytes(90_001) * 2000)
    assert len(raw) < 200_000
    done = subprocess.run([sys.executable, "-c", LIMITED], input=raw, capture_output=True, check=True)
    *errors, mebibytes = done.stdout.decode().splitlines()
    assert len(errors) == 2 and int(mebibytes) < 60


@pytest.mark.parametrize("form", [*LOSSLESS, "JPEG", "GIF"])
def test_an_image_cut_anywhere_is_refused_or_whole(form: str) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8)
    raw = encode(picture, form)
    whole, step = decode(raw), max(1, len(raw) // 60)
    for cut in [*range(0, len(raw), step), len(raw) - 1]:
        try:
            assert np.array_equal(decode(raw[:cut]), whole)  # what is cut off may be a mere end mark
            assert cut > 0.9 * len(raw)
        except ValueError:
            pass


def test_flipped_bits_raise_nothing_else_than_a_value_error() -> None:
    for form in [*LOSSLESS, "JPEG", "GIF"]:
        raw = encode(PIXELS, form)
        for bit in range(0, 8 * len(raw), 11):
            damaged = bytearray(raw)
            damaged[bit // 8] ^= 1 << bit % 8
            for call in (size, decode):
                with contextlib.suppress(ValueError):
                    call(bytes(damaged), 10**6)


@pytest.mark.parametrize("raw", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n", encode(PIXELS, "PPM")])
def test_other_formats_are_refused(raw: bytes) -> None:
    for call in (size, decode):
        with pytest.raises(ValueError, match="not an image that can be read"):
            call(raw)
