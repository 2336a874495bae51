"""Remote images are fetched ahead, in order, and one that cannot be costs its example only."""

from __future__ import annotations

import concurrent.futures
import http.server
import threading
import time

import pytest

from pipelines.data.records.fetching import fetched
from pipelines.data.rejects import Rejected


class Slow(http.server.BaseHTTPRequestHandler):
    """Answers with the path, after a while; `/missing` is not there. Notes how many wait at the same time."""

    lock, waiting, most = threading.Lock(), 0, 0

    def do_GET(self):
        with self.lock:
            Slow.waiting += 1
            Slow.most = max(Slow.most, Slow.waiting)
        time.sleep(0.2)
        with self.lock:
            Slow.waiting -= 1
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        self.wfile.write(self.path.encode())

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def server():
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def test_many_at_a_time_and_in_order(server):
    examples = [{"image": f"{server}/{i}"} for i in range(48)]
    examples[7] = {"image": f"{server}/missing"}
    examples[9] = Rejected("record: no text")
    examples[11] = {"images": [f"{server}/a", b"c"]}
    examples[12] = {"video": f"{server}/film.mp4"}
    examples[13] = {"messages": []}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(fetched(iter(examples), pool))
    assert Slow.most > 4
    assert [e["image"] for e in found[:7]] == [f"/{i}".encode() for i in range(7)]
    assert isinstance(found[7], Rejected)
    assert found[7].reason == "media: unreadable URL"
    assert found[9] is examples[9]
    assert found[11] == {"images": [b"/a", b"c"]}
    assert found[12:14] == examples[12:14]
    assert found[-1] == {"image": b"/47"}


def test_no_more_than_needed_is_opened(server):
    """Of a long stream a bounded part is opened ahead."""
    opened = []

    def examples():
        for i in range(1000):
            opened.append(i)
            yield {"image": f"/local/{i}.png"}

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        stream = fetched(examples(), pool)
        assert next(stream) == {"image": "/local/0.png"}
    assert len(opened) < 50
