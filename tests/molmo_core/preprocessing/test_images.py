"""Reading, resizing, cutting and masking of images."""

import dataclasses
import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from molmo_core.preprocessing.images import ImageSettings, preprocess_image
from molmo_core.preprocessing.media import MediaError, TooManyPixels, image_size, load_image
from molmo_core.preprocessing.resize import resize

CLIP = ImageSettings()
SIGLIP = ImageSettings(crop_size=(378, 378), resize_mode="siglip", max_crops=8)
RNG = np.random.default_rng(5)
PICTURE = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# Reading


def test_every_kind_of_source(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(PICTURE))
    path = tmp_path / "a.jpg"  # the extension does not matter
    path.write_bytes(data)
    for source in (data, bytearray(data), memoryview(data), path, str(path), Image.open(io.BytesIO(data)), PICTURE):
        np.testing.assert_array_equal(load_image(source), PICTURE)
        assert image_size(source) == (6, 9)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    undo = [None, None, 0, 3, 1, 5, 4, 6, 2][orientation]  # the Pillow transposition that the orientation asks for
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(PICTURE), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = PICTURE if undo is None else np.asarray(Image.fromarray(PICTURE).transpose(Image.Transpose(undo)))
    np.testing.assert_array_equal(load_image(data), upright)
    assert image_size(data) == upright.shape[:2]


def chunk_of(data: bytes, kind: bytes) -> bytes:
    """A whole chunk of a PNG."""
    start = data.index(kind) - 4
    return data[start : start + 12 + struct.unpack(">I", data[start : start + 4])[0]]


@pytest.mark.parametrize("kind", [b"eXIf", b"zTXt", b"iTXt"])
def test_exif_after_the_pixels(monkeypatch: pytest.MonkeyPatch, kind: bytes) -> None:
    """Some tools write a PNG's orientation behind the pixels; its size is known without decoding it all the same."""
    exif = Image.Exif()
    exif[0x0112] = 6
    text = PngInfo()
    raw = exif.tobytes()
    if kind == b"zTXt":
        text.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n", zip=True)
    elif kind == b"iTXt":
        text.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>', zip=True)
    data = encoded(Image.fromarray(PICTURE), **({"exif": exif} if kind == b"eXIf" else {"pnginfo": text}))
    chunk = chunk_of(data, kind)
    moved = data.replace(chunk, b"")[:-12] + chunk + data[-12:]
    np.testing.assert_array_equal(load_image(moved), np.rot90(PICTURE, -1))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    assert image_size(moved) == (9, 6)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
@pytest.mark.parametrize("late", [False, True], ids=["before the pixels", "behind them"])
def test_text_that_is_much_larger_unpacked(kind: bytes, late: bool) -> None:
    """100 kB that would be 100 MB of text: the picture is read, the text is not unpacked beyond the limit."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(100)) + packer.flush()
    name = {b"zTXt": b"Raw profile type exif\0\0", b"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0"}[kind]
    content = name + packed
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    data = encoded(Image.fromarray(PICTURE))
    bomb = data[:-12] + 20 * chunk + data[-12:] if late else data[:33] + 20 * chunk + data[33:]
    tracemalloc.start()
    np.testing.assert_array_equal(load_image(bomb), PICTURE)
    assert image_size(bomb) == (6, 9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_sizes_are_read_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {kind: encoded(Image.fromarray(PICTURE), kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP")}

    def refuse(self, *args):
        raise AssertionError("decoded")

    for plugin in ("PngImagePlugin.PngImageFile", "JpegImagePlugin.JpegImageFile", "WebPImagePlugin.WebPImageFile", "ImageFile.ImageFile"):
        monkeypatch.setattr(f"PIL.{plugin}.load", refuse)
    for data in files.values():
        assert image_size(data) == (6, 9)


def test_modes() -> None:
    grey = PICTURE[:, :, 0]
    np.testing.assert_array_equal(load_image(encoded(Image.fromarray(grey))), np.repeat(grey[:, :, None], 3, axis=2))
    palette = Image.fromarray(PICTURE).convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(load_image(encoded(palette)), np.asarray(palette.convert("RGB")))
    rgba = np.dstack([PICTURE, np.zeros((6, 9), np.uint8)])
    np.testing.assert_array_equal(load_image(encoded(Image.fromarray(rgba))), PICTURE)  # transparent pixels keep their colour
    sixteen = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
    expected = np.repeat((sixteen >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(load_image(encoded(Image.fromarray(sixteen), kind)), expected)
    np.testing.assert_array_equal(load_image(sixteen), expected)
    big_endian = encoded(Image.frombytes("I;16B", (9, 6), sixteen.astype(">u2").tobytes()), "TIFF")
    assert Image.open(io.BytesIO(big_endian)).mode == "I;16B"
    np.testing.assert_array_equal(load_image(big_endian), expected)
    bilevel = grey > 127
    np.testing.assert_array_equal(load_image(bilevel)[:, :, 1], bilevel * 255)
    np.testing.assert_array_equal(load_image(encoded(Image.fromarray(bilevel)))[:, :, 1], bilevel * 255)


def test_cmyk_jpeg() -> None:
    solid = Image.new("CMYK", (16, 8), (0, 255, 255, 0))
    red = load_image(encoded(solid, "JPEG", quality=100))
    assert red.shape == (8, 16, 3)
    assert np.abs(red.astype(int) - [255, 0, 0]).max() < 8


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
        assert (load_image(data) == [255, 0, 0]).all(), kind


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "not an image"),
        (png_header(14_000, 13_000), "too large"),
        (png_header(200_000, 200_000), "too large"),
        (png_header(20, 20), "decoded"),
        (np.zeros((4, 4, 2), np.uint8), "shape"),
        (np.zeros((4, 0, 3), np.uint8), "shape"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        ("no/such/file.png", "no such file"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_images(source, message: str) -> None:
    with pytest.raises(MediaError, match=message) as caught:
        load_image(source)
    if isinstance(caught.value, TooManyPixels):
        with pytest.raises(TooManyPixels):
            image_size(source)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"tmp.*folder|folder"):
        load_image(tmp_path)
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = encoded(noise, kind)
        path = tmp_path / f"cut.{kind.lower()}"
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(MediaError, match=f"cut.{kind.lower()}"):
            load_image(path)


def test_pixel_limit() -> None:
    assert load_image(PICTURE, max_pixels=54).shape == (6, 9, 3)
    for source in (PICTURE, encoded(Image.fromarray(PICTURE)), Image.fromarray(PICTURE)):
        with pytest.raises(MediaError, match="limit of 53"):
            load_image(source, max_pixels=53)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]), st.data())
def test_damaged_files_give_an_image_or_a_media_error(kind: str, data: st.DataObject) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = bytearray(encoded(Image.fromarray(PICTURE), kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {})))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(1, len(raw)))]
    try:
        image = load_image(bytes(raw), max_pixels=1_000_000)
    except MediaError:
        return
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    assert image_size(bytes(raw)) == image.shape[:2]


# Resizing


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Two nearest samples on each axis, in float64."""

    def taps(size: int, out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
        low = at.astype(int)
        return low, np.minimum(low + 1, size - 1), at - low

    (y0, y1, wy), (x0, x1, wx) = taps(image.shape[0], height), taps(image.shape[1], width)
    rows = image[y0] * (1 - wy)[:, None, None] + image[y1] * wy[:, None, None]
    return rows[:, x0] * (1 - wx)[:, None] + rows[:, x1] * wx[:, None]


sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))


