"""The host of an engine without Serve: order of events, refusal, cancelling, and what happens when an engine fails."""

import asyncio
import pickle
import threading
import time
from types import SimpleNamespace

import pytest

from molmo_core.generation.engine.requests import End, Token
from molmo_core.nn.float8 import Float8Linear
from pipelines.serving.chat import ChatService
from pipelines.serving.config import ServeConfig
from pipelines.serving.errors import ApiError, queue_full
from pipelines.serving.host import Host
from pipelines.serving.metrics import FrontendMetrics
from pipelines.serving.remote import RemotePieces
from pipelines.serving.replica import Replica
from pipelines.serving.wire import Inbox


class Count:
    """A request for the answer 1, 2, ..., n."""

    def __init__(self, n):
        self.n, self.given, self.times = n, 0, None


class Counting:
    """An engine that answers `Count`s, two at a time. It stands still while `gate` is closed."""

    def __init__(self):
        self.tokens = 0
        self.requests = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False

    @property
    def active(self):
        return len(self.requests)

    @property
    def running(self):
        return min(2, len(self.requests))

    def add(self, request):
        if not isinstance(request.n, int):
            raise ValueError(f"not a number: {request.n}")
        self.requests.append(request)

    def abort(self, request):
        if request in self.requests:
            self.requests.remove(request)

    def step(self):
        events = []
        if self.requests:
            self.gate.wait()
        if self.broken:
            raise OSError("the device is gone")
        for request in self.requests[:2]:
            request.given += 1
            self.tokens += 1
            events.append((request, Token(request.given)))
            if request.given == request.n:
                events.append((request, End("length")))
                self.requests.remove(request)
        return events


@pytest.fixture
def engine():
    return Counting()


@pytest.fixture
def host(engine):
    host = Host(engine, places=5, batch_wait_s=0.01)
    yield host
    engine.gate.set()
    host.close()


async def collect(host, request) -> tuple[list[int], str | None]:
    pieces = []
    await host.answer(request, pieces.append)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    return [token for piece in pieces for token in piece.tokens], pieces[-1].finish_reason


async def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_answers_are_whole_and_in_order(host, engine):
    async def main():
        sizes = [5, 1, 300, 2, 40]
        answers = await asyncio.gather(*(collect(host, Count(size)) for size in sizes))
        assert answers == [(list(range(1, size + 1)), "length") for size in sizes]

    asyncio.run(main())
    assert host.load() == {"active": 0, "waiting": 0, "tokens": 348}


def test_a_step_wakes_the_event_loop_once(host, engine):
    async def main():
        wakes, loop = 0, asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def counted(*call):
            nonlocal wakes
            wakes += 1
            return wake(*call)

        loop.call_soon_threadsafe = counted
        await asyncio.gather(*(collect(host, Count(100)) for _ in range(2)))
        return wakes

    assert asyncio.run(main()) < 120, "200 tokens"


def test_with_many_answers_several_tokens_travel_together(host, engine, monkeypatch):
    monkeypatch.setattr("pipelines.serving.host.TELL_S", 0.05)

    async def main():
        pieces = []
        answers = await asyncio.gather(host.answer(Count(300), pieces.append), collect(host, Count(1)), collect(host, Count(40)))
        assert [token for piece in pieces for token in piece.tokens] == list(range(1, 301))
        assert answers[1:] == [([1], "length"), (list(range(1, 41)), "length")]
        return len(pieces)

    assert asyncio.run(main()) < 100, "300 tokens"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_ended_before_the_engine_failed_is_told(host, engine, monkeypatch):
    monkeypatch.setattr("pipelines.serving.host.TELL_S", 1000.0)

    async def main():
        long = asyncio.create_task(collect(host, Count(10**6)))
        await until(lambda: engine.tokens > 0)
        three = Count(3)
        short = asyncio.create_task(collect(host, three))
        await until(lambda: three.given == 3)
        engine.broken = True
        assert await short == ([1, 2, 3], "length")
        with pytest.raises(ApiError, match="stopped"):
            await long

    asyncio.run(main())


def test_a_full_queue_refuses_at_once_and_works_again(host, engine):
    async def main():
        engine.gate.clear()
        held = [asyncio.create_task(collect(host, Count(3))) for _ in range(5)]
        await until(lambda: host.load()["active"] == 2)
        for _ in range(50):
            with pytest.raises(ApiError) as caught:  # while the engine stands still: who waited would wait for ever
                await asyncio.wait_for(collect(host, Count(3)), 10)
            assert caught.value.status == 429
            assert caught.value.headers == {"Retry-After": "1"}
            assert caught.value.body()["error"]["type"] == "rate_limit_error"
        assert host.load()["waiting"] == 3
        engine.gate.set()
        assert await asyncio.gather(*held) == [([1, 2, 3], "length")] * 5
        assert await collect(host, Count(2)) == ([1, 2], "length")

    asyncio.run(main())


