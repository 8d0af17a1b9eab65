"""Images: the size from the header by Pillow, the pixels as 8-bit RGB by Pillow, or by libjpeg-turbo for JPEG.

Pillow decodes JPEG by libjpeg-turbo too, to equal pixels, and then copies them three times.

Errors are `ValueError`s whose message is the reason, fit for a `BadSample`.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64 * 2**20
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, with Huffman codes
_PLAIN_MARKERS = {*_FRAMES, 0xC4, 0xDB, 0xDD, 0xE0, 0xEE, 0xFE}  # tables, JFIF, Adobe's colours, comments
_SCAN = b"\xff\xda"
_ORIENTATION = 0x0112  # Exif 2.3, 4.6.4: values 5 to 8 exchange width and height


def size(raw: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels as `decode` gives them, from the header alone.

    Raises:
        ValueError: not an image of `FORMATS`, or more than `max_pixels`.
    """
    image = _open(raw, max_pixels)
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def decode(raw: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Pixels, uint8 of shape (H, W, 3), turned as the Exif orientation says; of an animation the first frame.

    Grey and palettes become RGB, 16 bits become 8, transparency is dropped.

    Raises:
        ValueError: not an image of `FORMATS`, more than `max_pixels`, cut short or damaged.
    """
    if _is_plain_jpeg(raw, max_pixels) and (found := _decode_jpeg(raw)) is not None:
        return found
    image = _open(raw, max_pixels)
    turned = _orientation(image)
    if image.format == "JPEG" and image.mode in ("RGB", "L") and (found := _decode_jpeg(raw)) is not None:
        return _turn(found, turned)
    try:
        image.load()
        if image.mode.startswith("I;16"):
            pixels = np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        elif image.mode in ("I", "F"):
            raise ValueError(f"its pixels have 32 bits (mode {image.mode})")
        else:
            pixels = np.array(image.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds for damaged files; all mean that it cannot be decoded
        raise ValueError(f"a damaged {image.format} image: {error}") from None
    return _turn(pixels, turned)


def _is_plain_jpeg(raw: bytes, max_pixels: int) -> bool:
    """Whether it is grey or colour of 8 bits, not too large, and without Exif, XMP or anything else to be looked at.

    By its markers (ITU-T T.81, annex B), in a tenth of the time that Pillow takes to open it.
    """
    if raw[:3] != b"\xff\xd8\xff":
        return False
    at, size = 2, 0
    while at + 10 <= len(raw) and raw[at] == 0xFF and raw[at + 1] in _PLAIN_MARKERS:
        if raw[at + 1] in _FRAMES:
            precision, components = raw[at + 4], raw[at + 9]
            size = int.from_bytes(raw[at + 5 : at + 7]) * int.from_bytes(raw[at + 7 : at + 9])
            if precision != 8 or components not in (1, 3) or not 0 < size <= max_pixels:
                return False
        at += 2 + int.from_bytes(raw[at + 2 : at + 4])
    return size > 0 and raw[at : at + 2] == _SCAN


def _decode_jpeg(raw: bytes) -> np.ndarray | None:
    """Pixels (H, W, 3); None where the file is not perfect, of which Pillow is the judge."""
    import simplejpeg

    try:
        return np.asarray(simplejpeg.decode_jpeg(raw, "RGB"))
    except ValueError:
        return None


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (H, W, 3) as they are to be seen; Exif's values are the 8 symmetries of a rectangle."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _orientation(image: Image.Image) -> int:
    """1 to 8, from what precedes the pixels; 1 where Exif is damaged. Pillow turns TIFFs itself."""
    from PIL import Image

    if image.format == "TIFF":
        return 1
    try:
        found = Image.Image.getexif(image).get(_ORIENTATION, 1)  # PNG's own method would decode the pixels
    except Exception:  # Exif is often damaged where the image is not
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _open(raw: bytes, max_pixels: int) -> Image.Image:
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        width, height = image.size
    except Image.UnidentifiedImageError:
        raise ValueError(f"not an image that can be read ({', '.join(FORMATS)})") from None
    except Exception as error:
        raise ValueError(f"a damaged image: {error}") from None
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels, more than {max_pixels}")
    return image
