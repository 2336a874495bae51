"""Damaged metadata never cost a picture: the pixels are those of the clean file, turned as the metadata that are left say."""

import contextlib
import io
import itertools
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from molmo_core.preprocessing.image_files import bare, orientation, png_parts
from molmo_core.preprocessing.media import MediaError, TooManyPixels, image_size, load_image

PICTURE = np.random.default_rng(3).integers(0, 256, (24, 40, 3), dtype=np.uint8)
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF/></x:xmpmeta>'
PNG_TEXTS = [b"interlace\0x", b"bbox\0y", b"exif\0zz", b"transparency\0q", b"gamma\0z", b"default_image\0z", b"", b"XML:com.adobe.xmp\0x"]
PNG_KINDS = b"tEXt zTXt iTXt iCCP gAMA cHRM sRGB pHYs eXIf tIME sPLT hIST bKGD sBIT cICP tRNS acTL fcTL fdAT vpAg prVt PLTE ABCD".split()
# The tags of a TIFF that have nothing to do with its pixels.
TIFF_OTHER = {270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 700, 34665, 34675, 34853, 36867, 37500}


def exif(turned: int | None = None) -> Image.Exif:
    data = Image.Exif()
    if turned:
        data[0x0112] = turned
    data[0x010F], data[0x011A], data[0x0131], data[0x9003] = "maker", 72.0, "software" * 5, "2020"
    data.get_ifd(0x8769)[0x927C] = b"maker note" * 9
    data.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    return data


def encoded(kind: str, turned: int | None = None, **options) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(PICTURE)
    if kind in ("GIF", "BMP"):
        image.convert("P").save(stream, kind)
    else:
        image.save(stream, kind, exif=exif(turned), icc_profile=ICC, dpi=(72, 72), xmp=XMP, **options)
    return stream.getvalue()


def damaged(content: bytes, r: random.Random) -> bytes:
    """Changed bytes, a part, something else, or something more."""
    data = bytearray(content)
    match r.randrange(5):
        case 0 | 1 as way:
            for _ in range(r.randrange(1, 6) if data else 0):
                data[r.randrange(len(data) if way else min(len(data), 40))] = r.choice([0, 255, 1, 127, r.randrange(256)])
        case 2:
            data = data[: r.randrange(len(data) + 1)]
        case 3:
            data = bytearray(r.randbytes(r.randrange(200)))
        case 4:
            data += r.randbytes(20)
    return bytes(data)


def chunk(kind: bytes, content: bytes, wrong: bool = False) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ wrong)


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, i = [], 8
    while i < len(data):
        length, kind = struct.unpack(">I4s", data[i : i + 8])
        found.append((kind, data[i + 8 : i + 8 + length]))
        i += 12 + length
    return found


def png(data: bytes, r: random.Random) -> bytes:
    parts = [data[:8]]
    for kind, content in chunks(data):
        ancillary = kind[0] & 32
        parts.append(chunk(kind, damaged(content, r) if ancillary and r.random() < 0.6 else content, bool(ancillary) and r.random() < 0.3))
        if kind in (b"IHDR", b"IDAT") and r.random() < 0.6:
            made = chunk(r.choice(PNG_KINDS), r.choice([*PNG_TEXTS, r.randbytes(30)]), r.random() < 0.3)
            parts.append(r.choice([made, struct.pack(">I", r.randrange(1 << 32)) + made[4:]]))
    return b"".join(parts) + r.choice([b"", r.randbytes(50)])


def jpeg(data: bytes, r: random.Random) -> bytes:
    def segment(kind: int, content: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, kind, len(content[:65533]) + 2) + content[:65533]

    names = [
        b"Exif\0\0",
        b"MPF\0",
        b"Photoshop 3.0\0",
        b"ICC_PROFILE\0",
        b"http://ns.adobe.com/xap/1.0/\0",
        b"FPXR\0",
        b"Adobe",
        b"JFIF\0",
        b"",
    ]
    parts, i = [data[:2]], 2
    while data[i + 1] != 0xDA:
        kind, length = data[i + 1], struct.unpack(">H", data[i + 2 : i + 4])[0]
        content = data[i + 4 : i + 2 + length]
        if kind > 0xE0 and r.random() < 0.7:
            start = r.choice([content[:6], b""])
            content = start + damaged(content[len(start) :], r)
        elif kind == 0xE0 and r.random() < 0.3:
            content = content[:7] + r.randbytes(7)  # version, density, thumbnail
        parts.append(segment(kind, content))
        i += 2 + length
    if r.random() < 0.6:  # a short one of Adobe or JFIF says nothing about the colours
        name = r.choice(names)
        parts.insert(
            1, segment(r.choice([0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE]), name + r.randbytes(4 if name in names[-3:] else r.randrange(60)))
        )
    return b"".join(parts) + data[i:] + r.choice([b"", r.randbytes(50)])