def test_one_who_leaves_frees_the_place(host, engine):
    async def main():
        begun = asyncio.Event()
        task = asyncio.create_task(host.answer(Count(10**9), lambda piece: begun.set()))
        await begun.wait()
        task.cancel()
        await until(lambda: host.load()["active"] == 0)
        engine.gate.clear()
        waiting = [asyncio.create_task(collect(host, Count(10**9))) for _ in range(5)]
        await until(lambda: host.load()["active"] == 2)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        engine.gate.set()
        assert await collect(host, Count(2)) == ([1, 2], "length")

    asyncio.run(main())


def test_one_who_leaves_before_the_engine_hears_of_it_costs_nothing(host, engine, monkeypatch):
    entered, gate, add = threading.Event(), threading.Event(), engine.add

    def slow(request):
        entered.set()
        assert gate.wait(10)
        add(request)

    monkeypatch.setattr(engine, "add", slow)

    async def main():
        first = asyncio.create_task(collect(host, Count(3)))
        await until(entered.is_set)
        second = asyncio.create_task(collect(host, Count(10**9)))
        await until(lambda: host.load()["waiting"] == 2)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        gate.set()
        assert await first == ([1, 2, 3], "length")
        assert await collect(host, Count(2)) == ([1, 2], "length")

    asyncio.run(main())
    assert engine.requests == []


def test_a_request_that_fails_does_so_alone(host):
    async def main():
        good, bad = await asyncio.gather(collect(host, Count(4)), collect(host, Count("four")), return_exceptions=True)
        assert good == ([1, 2, 3, 4], "length")
        assert isinstance(bad, ValueError)

    asyncio.run(main())
    host.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_stops_leaves_nobody_waiting(host, engine):
    """Neither those in work nor those in the queue nor those who come later; Serve learns of it by `check`."""

    async def main():
        engine.gate.clear()
        held = [asyncio.create_task(collect(host, Count(10**9))) for _ in range(4)]
        await until(lambda: host.load()["active"] == 2)
        engine.broken = True
        engine.gate.set()
        for error in await asyncio.gather(*held, return_exceptions=True):
            assert isinstance(error, ApiError)
            assert (error.status, error.code) == (503, "replica_lost")
        await until(lambda: not host._thread.is_alive())
        with pytest.raises(ApiError, match="has stopped"):
            await collect(host, Count(1))

    asyncio.run(main())
    with pytest.raises(RuntimeError, match="the device is gone"):
        host.check()


def test_errors_travel_between_processes():
    for error in (queue_full(), ApiError(400, "bad", "messages[0]", "code")):
        again = pickle.loads(pickle.dumps(error))
        assert (again.status, again.message, again.param, again.code) == (error.status, error.message, error.param, error.code)
        assert str(again) == error.message


@pytest.fixture(scope="module")
def replica(tiny_checkpoint):
    return Replica(ServeConfig(model=str(tiny_checkpoint), max_batch_size=4, max_queued_requests=20), str(tiny_checkpoint))


def test_a_replica_with_weights_in_float8(tiny_checkpoint):
    replica = Replica(ServeConfig(model=str(tiny_checkpoint), quantization="float8"), str(tiny_checkpoint))
    blocks = replica._host._engine.model.transformer.blocks
    assert all(isinstance(block.ff_out, Float8Linear) for block in blocks)


def test_a_replica_answers_as_its_model(replica, tiny_model):
    """From a request to its text without Serve: what the model itself generates, whoever else asks, at whatever edge."""
    preprocess = tiny_model.config.build_preprocessor(for_inference=True, is_training=False)
    limit = 6

    metrics = FrontendMetrics()
    inbox, handle = Inbox(), SimpleNamespace(answer=SimpleNamespace(remote=lambda *call: asyncio.ensure_future(replica.answer(*call))))
    service = ChatService(
        ServeConfig(model="m", name="m"), tiny_model.config, lambda *call: RemotePieces(handle, inbox, *call, 600, metrics.begin("m", 1))
    )

    async def ask(text, **settings):
        body = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": limit, "seed": 1, **settings}
        return (await (await service.start(body)).whole())["choices"][0]["message"]["content"]

    texts = ["what shape is this?", "why", "is there a red shape in the image?", "hello"]
    edges = [
        *({"temperature": value} for value in (0, 5e-324, 1e-300, 1e-40, 2)),
        *({"temperature": 1, "top_p": value} for value in (5e-324, 1e-300, 1e-40, 1)),
        *({"temperature": 1, "seed": value} for value in (0, 2**32, 2**62, 2**63 - 1, -(2**63))),
        *({"max_tokens": value} for value in (1, 100)),
    ]

    async def main():
        await inbox.open("127.0.0.1")
        return await asyncio.gather(*(ask(text) for text in texts), *(ask("edge", **edge) for edge in edges))

    answers = asyncio.run(main())
    for text, answer in zip(texts, answers):
        example = preprocess({"messages": [{"role": "user", "content": text}]})
        assert answer == tiny_model.generate(**example, max_new_tokens=limit).text[0].lstrip()
    example = preprocess({"messages": [{"role": "user", "content": "edge"}]})
    greedy = tiny_model.generate(**example, max_new_tokens=limit).text[0].lstrip()
    assert [answers[4 + i] for i in (0, 1, 2, 3, 5, 6, 7)] == [greedy] * 7, "as good as zero"
    assert all(answers)
    replica.check_health()
