"""Records for the data tests: small real files, and one of every way in which a file can be broken."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image


def picture(path: Path, size=(40, 30), seed=0, **kwargs) -> Path:
    """Writes a picture of noise and returns its path."""
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **kwargs)
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
    return SimpleNamespace(picture=picture, chat=chat, write_jsonl=write_jsonl, corrupt_corpus=corrupt_corpus)


@pytest.fixture
def good_records(tmp_path) -> Path:
    """40 records: pictures of several sizes, a text-only one, a message tree."""
    rows = [chat(picture(tmp_path / f"{i}.png", (20 + i, 30), seed=i).name, answer=f"Noise number {i}.") for i in range(38)]
    rows.append(chat(question="How are you?", answer="Well."))
    rows.append({"image": "0.png", "message_list": [{"style": "demo", "question": f"{k}?", "answer": str(k)} for k in range(4)]})
    return write_jsonl(tmp_path / "good.jsonl", rows)


def corrupt_corpus(folder: Path) -> tuple[list, list[str]]:
    """(rows, start of the expected reason of each): what is found in the wild. Files are written to `folder`."""
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
    cases += [
        (chat("corrupt/text.jpg"), "image: undecodable"),
        (chat("corrupt/empty.png"), "media: empty file"),
        (chat("corrupt/nowhere.png"), "media: missing file"),
        (chat("corrupt/folder.png"), "media: a folder"),
        (chat("corrupt/bomb.png"), "image: too many pixels"),
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
