"""Encoded images, from files or bytes: which formats are read, how, and up to which size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from ensemblenet.errors import DataError, FetchError, first_line

__all__ = ["IMAGE_SUFFIXES", "check_view", "decode_image"]

IMAGE_SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".jfif",
    ".jp2",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
# of Pillow's formats those alone: some others start programs, or take minutes for a few bytes
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

_ORIENTATION = 0x0112  # of EXIF: how the camera was held
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def check_view(image_size: int, crop_pct: float = 1.0, std: Sequence[float] = ()) -> None:
    """Refuse numbers by which no image could be seen.

    Raises:
        DataError: one is out of its range.

    Example:
        >>> check_view(0)
        Traceback (most recent call last):
            ...
        ensemblenet.errors.DataError: image_size must be at least 1, got 0.
    """
    if image_size < 1:
        raise DataError(f"image_size must be at least 1, got {image_size}.")
    if not 0 < crop_pct <= 1:
        raise DataError(f"crop_pct must be above 0 and at most 1, got {crop_pct}.")
    if not all(0 < each < math.inf for each in std):
        raise DataError(f"std must be numbers above 0, got {list(std)}.")


def decode_image(
    source: Callable[[], BinaryIO | Path | Image.Image], what: str, mode: str = "RGB", at_least: int | None = None
) -> Image.Image:
    """Decode an image, wherever it comes from: the one reader of training, evaluation and prediction.

    It is turned upright as its EXIF data says. Of 16 bits of grey the upper 8 are kept, as Pillow does of 16 bits of
    a colour. Of several frames the first is read; transparency is left out.

    Args:
        source: gives a file, open or not, or an image that is opened already.
        what: name of the image, for messages.
        mode: Pillow's name of the colours, such as "RGB" or "L" for grey.
        at_least: a JPEG may be decoded at a half, a quarter or an eighth of its size (fewer coefficients of its DCT),
            where both sides are still as long; None decodes all of its pixels.

    Raises:
        DataError: it cannot be read or decoded, or is too large: has more than twice `PIL.Image.MAX_IMAGE_PIXELS`.

    Example:
        >>> import io
        >>> decode_image(lambda: io.BytesIO(b"nonsense"), "a.png")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ensemblenet.errors.DataError: a.png cannot be decoded: cannot identify image file ...
    """
    try:
        found = source()
        with found if isinstance(found, Image.Image) else Image.open(found, formats=_formats()) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
            upright = _UPRIGHT.get(_orientation(image))
            pixels = _of_eight_bits(image)
            pixels = pixels if upright is None else pixels.transpose(upright)
            if pixels.mode in ("P", "PA"):
                pixels = pixels.convert("RGBA")
            return pixels if pixels.mode == mode else pixels.convert(mode)  # which would copy it
    except FetchError:
        raise
    except Exception as error:  # no list of them is complete: decoders of damaged files raise nearly any
        raise DataError(f"{what} cannot be decoded: {first_line(error)}") from error


@cache
def _formats() -> list[str]:
    """Those that the installed Pillow has."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data spoils no pixel
        return 1


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more bits as grey of 8; Pillow itself would clip it to white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return image.convert("I").point(lambda level: level * (1 / 256)).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, whose range is not known; store it with 8 or 16 bits")
    return image
