"""Check of uploaded images: nothing is decoded before its format, bytes and pixels are known to be acceptable."""

from __future__ import annotations

import struct
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

# By how a file begins. Not by `Image.open`: Ultralytics has it install a package when it meets an unknown format.
READERS: dict[bytes, Any] = {
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
    b"GIF8": GifImagePlugin.GifImageFile,
    b"II*\0": TiffImagePlugin.TiffImageFile,
    b"MM\0*": TiffImagePlugin.TiffImageFile,
}
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp"}  # browsers and OpenCV read these alike
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000
MIN_SIDE = 10  # pixels, as in Ultralytics
THUMB = 320  # longer side of a thumbnail in pixels


class Checked(NamedTuple):
    """An image that was decoded.

    Attributes:
        data (bytes): File to store.
        suffix (str): Its suffix, by its content.
        size (tuple[int, int]): Width and height in pixels.
        thumb (bytes): Thumbnail, JPEG.
    """

    data: bytes
    suffix: str
    size: tuple[int, int]
    thumb: bytes


def check_image(data: bytes, name: str) -> Checked:
    """Decode an image, and turn it upright.

    Args:
        data (bytes): Content of the file.
        name (str): Its name, for messages only.

    Returns:
        (Checked): The image; its bytes are unchanged if browser and detector see the same in them.

    Raises:
        ValueError: If it is no image, broken, too large, or of more than 16 bits; the text names the file.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name} has {len(data) / 2**20:.0f} MiB, and an image may have {MAX_BYTES // 2**20}.")
    reader = next((r for start, r in READERS.items() if data.startswith(start)), None)
    if reader is None or (data.startswith(b"RIFF") and data[8:12] != b"WEBP"):
        raise ValueError(f"{name} is not an image. Use JPEG, PNG, WebP, BMP or TIFF.")
    broken = f"{name} is broken and cannot be read to its end. Save it again, or leave it out."
    try:
        if data.startswith(b"RIFF"):
            _check_size(_webp_size(data), name)  # whose reader allocates the pixels
        image = reader(BytesIO(data))  # reads the header alone
    except (OSError, SyntaxError, IndexError, KeyError, TypeError, struct.error) as e:
        raise ValueError(broken) from e
    _check_size(image.size, name)
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ValueError(f"{name} has 32 bits per pixel and channel. Save it with 8 or 16.")
    try:
        image.load()
        upright = _eight_bits(ImageOps.exif_transpose(image))
        plain = image.format in SUFFIXES and image.mode in {"RGB", "L"} and getattr(image, "n_frames", 1) == 1
        suffix = SUFFIXES.get(str(image.format), ".png")
        if not plain or image.getexif().get(0x0112, 1) != 1:
            suffix = ".jpg" if image.format == "JPEG" else ".png"
            data = _encode(upright.convert("RGB"), suffix)
        upright = upright.convert("RGB")
        size = upright.size
        upright.thumbnail((THUMB, THUMB))
        return Checked(data, suffix, size, _encode(upright, ".jpg"))
    except (OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, ArithmeticError, struct.error) as e:
        raise ValueError(broken) from e


def _check_size(size: tuple[int, int], name: str) -> None:
    """Raise a ValueError if an image is too large or too small."""
    width, height = size
    if width * height > MAX_PIXELS:
        limit = f"an image may have {MAX_PIXELS // 10**6} million"
        raise ValueError(f"{name} has {width} x {height} pixels, and {limit}. Reduce it first.")
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"{name} has {width} x {height} pixels, and an image needs {MIN_SIDE} x {MIN_SIDE}.")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of 16 bits with the upper 8, as Ultralytics reads it; others as they are."""
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a WebP from its header."""
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = struct.unpack("<I", data[21:25])[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF


def _encode(image: Image.Image, suffix: str) -> bytes:
    """Return an image as a file."""
    buffer = BytesIO()
    if suffix == ".jpg":
        image.save(buffer, "JPEG", quality=95)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()