@settings(max_examples=80, deadline=None)
@given(sizes, sizes, st.integers(0, 2**32 - 1))
def test_siglip_resize(size: tuple[int, int], out: tuple[int, int], seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    result = resize(image, *out, "siglip")
    assert result.pixels.shape == (*out, 3)
    assert np.abs(result.pixels - np.round(bilinear(image, *out))).max() <= 1


@settings(max_examples=60, deadline=None)
@given(sizes, sizes)
def test_default_resize_keeps_the_aspect_ratio_and_pads(size: tuple[int, int], out: tuple[int, int]) -> None:
    white = np.full((*size, 3), 255, np.uint8)
    result = resize(white, *out, "default", pad_value=0.2)
    top, left, bottom, right = result.box
    scale = min(out[0] / size[0], out[1] / size[1])
    assert abs((bottom - top) - size[0] * scale) <= 1 + 1e-6
    assert abs((right - left) - size[1] * scale) <= 1 + 1e-6
    inside = np.zeros(out, bool)
    inside[top:bottom, left:right] = True
    assert (result.pixels[inside] == 255).all()
    assert (result.pixels[~inside] == 51).all()
    assert 0 <= (out[0] - bottom) - top <= 1
    assert 0 <= (out[1] - right) - left <= 1


def test_resizing_keeps_flat_images_flat() -> None:
    flat = np.full((300, 500, 3), [7, 130, 251], np.uint8)
    for mode in ("siglip", "dino", "metaclip"):
        for out in ((378, 378), (100, 80), (644, 910)):
            assert (resize(flat, *out, mode).pixels == [7, 130, 251]).all()


def test_very_long_images() -> None:
    for shape in ((2, 70_000, 3), (70_000, 2, 3)):
        for mode in ("siglip", "default", "dino"):
            assert resize(np.full(shape, 9, np.uint8), 378, 378, mode).pixels.shape == (378, 378, 3)


# Cutting and masks


def test_patches_are_the_picture() -> None:
    """An image of exactly the canvas' size is not resized: the used patches are the image itself, in raster order."""
    settings_ = dataclasses.replace(SIGLIP, pooling=(1, 1))
    height, width = 2 * 266 + 112, 3 * 266 + 112
    image = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    features = preprocess_image(image, settings_)
    assert features.tiling == (2, 3)
    patches = features.images.reshape(-1, 588)[features.pooled_patches_idx[729:, 0]]
    raster = image.reshape(height // 14, 14, width // 14, 42).swapaxes(1, 2).reshape(-1, 588)
    np.testing.assert_array_equal(patches, raster)


@pytest.mark.parametrize("size", [(480, 640), (97, 1201), (1000, 333), (336, 336), (700, 701)])
def test_masks_are_the_share_of_real_pixels(size: tuple[int, int]) -> None:
    features = preprocess_image(np.full((*size, 3), 255, np.uint8), CLIP)  # white on black padding
    assert features.image_masks is not None
    np.testing.assert_allclose(features.images.mean(axis=2) / 255, features.image_masks, atol=1e-6)
    legacy = preprocess_image(np.full((*size, 3), 255, np.uint8), dataclasses.replace(CLIP, legacy_image_mask=True)).image_masks
    assert legacy is not None
    np.testing.assert_array_equal(legacy[:-1], features.image_masks[1:])
    assert (legacy[-1] == -1).all()


def test_only_pixels_are_accepted() -> None:
    for wrong in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="load_image"):
            preprocess_image(wrong, CLIP)


def test_views_need_not_be_contiguous() -> None:
    image = RNG.integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for settings_ in (CLIP, SIGLIP, dataclasses.replace(CLIP, resize_mode="dino")):
        flipped = preprocess_image(image[::-1, :, ::-1], settings_)
        np.testing.assert_array_equal(flipped.images, preprocess_image(image[::-1, :, ::-1].copy(), settings_).images)
