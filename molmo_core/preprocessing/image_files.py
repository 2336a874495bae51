"""Image files without their metadata, so that damaged metadata never cost a picture; and the one thing in it that matters.

Pillow reads text, profiles and thumbnails together with the pixels, and gives up when any of them is broken. `bare` copies only what
pixels are made of (PNG, JPEG, WebP, GIF, TIFF); `orientation` reads how the picture is to be turned.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

PNG, GIF = b"\x89PNG\r\n\x1a\n", b"GIF8"
_TEXT_LIMIT = 1 << 20
"""Bytes of a text or EXIF chunk of a PNG; of larger ones nothing more is read."""
_REPAIRS = 16
"""Broken chunks of a PNG behind which the next is searched for, and places that are tried each time: a file cannot keep us busy."""
_TEXTS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
_LONGEST_NAME, _COLOUR_TYPE = 80, 17
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_ORIENTATION = 0x0112
_INTEGERS = {1: "B", 3: "H", 4: "I"}
_TIFF_PIXEL_TAGS = frozenset((
    254, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 274, 277, 278, 279, 280, 281, 284, 290, 291, 292, 293, 301, 317, 320, 322,
    323, 324, 325, 330, 332, 334, 336, 338, 339, 340, 341, 342, 347, 529, 530, 531, 532, 32997, 32998,
))  # fmt: skip


def bare(data: bytes) -> tuple[bytes, int] | None:
    """A file without its metadata (of an animation: the first picture), and the orientation that was in them, 1 to 8.

    None: of another format, or broken beyond its metadata.
    """
    for start, strip in _STRIP.items():
        if data.startswith(start):
            with contextlib.suppress(struct.error, IndexError, ValueError):
                return strip(data)
    return None


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """The orientation, 1 to 8, that EXIF data or an XMP packet name, whatever else in them is broken; 1 if they name none."""
    with contextlib.suppress(struct.error):
        if found := _exif_orientation(exif):
            return found
    found_xmp = re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)
    return int(found_xmp[1]) if found_xmp else 1


def png_parts(stream: BinaryIO, pixels: bool = True) -> tuple[bytes, int]:
    """A PNG without metadata, and the orientation that was in them, 1 to 8.

    Args:
        stream: of the file, seekable.
        pixels: with them; else it ends where they would begin, and they are not read.
    """
    header = palette = exif = xmp = b""
    data: list[bytes] = []
    seen: set[bytes] = set()
    for kind, content, crc in _png_chunks(stream, pixels):
        chunk = struct.pack(">I", len(content)) + kind + content + crc if kind in (b"IHDR", b"PLTE") else b""
        name = content.split(b"\0", 1)[0][:_LONGEST_NAME] if kind in _TEXTS else b""
        if kind == b"IDAT":
            data.append(content)
        elif kind == b"IHDR":
            header = header or chunk
        elif kind == b"PLTE":
            palette = palette or (chunk if header[_COLOUR_TYPE : _COLOUR_TYPE + 1] == b"\3" else b"")  # else only a suggestion
        elif kind == b"eXIf":
            exif = exif or content
        elif name in (b"Raw profile type exif", b"XML:com.adobe.xmp") and name not in seen:  # each is unpacked once
            seen.add(name)
            text = _png_text(kind, content)
            if name.startswith(b"XML"):
                xmp = text
            else:  # as ImageMagick writes it: a name, a length, hexadecimal lines
                with contextlib.suppress(ValueError):
                    exif = exif or bytes.fromhex("".join(text.decode("latin-1").split()[2:]))
    parts = [PNG, header, palette, struct.pack(">I4s", sum(map(len, data)), b"IDAT"), *data]
    if pixels:
        parts += [bytes(4), struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))]
    return b"".join(parts), orientation(exif, xmp)


def _exif_orientation(exif: bytes) -> int | None:
    while exif.startswith(_EXIF):
        exif = exif[len(_EXIF) :]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    start = struct.unpack_from(f"{order}I", exif, 4)[0]
    for k in range(struct.unpack_from(f"{order}H", exif, start)[0]):
        tag, kind = struct.unpack_from(f"{order}HH", exif, start + 2 + 12 * k)
        if tag == _ORIENTATION:
            value = struct.unpack_from(f"{order}{_INTEGERS.get(kind, 'H')}", exif, start + 10 + 12 * k)[0]
            return value if 1 <= value <= 8 else None
    return None


def _png_chunks(stream: BinaryIO, pixels: bool) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Kind, content and checksum of the chunks that matter. Behind a chunk whose length is broken, reading continues at the next one that
    is needed and whose checksum is right."""
    size = stream.seek(0, os.SEEK_END)
    position, repairs = len(PNG), 0
    while position + 8 <= size:
        stream.seek(position)
        length, kind = struct.unpack(">I4s", stream.read(8))
        end = position + 12 + length
        critical = kind in (b"IHDR", b"IDAT")
        palette = kind == b"PLTE"  # kept with a wrong checksum, which is an error if it is needed; else it must not hide the pixels
        if kind == b"IEND":
            return
        broken = not kind.isalpha() or (end > size and not critical)
        if (not broken or palette) and (pixels or (kind in _TEXTS and length <= _TEXT_LIMIT)):
            content, crc = stream.read(length), stream.read(4)
            broken = not critical and crc != struct.pack(">I", zlib.crc32(kind + content))
            if critical or palette or (kind in _TEXTS and length <= _TEXT_LIMIT):  # with a wrong checksum, too: it may be all that is wrong
                yield kind, content, crc
        elif kind == b"IHDR":
            yield kind, stream.read(length), stream.read(4)
        if broken and repairs < _REPAIRS:
            repairs += 1
            found = _next_critical(stream, position + 4, size if end > size or not kind.isalpha() else end)
            position = end if found is None else found
        else:
            position = end


