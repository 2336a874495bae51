"""A frontend that is lost: another one is asked as long as nothing was sent, and a stream ends with an error event."""

import asyncio
import json
import pydoc

import httpx
import pytest

from pipelines import environment
from pipelines.serving import resend
from pipelines.serving.resend import ATTEMPTS, Resend

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}


class Proxy:
    """Serve's proxy with frontends of which some are lost: it returns without having answered. One of a script at a time."""

    def __init__(self, *frontends):
        self._frontends = iter(frontends)
        self.bodies = []

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.bodies.append(body)
        scope["path"] = "/changed"
        for message in next(self._frontends):
            await send(message)


def whole(text):
    return [START, {"type": "http.response.body", "body": text}]


def begun(text):
    return [START, {"type": "http.response.body", "body": text, "more_body": True}]


async def parts():
    yield b"first "
    yield b"second"


def asked(proxy, path="/v1/chat/completions"):
    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(Resend(proxy)), base_url="http://proxy") as client:
            return await client.post(path, content=parts())

    return asyncio.run(ask())


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(resend, "PAUSE_S", 0)


@pytest.mark.parametrize("lost", [[], [START]], ids=["before its answer", "between head and body"])
def test_another_one_answers(lost):
    proxy = Proxy(lost, lost, whole(b"answer"))
    answer = asked(proxy)
    assert (answer.status_code, answer.content) == (200, b"answer")
    assert proxy.bodies == [b"first second"] * 3


def test_a_request_that_ends_frontends_does_not_end_all():
    proxy = Proxy(*[[]] * 10)
    answer = asked(proxy)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    assert answer.json()["error"]["code"] == "frontend_lost"
    assert len(proxy.bodies) == ATTEMPTS


@pytest.mark.parametrize(("path", "head"), [("/v1/chat/completions", ""), ("/v1/responses", "event: error\n")])
def test_a_stream_ends_with_an_error_event(path, head):
    proxy = Proxy(begun(b"data: {}\n\n"))
    events = asked(proxy, path).text.split("\n\n")
    assert events[0] == "data: {}"
    assert json.loads(events[1].removeprefix(f"{head}data: "))["error"]["code"] == "frontend_lost"
    assert len(proxy.bodies) == 1


def test_what_cannot_be_held_is_not_sent_again(monkeypatch):
    monkeypatch.setattr(resend, "HELD_BYTES", 8)
    proxy = Proxy([], whole(b"answer"))
    assert asked(proxy).status_code == 503
    assert proxy.bodies == [b"first second"]


def test_a_client_that_has_left_is_not_asked_for():
    async def leaves(scope, receive, send):
        calls.append(await receive())

    async def receive():
        return {"type": "http.disconnect"}

    calls, sent = [], []

    async def send(message):
        sent.append(message)

    middleware = Resend(leaves)
    asyncio.run(middleware({"type": "http", "path": "/"}, receive, send))
    assert (len(calls), sent, middleware.held) == (1, [], 0)


def test_nothing_is_kept():
    middleware = Resend(Proxy([], whole(b"answer")))

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(middleware), base_url="http://proxy") as client:
            await client.post("/", content=b"question")

    asyncio.run(ask())
    assert middleware.held == 0


def test_serve_finds_it():
    (found,) = pydoc.locate(environment.WORKER["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"])()
    assert found.cls is Resend
