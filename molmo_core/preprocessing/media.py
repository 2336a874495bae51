"""Reading image files: whatever comes in, RGB uint8 comes out, or a `MediaError` that says why not.

Decoding decisions, so that nothing is a surprise:
- EXIF orientation is applied.
- Transparency is dropped the way Pillow's `convert("RGB")` does it: the stored colours of transparent pixels show.
- 16-bit samples keep their high byte; CMYK, palettes, grey and bilevel are converted by Pillow.
- Of an animation the first frame is used.
- A truncated file is an error, never a grey half.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

MAX_PIXELS = 178_956_970
"""Default limit of an image's size, checked before it is decoded. Pillow opens none that is larger."""

_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | np.ndarray | Image.Image


class MediaError(ValueError):
    """An image or video that cannot be used. The message says which one and why."""


class TooManyPixels(MediaError):
    """An image or video whose header says that it is larger than the limit."""


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image.

    Args:
        source: a path, the bytes of a file, a Pillow image, or an array: uint8 or bool [h, w], [h, w, 1], [h, w, 3] or
            [h, w, 4], or uint16 (16-bit samples).
        max_pixels: larger images are refused before they are decoded.

    Returns:
        uint8 [height, width, 3], RGB.

    Raises:
        TooManyPixels: larger than `max_pixels`.
        MediaError: missing, empty, truncated, or not an image.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        return _decode(source, _name(source), max_pixels)
    with _open(source) as image:
        return _decode(image, _name(source), max_pixels)


def image_size(source: ImageSource, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width that `load_image` will give, from headers and metadata alone (no pixel is decoded).

    Raises:
        TooManyPixels: larger than `max_pixels`.
        MediaError: missing, empty or not an image.
    """
    if isinstance(source, np.ndarray):
        return source.shape[0], source.shape[1]
    image = source if isinstance(source, Image.Image) else _open(source)
    try:
        _check_pixels(image.width, image.height, max_pixels, _name(source))
        orientation = _orientation(image)
    except MediaError:
        raise
    except Exception as error:  # see _decode
        raise MediaError(f"{_name(source)}: unreadable metadata: {type(error).__name__}: {error}") from error
    finally:
        if image is not source:
            image.close()
    return (image.width, image.height) if orientation in (5, 6, 7, 8) else (image.height, image.width)


def _name(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return str(source)
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"{type(source).__name__} in memory"
    return f"image of {len(source):,} bytes"


def _open(source: str | os.PathLike[str] | bytes | bytearray | memoryview) -> Image.Image:
    name = _name(source)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.is_file():
            raise MediaError(f"{name}: {'a folder, not an image file' if path.is_dir() else 'no such file'}")
        empty = path.stat().st_size == 0
        stream: Any = path
    else:
        empty = len(source) == 0
        stream = io.BytesIO(source)
    if empty:
        raise MediaError(f"{name}: empty file")
    try:
        return Image.open(stream)
    except UnidentifiedImageError:
        raise MediaError(f"{name}: not an image that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"{name}: too large: {error}") from None
    except Exception as error:  # broken headers raise whatever the format's parser stumbles over
        raise MediaError(f"{name}: unreadable image header: {type(error).__name__}: {error}") from error


def _check_pixels(width: int, height: int, max_pixels: int, name: str) -> None:
    if width * height > max_pixels:
        raise TooManyPixels(f"{name}: {width} x {height} pixels, more than the limit of {max_pixels:,}")


def _decode(image: Image.Image, name: str, max_pixels: int) -> np.ndarray:
    _check_pixels(image.width, image.height, max_pixels, name)
    if image.width * image.height == 0:
        raise MediaError(f"{name}: no pixels ({image.width} x {image.height})")
    try:
        orientation = _orientation(image)
        image.load()
        if image.mode == "F":
            raise MediaError(f"{name}: floating-point samples; convert the image to 8 or 16 bits")
        if image.mode.startswith("I"):
            return _from_array(_oriented(np.asarray(image), orientation), max_pixels, name)
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        rgb = rgb.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else rgb
        return np.array(rgb)
    except MediaError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... for damaged files
        raise MediaError(f"{name}: cannot be decoded: {type(error).__name__}: {error}") from error


def _oriented(array: np.ndarray, orientation: int) -> np.ndarray:
    if orientation not in _TRANSPOSE:
        return array
    grey = Image.fromarray((np.clip(array, 0, 65535) >> 8).astype(np.uint8))
    return np.asarray(grey.transpose(_TRANSPOSE[orientation])).astype(np.uint16) << 8


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that is still to be applied; nothing is decoded for it."""
    if image.format == "TIFF":
        return 1  # Pillow applies it itself and gives the size after it
    if not isinstance(image, PngImageFile):
        return image.getexif().get(_ORIENTATION, 1)
    # The PNG class' own method decodes the whole image first, because metadata may stand behind the pixels.
    if "exif" not in image.info:
        image.info.update(_late_metadata(image))
    return Image.Image.getexif(image).get(_ORIENTATION, 1)


def _late_metadata(image: PngImageFile) -> dict[Any, Any]:
    """The metadata behind the pixels of a PNG that is not decoded yet, as Pillow reads it (with its limits of size)."""
    stream = image.fp
    if stream is None:
        return {}
    position = stream.tell()
    signature, header, late, pixels = b"", b"", b"", False
    try:
        stream.seek(0)
        signature = stream.read(8)
        while len(start := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", start)
            if kind == b"IHDR" or (pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt")):
                data = stream.read(length)
                chunk = start + data + struct.pack(">I", zlib.crc32(kind + data))
                header, late = (chunk, late) if kind == b"IHDR" else (header, late + chunk)
                length = 0
            pixels |= kind == b"IDAT"
            stream.seek(length + 4, os.SEEK_CUR)
    finally:
        stream.seek(position)
    if not late:
        return {}
    with Image.open(io.BytesIO(signature + header + late + b"\0\0\0\0IDAT"), formats=["PNG"]) as alone:
        return alone.info


def _from_array(array: np.ndarray, max_pixels: int, name: str = "array") -> np.ndarray:
    """RGB uint8 from samples of another kind."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise MediaError(f"{name}: shape {array.shape}; an image is [h, w], [h, w, 1], [h, w, 3] or [h, w, 4]")
    _check_pixels(array.shape[1], array.shape[0], max_pixels, name)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)  # big-endian TIFFs
    if array.dtype == np.int32 and array.min() >= 0 and array.max() <= 65535:
        array = array.astype(np.uint16)  # what Pillow makes of some 16-bit files
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise MediaError(f"{name}: dtype {array.dtype}; samples are uint8, uint16 or bool")
    return np.ascontiguousarray(np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[:, :, :3])