def webp(data: bytes, r: random.Random) -> bytes:
    parts, i = [], 12
    while i + 8 <= len(data):
        kind, length = struct.unpack("<4sI", data[i : i + 8])
        content = data[i + 8 : i + 8 + length]
        content = damaged(content, r) if kind in (b"EXIF", b"XMP ", b"ICCP") else content
        parts.append(struct.pack("<4sI", kind, len(content)) + content + bytes(len(content) % 2))
        i += 8 + length + length % 2
    body = b"WEBP" + b"".join(parts)
    size = len(body)
    if r.random() < 0.4:
        body += struct.pack("<4sI", r.choice([b"EXIF", b"JUNK", b"XMP "]), r.choice([30, 1000])) + r.randbytes(30)
        size = len(body) + r.choice([0, 0, 970])
    return b"RIFF" + struct.pack("<I", size) + body + r.choice([b"", r.randbytes(9)])


def tiff(data: bytes, r: random.Random) -> bytes:
    new = bytearray(data)
    start = struct.unpack("<I", new[4:8])[0]
    for k in range(struct.unpack("<H", new[start : start + 2])[0]):
        at = start + 2 + 12 * k
        if struct.unpack("<H", new[at : at + 2])[0] in TIFF_OTHER and r.random() < 0.6:
            new[at + 2 : at + 12] = r.choice(
                [
                    r.randbytes(10),
                    bytes(new[at + 2 : at + 4]) + struct.pack("<II", r.choice([0, 1, 1 << 31, 1000]), r.randrange(1 << 32)),
                    bytes(new[at + 2 : at + 8]) + struct.pack("<I", r.choice([0, len(data), len(data) - 2, (1 << 32) - 1])),
                ]
            )
    return bytes(new) + r.choice([b"", r.randbytes(9)])


def gif(data: bytes, r: random.Random) -> bytes:
    colours = 13 + (3 * (2 << (data[10] & 7)) if data[10] & 0x80 else 0)
    made = b""
    for _ in range(r.randrange(1, 3)):
        contents = [
            r.choice([b"NETSCAPE2.0", b"XMP DataXMP", b"ICCRGBG1012", r.randbytes(r.randrange(1, 80))]) for _ in range(r.randrange(4))
        ]
        made += b"\x21" + r.choice([b"\xfe", b"\xff", b"\x01", b"\xaa"]) + b"".join(bytes([len(c)]) + c for c in contents) + b"\0"
    return data[:colours] + made + data[colours:] + r.choice([b"", r.randbytes(9)])


def bmp(data: bytes, r: random.Random) -> bytes:
    new = bytearray(data)
    new[38:46] = r.randbytes(8)  # pixels per metre
    new[2:10] = r.choice([bytes(new[2:10]), r.randbytes(8)])  # size of the file, reserved
    return bytes(new) + r.choice([b"", r.randbytes(9)])


FORMATS: dict[str, tuple[bytes, Callable[[bytes, random.Random], bytes]]] = {
    "PNG": (encoded("PNG"), png),
    "JPEG": (encoded("JPEG"), jpeg),
    "WebP": (encoded("WEBP", lossless=True), webp),
    "TIFF": (encoded("TIFF"), tiff),
    "TIFF, LZW": (encoded("TIFF", compression="tiff_lzw"), tiff),
    "TIFF, JPEG": (encoded("TIFF", compression="jpeg"), tiff),
    "GIF": (encoded("GIF"), gif),
    "BMP": (encoded("BMP"), bmp),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=600, deadline=None)
@given(st.sampled_from(list(FORMATS)), st.integers(0, 2**32 - 1))
@example("PNG", 5380568)  # a palette that nobody needs, longer than the file
@example("GIF", 1888572710)  # an empty extension before another
def test_damaged_metadata_cost_no_pixel(name: str, seed: int) -> None:
    clean, damage = FORMATS[name]
    right, data = load_image(clean), damage(clean, random.Random(seed))
    pixels = load_image(data)
    if pixels.shape[:2] != right.shape[:2]:
        pixels = pixels.swapaxes(0, 1)  # damage that happens to say "turned": the pixels are all there
        assert sorted(pixels.reshape(-1, 3).tolist()) == sorted(right.reshape(-1, 3).tolist())
    elif not np.array_equal(pixels, right):
        turned = [np.flip(right, axes) for axes in (0, 1, (0, 1))]
        assert any(np.array_equal(pixels, t) for t in turned)
    with contextlib.suppress(MediaError):  # a broken header may be beyond what is read for the size alone
        assert sorted(image_size(data)) == sorted(right.shape[:2])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "start"), [("PNG", b"eXIf"), ("JPEG", b"Exif\0\0"), ("WEBP", b"EXIF")])
@pytest.mark.parametrize("turned", [3, 6])
def test_the_orientation_survives_what_is_broken_beside_it(kind: str, start: bytes, turned: int) -> None:
    clean = encoded(kind, turned, **({"lossless": True} if kind == "WEBP" else {}))
    right = load_image(clean)
    entry = clean.index(b"\x01\x12\0\x03\0\0\0\x01" if b"MM\0*" in clean else b"\x12\x01\x03\0\x01\0\0\0", clean.index(start)) + 12
    stop = clean.index(b"maker note", entry)
    for seed in range(40):
        r, data = random.Random(seed), bytearray(clean)
        for _ in range(5):
            data[r.randrange(entry, stop)] = r.randrange(256)
        np.testing.assert_array_equal(load_image(bytes(data)), right)
        assert image_size(bytes(data)) == right.shape[:2]
    if kind == "JPEG":  # Pillow cannot open this one at all
        broken = clean[:2] + b"\xff\xee\0\x07Adobe" + clean[2:]
        with pytest.raises(Exception):  # noqa: B017
            Image.open(io.BytesIO(broken)).load()
        np.testing.assert_array_equal(load_image(broken), right)


