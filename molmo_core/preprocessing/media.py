"""Reading image files: whatever comes in, RGB uint8 comes out, or a `MediaError` that says why not.

Decoding decisions, so that nothing is a surprise:
- EXIF orientation is applied.
- Transparency is dropped the way Pillow's `convert("RGB")` does it: the stored colours of transparent pixels show.
- 16-bit samples keep their high byte; CMYK, palettes, grey and bilevel are converted by Pillow.
- Of an animation the first frame is used.
- A truncated file is an error, never a grey half.
- Damaged metadata (EXIF, texts, profiles) cost nothing but themselves.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from molmo_core.preprocessing.image_files import GIF, PNG, bare, orientation, png_parts

MAX_PIXELS = 178_956_970
"""Default limit of an image's size, checked before it is decoded. Pillow opens none that is larger."""

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

FileSource = str | os.PathLike[str] | bytes | bytearray | memoryview
ImageSource = FileSource | np.ndarray | Image.Image


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
    name = _name(source)
    if isinstance(source, Image.Image):
        return _decode(source, name, max_pixels)
    with _open(source, name) as (image, turned):
        try:
            return _decode(image, name, max_pixels, turned)
        except TooManyPixels:
            raise
        except MediaError:
            stripped = bare(_read(source)) if turned is None else None
            if stripped is None:
                raise
    with _opened(io.BytesIO(stripped[0]), name) as image:
        return _decode(image, name, max_pixels, stripped[1])


def image_size(source: ImageSource, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width that `load_image` will give, from headers and metadata alone (no pixel is decoded).

    Raises:
        TooManyPixels: larger than `max_pixels`.
        MediaError: missing, empty or not an image.
    """
    if isinstance(source, np.ndarray):
        return source.shape[0], source.shape[1]
    name = _name(source)
    if isinstance(source, Image.Image):
        return _size(source, name, max_pixels, None)
    with _open(source, name, pixels=False) as (image, turned):
        return _size(image, name, max_pixels, turned)


def _size(image: Image.Image, name: str, max_pixels: int, turned: int | None) -> tuple[int, int]:
    _check_pixels(image.width, image.height, max_pixels, name)
    sideways = (_orientation(image) if turned is None else turned) in (5, 6, 7, 8)
    return (image.width, image.height) if sideways else (image.height, image.width)


def _name(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return str(source)
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"{type(source).__name__} in memory"
    return f"image of {len(source):,} bytes"


@contextlib.contextmanager
def _open(source: FileSource, name: str, pixels: bool = True) -> Iterator[tuple[Image.Image, int | None]]:
    """An image that is not decoded yet, and its orientation; None = what its metadata say. What Pillow cannot open is tried without
    metadata. Of a PNG and a GIF it never gets any: a text named `interlace`, or an empty extension, changes how it reads the rest.

    Args:
        pixels: they will be decoded.
    """
    stream = _stream(source, name)
    with stream:
        head = stream.read(len(PNG))
        stripped = png_parts(stream, pixels) if head == PNG else bare(_read(source)) if head.startswith(GIF) else None
        if stripped is None:
            stream.seek(0)
            try:
                image = _opened(stream, name)
            except MediaError:
                stripped = bare(_read(source))
                if stripped is None:
                    raise
        if stripped is not None:
            image = _opened(io.BytesIO(stripped[0]), name)
        with image:
            yield image, None if stripped is None else stripped[1]


def _stream(source: FileSource, name: str) -> BinaryIO:
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.is_file():
            raise MediaError(f"{name}: {'a folder, not an image file' if path.is_dir() else 'no such file'}")
        empty = path.stat().st_size == 0
    else:
        empty = len(source) == 0
    if empty:
        raise MediaError(f"{name}: empty file")
    return path.open("rb") if isinstance(source, str | os.PathLike) else io.BytesIO(source)


def _read(source: FileSource) -> bytes:
    return Path(source).read_bytes() if isinstance(source, str | os.PathLike) else bytes(source)


def _opened(stream: BinaryIO, name: str) -> Image.Image:
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


def _decode(image: Image.Image, name: str, max_pixels: int, turned: int | None = None) -> np.ndarray:
    """The pixels, turned as `turned` (an orientation) says; None = as its metadata say."""
    _check_pixels(image.width, image.height, max_pixels, name)
    if image.width * image.height == 0:
        raise MediaError(f"{name}: no pixels ({image.width} x {image.height})")
    try:
        image.load()
        turned = _orientation(image) if turned is None else turned
        if image.mode == "F":
            raise MediaError(f"{name}: floating-point samples; convert the image to 8 or 16 bits")
        if image.mode.startswith("I"):
            return _from_array(_oriented(np.asarray(image), turned), max_pixels, name)
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        rgb = rgb.transpose(_TRANSPOSE[turned]) if turned in _TRANSPOSE else rgb
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
    """The orientation that is still to be applied."""
    if image.format == "TIFF":
        return 1  # Pillow applies it itself and gives the size after it
    texts = [image.info.get(key) for key in ("exif", "xmp")]
    return orientation(*(text if isinstance(text, bytes) else b"" for text in texts))


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
