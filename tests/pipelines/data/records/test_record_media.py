"""Fetching media: every form of URL, and whatever a row may hold instead of one."""

from __future__ import annotations

import functools
import http.server
import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from pipelines.data.records import media
from pipelines.data.records.media import fetch
from pipelines.data.rejects import Rejected


@contextmanager
def serving(folder, port=0):
    """The port of a server of a folder."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def rejected(reference: str) -> Rejected:
    with pytest.raises(Rejected) as found:
        fetch(reference)
    json.dumps(str(found.value), ensure_ascii=False).encode()  # can be written into a report
    return found.value


def test_file_urls(tmp_path):
    for name in ("a b.png", "é.png", "100%25.png", "50% off#1?.png"):
        (tmp_path / name).write_bytes(b"x")
    for written, name in {
        "a%20b.png": "a b.png",
        "a b.png": "a b.png",
        "%C3%A9.png": "é.png",
        "100%25.png": "100%25.png",  # there is a file of that very name
        "50% off#1?.png": "50% off#1?.png",
    }.items():
        for base in (f"file://{tmp_path}", f"file://localhost{tmp_path}"):
            assert fetch(f"{base}/{written}") == str(tmp_path / name)
    assert rejected(f"file://{tmp_path}/none%20.png").reason == "media: missing file"


def test_http_urls_as_people_write_them(tmp_path):
    (tmp_path / "é ü").mkdir()
    for name in ("a b.png", "é ü/100%.png", "c+d(1).png"):
        (tmp_path / name).write_bytes(name.encode())
    with serving(tmp_path) as port:
        base = f"http://127.0.0.1:{port}"
        for written, name in {
            "a b.png": "a b.png",
            "a%20b.png": "a b.png",
            "é ü/100%.png": "é ü/100%.png",
            "%C3%A9%20ü/100%25.png?size=a b#part": "é ü/100%.png",
            "c+d(1).png": "c+d(1).png",
        }.items():
            assert fetch(f"{base}/{written}") == name.encode()
        assert "404" in rejected(f"{base}/none.png").detail
        assert fetch(f"{base}/a b.png"), "a missing file says nothing of its host"


def test_nothing_in_a_row_raises_anything_else(tmp_path):
    (tmp_path / "broken.zip").write_bytes(b"no zip")
    (tmp_path / "broken.tar").write_bytes(b"no tar")
    for reference in (
        f"zip://a.png::{tmp_path}/broken.zip",
        f"tar://a.png::{tmp_path}/broken.tar",
        "nosuchprotocol://x/y",
        "http://127.0.0.1/\ud800.png",
        "http://\ud800/a.png",
        "http://[::1/a.png",
        "http://a b/a.png",
        "http:///a.png",
        "memory\ud800://a.png",
        "data:image/png,\ud800",
        "data:image/png;base64,é",
    ):
        assert rejected(reference).reason == "media: unreadable URL", reference
    for reference in ("\ud800.png", "file:///\ud800.png", "a\0b.png"):
        assert rejected(reference).reason == "media: unreadable file"


@pytest.mark.parametrize("listening", [False, True], ids=["refuses", "never answers"])
def test_dead_hosts_are_left_alone_for_a_while(tmp_path, monkeypatch, listening):
    monkeypatch.setattr(media, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(media, "ATTEMPTS", 2)
    monkeypatch.setattr(media, "DEAD_S", 1.0)
    (tmp_path / "a.png").write_bytes(b"x")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        if not listening:
            taken.close()
        first = rejected(f"http://127.0.0.1:{port}/a.png")
        assert ("timed out" if listening else "refused") in first.detail
    with serving(tmp_path, port):
        second = rejected(f"http://127.0.0.1:{port}/a.png")
        assert second.reason == first.reason
        assert second.detail.startswith(first.detail)
        assert "left alone for 1 s" in second.detail
        time.sleep(1.0)
        assert fetch(f"http://127.0.0.1:{port}/a.png") == b"x"
