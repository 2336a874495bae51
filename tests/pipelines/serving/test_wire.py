"""From a replica to a frontend without Serve: parts in order, strangers, and either end going away in the middle."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import WorkerCrashedError

from molmo_core.generation.engine.requests import SamplingParams, TokenLogprobs
from pipelines.serving.errors import ApiError, queue_full
from pipelines.serving.metrics import FrontendMetrics
from pipelines.serving.pieces import Piece
from pipelines.serving.remote import ATTEMPTS, RemotePieces
from pipelines.serving.wire import Address, ConnectionLost, Inbox, Outboxes


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def connected(test):
    """Runs a test with an inbox and the outbox of a replica."""

    async def main():
        inbox, outboxes = Inbox(), Outboxes()
        await inbox.open("127.0.0.1")
        try:
            await test(inbox, await outboxes.to(inbox.address))
        finally:
            inbox.close()

    asyncio.run(main())


def test_parts_arrive_in_order_and_together():
    async def test(inbox, outbox):
        got = {}
        numbers = [inbox.expect(got.setdefault(i, []).append) for i in range(3)]
        written, write = [], outbox._transport.write
        outbox._transport = SimpleNamespace(write=lambda data: (written.append(data), write(data)))
        for step in range(4):
            for number in numbers:
                outbox.send(number, Piece([step, number], "stop" if step == 3 else None))
            await asyncio.sleep(0)
        await until(lambda: all(len(parts) == 4 for parts in got.values()))
        assert got[1] == [Piece([0, 1], None), Piece([1, 1], None), Piece([2, 1], None), Piece([3, 1], "stop")]
        assert len(written) == 4, "one message for each step"

    connected(test)


def test_a_stranger_is_not_heard():
    async def test(inbox, outbox):
        got = []
        number = inbox.expect(got.append)
        other = await Outboxes().to(Address(inbox.address.host, inbox.address.port, b"x" * 32))
        other.send(number, Piece([666], None))
        await until(lambda: other.lost)
        with pytest.raises(ConnectionLost):
            async with other.work():
                await asyncio.sleep(10)
        piece = Piece([1], "stop", [TokenLogprobs(-0.5, [(1, -0.5), (7, float("-inf"))])], places=[1_000_000])
        outbox.send(number, piece)
        await until(lambda: got)
        assert got == [piece._replace(logprobs=[TokenLogprobs(-0.5, [[1, -0.5], [7, float("-inf")]])])]

    connected(test)


def test_a_frontend_that_is_gone_ends_the_work_for_it():
    async def test(inbox, outbox):
        begun = asyncio.Event()

        async def answer():
            async with outbox.work():
                begun.set()
                await asyncio.sleep(60)

        task = asyncio.create_task(answer())
        await begun.wait()
        outbox._transport.abort()
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(task, 10)
        inbox.close()
        with pytest.raises(OSError):
            await Outboxes().to(inbox.address)

    connected(test)


class Replicas:
    """A handle of replicas in this process, which count up from 0 and go on counting where another one stopped."""

    def __init__(self, fail):
        self.answer = SimpleNamespace(remote=lambda *call: asyncio.ensure_future(self._answer(*call)))
        self.fail, self.asked, self.ended = fail, [], asyncio.Event()

    async def _answer(self, example, params, begun, to, number):
        self.asked.append(list(begun[0]))
        outbox = await Outboxes().to(to)
        outbox.send(number, Piece([], None))
        try:
            async with outbox.work():
                for token in range(len(begun[0]), params.max_tokens):
                    await self.fail(token, outbox)
                    outbox.send(number, Piece([token], "length" if token == params.max_tokens - 1 else None))
                    await asyncio.sleep(0.001)
        finally:
            self.ended.set()


def answered(fail, count=6, timeout_s=10, taken=None):
    """The tokens of an answer from failing replicas, and with how many tokens each was asked."""

    async def main():
        inbox, replicas = Inbox(), Replicas(fail)
        await inbox.open("127.0.0.1")
        pieces, tokens = RemotePieces(replicas, inbox, {}, SamplingParams(max_tokens=count), timeout_s, FrontendMetrics().begin("m", 1)), []
        try:
            piece = Piece([], None)
            while piece.finish_reason is None and (taken is None or len(tokens) < taken):
                piece = await pieces.__anext__()
                tokens += piece.tokens
            if taken is not None:
                del pieces
            await asyncio.wait_for(replicas.ended.wait(), 10)
            return tokens, replicas.asked
        finally:
            inbox.close()

    return asyncio.run(main())


def test_another_replica_goes_on_where_one_was_lost():
    async def fail(token, outbox):
        if token in (0, 3, 5) and token not in lost:
            await asyncio.sleep(0.01)
            lost.append(token)
            outbox._transport.abort()
            await asyncio.sleep(60)

    lost = []
    tokens, asked = answered(fail)
    assert tokens == list(range(6))
    assert asked == [[], [], [0, 1, 2], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("error", [WorkerCrashedError(), ConnectionResetError(), asyncio.CancelledError()], ids=repr)
def test_another_replica_goes_on_whatever_happened_to_the_call(error):
    async def fail(token, outbox):
        if token == 2 and not lost:
            await asyncio.sleep(0.01)
            lost.append(token)
            raise error

    lost = []
    assert answered(fail) == (list(range(6)), [[], [0, 1]])


def test_a_request_that_ends_every_replica_does_not_end_all_of_them():
    async def fail(token, outbox):
        outbox._transport.abort()
        await asyncio.sleep(60)

    with pytest.raises(ApiError, match=f"{ATTEMPTS} replicas of the model were lost") as caught:
        answered(fail)
    assert (caught.value.status, caught.value.code) == (503, "replica_lost")


async def _refuse(token, outbox):
    raise queue_full()


async def _wait(token, outbox):
    await asyncio.sleep(60)


@pytest.mark.parametrize(("fail", "status"), [(_refuse, 429), (_wait, 504)])
def test_refusal_and_deadline(fail, status):
    with pytest.raises(ApiError) as caught:
        answered(fail, timeout_s=10 if status == 429 else 0.1)
    assert caught.value.status == status


def test_who_drops_an_answer_stops_the_work():
    async def fail(token, outbox):
        pass

    tokens, _ = answered(fail, 10**6, taken=3)
    assert len(tokens) < 100