def _next_critical(stream: BinaryIO, start: int, stop: int) -> int | None:
    """Where a chunk begins, before `stop`, that is needed for the pixels and whose checksum is right."""
    stream.seek(start)
    rest = stream.read()
    for found in itertools.islice(re.finditer(rb"IDAT|PLTE|IEND", rest[: stop - start]), _REPAIRS):
        at = found.start() - 4
        if at >= 0:
            length = struct.unpack_from(">I", rest, at)[0]
            if rest[at + 8 + length : at + 12 + length] == struct.pack(">I", zlib.crc32(rest[at + 4 : at + 8 + length])):
                return start + at
    return None


def _png_text(kind: bytes, content: bytes) -> bytes:
    """The text of a text chunk, unpacked up to the limit; empty if it is broken."""
    _, _, text = content.partition(b"\0")
    packed = kind == b"zTXt"
    if kind == b"zTXt":
        text = text[1:]
    elif kind == b"iTXt":
        packed = text[:1] == b"\1"
        text = text[2:].split(b"\0", 2)[-1]
    try:
        return zlib.decompressobj().decompress(text, _TEXT_LIMIT) if packed else text
    except zlib.error:
        return b""


def _bare_png(data: bytes) -> tuple[bytes, int]:
    return png_parts(io.BytesIO(data))


def _bare_jpeg(data: bytes) -> tuple[bytes, int]:
    """Without comments and application segments, but for those that say how colours are stored (whole ones of JFIF and Adobe)."""
    parts, exif, xmp, i = [data[:2]], b"", b"", 2
    while True:
        while data[i] == 0xFF and data[i + 1] == 0xFF:  # padding
            i += 1
        if data[i] != 0xFF:
            raise ValueError("no marker")
        kind = data[i + 1]
        if kind == 0xDA:  # start of the scan
            return b"".join([*parts, data[i:]]), orientation(exif, xmp)
        if kind == 0x01 or 0xD0 <= kind <= 0xD7:  # without content
            i += 2
            continue
        length = struct.unpack_from(">H", data, i + 2)[0]
        segment = data[i : i + 2 + length]
        colours = (kind == 0xE0 and segment[4:9] == b"JFIF\0" and length >= 16) or (
            kind == 0xEE and segment[4:9] == b"Adobe" and length >= 14
        )
        if kind == 0xE1:
            exif = exif or (segment[4:] if segment[4:].startswith(_EXIF) else b"")
            xmp = xmp or (segment[4:] if segment[4:].startswith(_XMP) else b"")
        if colours or not (0xE0 <= kind <= 0xEF or kind == 0xFE):
            parts.append(segment)
        i += 2 + length


def _bare_webp(data: bytes) -> tuple[bytes, int]:
    parts, exif, xmp, i = [], b"", b"", 12
    while i + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, i)
        chunk = data[i : i + 8 + length + length % 2]
        if kind == b"VP8X":
            chunk = chunk[:8] + bytes([chunk[8] & 0b00010010]) + chunk[9:]  # alpha and animation, no profile, EXIF, XMP
        if kind in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            parts.append(chunk)
        elif kind == b"EXIF":
            exif = chunk[8:]
        elif kind == b"XMP ":
            xmp = chunk[8:]
        i += 8 + length + length % 2
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body, orientation(exif, xmp)


def _bare_gif(data: bytes) -> tuple[bytes, int]:
    """The first picture, with what says which of its colours is transparent."""

    def colours(flags: int) -> int:
        return 3 * (2 << (flags & 7)) if flags & 0x80 else 0

    i = 13 + colours(data[10])
    parts = [data[:i]]
    while True:
        start, kind = i, data[i]
        if kind == 0x21:
            i += 2
        elif kind == 0x2C:
            i += 10 + colours(data[i + 9]) + 1
        else:
            raise ValueError("no picture")
        while data[i]:
            i += 1 + data[i]
        i += 1
        if kind == 0x2C:
            return b"".join([*parts, data[start:i], b";"]), 1
        if data[start + 1 : start + 3] == b"\xf9\x04":  # graphic control
            parts.append(data[start:i])


def _bare_tiff(data: bytes) -> tuple[bytes, int]:
    """The same file with another first directory at its end, of the tags that say how to read the pixels (Pillow turns them itself)."""
    order = {b"II": "<", b"MM": ">"}[data[:2]]
    start = struct.unpack_from(f"{order}I", data, 4)[0]
    count = struct.unpack_from(f"{order}H", data, start)[0]
    entries = [data[start + 2 + 12 * k : start + 14 + 12 * k] for k in range(count)]
    kept = [e for e in entries if len(e) == 12 and struct.unpack_from(f"{order}H", e)[0] in _TIFF_PIXEL_TAGS]
    end = len(data) + len(data) % 2
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:4] + struct.pack(f"{order}I", end) + data[8:] + bytes(len(data) % 2) + directory, 1


_STRIP: dict[bytes, Callable[[bytes], tuple[bytes, int]]] = {
    PNG: _bare_png,
    b"\xff\xd8": _bare_jpeg,
    b"RIFF": _bare_webp,
    GIF: _bare_gif,
    b"II*\0": _bare_tiff,
    b"MM\0*": _bare_tiff,
}