def test_pixels_that_are_damaged_are_refused() -> None:
    clean, r = FORMATS["PNG"][0], random.Random(1)
    start = clean.index(b"IDAT") + 4
    for _ in range(50):
        data = bytearray(clean)
        data[r.randrange(start + 2, len(clean) - 20)] ^= 1 << r.randrange(8)
        with pytest.raises(MediaError):
            load_image(bytes(data))
    for kind in (b"IHDR", b"IDAT"):  # a missing header, missing pixels
        rest = clean[:8] + b"".join(chunk(k, c) for k, c in chunks(clean) if k != kind)
        with pytest.raises(MediaError):
            load_image(rest)
    palette = encoded("GIF")
    stream = io.BytesIO()
    Image.open(io.BytesIO(palette)).save(stream, "PNG")
    colours = stream.getvalue()
    at = colours.index(b"PLTE") + 5
    with pytest.raises(MediaError):
        load_image(colours[:at] + bytes([colours[at] ^ 1]) + colours[at + 1 :])
    with pytest.raises(TooManyPixels):
        load_image(clean[:33] + chunk(b"pHYs", b"") + clean[33:], max_pixels=959)


@pytest.mark.parametrize("length", [0, 5, 769, 3000, 5000, 1 << 31])
@pytest.mark.parametrize("content", [b"", b"bbox\0y", bytes(768)])
def test_a_palette_that_is_damaged_costs_only_what_needs_it(length: int, content: bytes) -> None:
    clean = FORMATS["PNG"][0]
    broken = struct.pack(">I4s", length, b"PLTE") + content + bytes(4)
    np.testing.assert_array_equal(load_image(clean[:33] + broken + clean[33:]), PICTURE)
    stream = io.BytesIO()
    Image.open(io.BytesIO(FORMATS["GIF"][0])).save(stream, "PNG")
    parts = [broken if kind == b"PLTE" else chunk(kind, data) for kind, data in chunks(stream.getvalue())]
    with pytest.raises(MediaError):
        load_image(stream.getvalue()[:8] + b"".join(parts))


def test_a_png_that_ends_in_its_metadata_is_whole() -> None:
    clean = FORMATS["PNG"][0]
    late = chunk(b"tEXt", b"Comment\0" + b"x" * 500)
    whole = clean[:-12] + late
    for cut in (1, 100, 505, 512):
        np.testing.assert_array_equal(load_image(whole[:-cut]), PICTURE)


def test_pixels_in_several_pieces_with_texts_between_them() -> None:
    found = dict(chunks(FORMATS["PNG"][0]))
    data, header = found[b"IDAT"], chunk(b"IHDR", found[b"IHDR"])
    pieces = [data[i : i + 700] for i in range(0, len(data), 700)]
    joined = b"".join(itertools.chain(*((chunk(b"IDAT", p), chunk(b"tEXt", b"a\0b", True)) for p in pieces)))
    np.testing.assert_array_equal(load_image(b"\x89PNG\r\n\x1a\n" + header + joined + chunk(b"IEND", b"")), PICTURE)


def test_a_file_of_broken_chunks_is_given_up() -> None:
    """A few seconds of work would be an attack on a server."""
    start = FORMATS["PNG"][0][:33]
    data = start + b"".join(struct.pack(">I", 1 << 22) + b"IDAT" for _ in range(100_000)) + b"\0\0\0\0tEXtxxxx" * 100_000
    with pytest.raises(MediaError):
        load_image(data)
    assert image_size(data) == (24, 40)


def test_orientations() -> None:
    data = exif(6).tobytes()
    assert orientation(data) == orientation(b"Exif\0\0" + data) == 6
    assert orientation(b"", b'<rdf:Description tiff:Orientation="8"/>') == orientation(b"broken", b"<tiff:Orientation>8</") == 8
    assert [orientation(data[:n]) for n in range(len(data))].count(6) > 0, "a cut file may still say it"
    for broken in (b"", b"MM", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", exif().tobytes()):
        assert orientation(broken) == 1


def test_what_is_left_is_smaller_and_the_same_picture() -> None:
    for name, (data, _) in FORMATS.items():
        if name == "BMP":
            assert bare(data) is None
            continue
        stripped = bare(data)
        assert stripped is not None
        np.testing.assert_array_equal(load_image(stripped[0]), load_image(data))
        if not name.startswith(("TIFF", "GIF")):
            assert ICC[:200] not in stripped[0]
            assert len(stripped[0]) < len(data)
    assert len(png_parts(io.BytesIO(FORMATS["PNG"][0]), pixels=False)[0]) < 60
