"""Records for the data tests: small real files, and one of every way in which a file can be broken."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image


def picture(path: Path, size=(40, 30), seed=0, **kwargs) -> Path:
    """Writes a picture of noise and returns its path."""
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **kwargs)
    return path


def clip(path: Path, frames=20, front=True, format=None) -> Path:
    """Writes a small h264 clip of noise; `front`: with its index in front of the frames, as for the web."""
    with av.open(str(path), "w", format=format, options={"movflags": "faststart"} if front else {}) as container:
        stream = container.add_stream("libx264", rate=10, width=64, height=48, pix_fmt="yuv420p")
        for t in range(frames):
            pixels = np.random.RandomState(t).randint(0, 256, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def chat(image=None, question="What is this?", answer="Noise.", **fields) -> dict:
    """A chat record."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return ({} if image is None else {"image": image}) | {"messages": messages} | fields


def write_jsonl(path: Path, rows: list) -> Path:
    """One row a line; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The functions of this file."""
    return SimpleNamespace(picture=picture, clip=clip, chat=chat, write_jsonl=write_jsonl, corrupt_corpus=corrupt_corpus)


@pytest.fixture
def good_records(tmp_path) -> Path:
    """40 records: pictures of several sizes, a text-only one, a message tree."""
    rows = [chat(picture(tmp_path / f"{i}.png", (20 + i, 30), seed=i).name, answer=f"Noise number {i}.") for i in range(38)]
    rows.append(chat(question="How are you?", answer="Well."))
    rows.append({"image": "0.png", "message_list": [{"style": "demo", "question": f"{k}?", "answer": str(k)} for k in range(4)]})
    return write_jsonl(tmp_path / "good.jsonl", rows)


def corrupt_corpus(folder: Path) -> tuple[list, list[str]]:
    """(rows, expected reason of each): what is found in the wild, for a model that takes images and videos.

    Files are written to `folder`, the folder `corrupt` beside the records; the records also refer to a good `0.png` there.
    """
    folder.mkdir(exist_ok=True)
    cases: list[tuple[object, str]] = []
    for kind in ("jpeg", "png", "webp", "gif"):
        whole = picture(folder / f"whole.{kind}", (200, 150)).read_bytes()
        (folder / f"truncated.{kind}").write_bytes(whole[: len(whole) // 2])
        cases.append((chat(f"corrupt/truncated.{kind}"), "image: undecodable"))
    (folder / "text.jpg").write_text("<html>404</html>")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir(exist_ok=True)
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "text.mp4").write_text("<html>404</html>")
    (folder / "empty.mp4").write_bytes(b"")
    whole = clip(folder / "whole.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    unfinished = clip(folder / "other.mp4", front=False).read_bytes()
    (folder / "unfinished.mp4").write_bytes(unfinished[: len(unfinished) // 2])

    def video(name: str) -> dict:
        return chat(video=f"corrupt/{name}")

    cases += [
        (chat("corrupt/text.jpg"), "image: undecodable"),
        (chat("corrupt/empty.png"), "media: empty file"),
        (chat("corrupt/nowhere.png"), "media: missing file"),
        (chat("corrupt/folder.png"), "media: a folder, not a file"),
        (chat("corrupt/bomb.png"), "image: too many pixels"),
        (chat("corrupt/whole.mp4"), "image: undecodable"),
        (video("truncated.mp4"), "video: undecodable"),
        (video("unfinished.mp4"), "video: undecodable"),
        (video("text.mp4"), "video: undecodable"),
        (video("empty.mp4"), "media: empty file"),
        (video("nowhere.mp4"), "media: missing file"),
        (video("folder.png"), "media: a folder, not a file"),
        (chat(video="http://127.0.0.1:9/x.mp4"), "media: unreadable URL"),
        (chat("http://127.0.0.1:9/x.jpg"), "media: unreadable URL"),
        (chat("data:image/png;base64,????"), "media: unreadable URL"),
        (chat("corrupt/nul\0.png"), "media: unreadable file"),
        (b'{"image": "0.png", "messages": [{"role": "user", "content": "\xff\xfe"}]}', "record: not UTF-8"),
        (b'{"image": "0.png", "messages"', "record: not JSON"),
        (b"[1, 2, 3]", "record: not an object"),
        ({"image": "0.png"}, "record: no text"),
        ({"image": "0.png", "messages": []}, "record: no messages"),
        ({"image": "0.png", "messages": [{"role": "user", "content": "only a question"}]}, "record: no answer"),
        ({"image": "0.png", "messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]}, "record: bad message"),
        ({"image": 7, "messages": ["a", "b"]}, "record: bad field"),
        ({"image": "0.png", "message_list": []}, "record: no annotations"),
        ({"image": "0.png", "message_list": [{"style": "demo", "question": "a", "answer": "b"}] * 10_000}, "record: too many annotations"),
        (chat("corrupt/whole.png", answer=" "), "record: bad field"),
    ]
    return [row for row, _ in cases], [reason for _, reason in cases]


def bomb() -> bytes:
    """A small file that says it has 30,000 x 30,000 pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
