"""A frontend's HTTP side in this process: its own application and a replica's engine; only what Serve gives it stands in for Serve."""

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from pipelines.serving.config import ServeConfig
from pipelines.serving.frontend import Frontend, api
from pipelines.serving.metrics import Collector
from pipelines.serving.replica import Replica


def handle(**methods):
    """What looks like a handle: each method gives a task."""
    return SimpleNamespace(
        **{name: SimpleNamespace(remote=lambda *a, m=method: asyncio.ensure_future(m(*a))) for name, method in methods.items()}
    )


@pytest.fixture(scope="module")
def replica(tiny_checkpoint):
    return Replica(ServeConfig(model=str(tiny_checkpoint), max_batch_size=4, max_queued_requests=2), str(tiny_checkpoint))


@pytest.fixture
def talk(replica, tiny_checkpoint, monkeypatch):
    """`talk(test)` runs `await test(client)` with a frontend of two models."""

    def run(test):
        async def main():
            models = [{"model": str(tiny_checkpoint), "name": name, "max_new_tokens": 4} for name in ("one", "two")]
            config = ServeConfig.from_dict({"models": models, "media_workers": 1})
            collector = Collector()
            own = Frontend.__mro__[1]  # without what Serve puts around it
            frontend = own.__new__(own)
            identity = SimpleNamespace(deployment_id=SimpleNamespace(name="frontend"), unique_id="1")
            context = SimpleNamespace(replica_id=identity, servable_object=frontend)
            monkeypatch.setattr(serve, "get_replica_context", lambda: context)
            replicas = handle(answer=replica.answer, load=replica.load)
            reports = SimpleNamespace(
                report=SimpleNamespace(remote=lambda *a: SimpleNamespace(result=lambda timeout_s: asyncio.run(collector.report(*a))))
            )
            served = [(one, str(tiny_checkpoint), replicas) for one in config.each]
            await own.__init__(frontend, config, served, reports, {}, [], [])
            transport = httpx.ASGITransport(app=api)
            async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60) as client:
                await test(client)

        asyncio.run(main())

    return run


def chat(model="one", **settings):
    return {"model": model, "messages": [{"role": "user", "content": "hello"}], **settings}


def test_models_are_chosen_by_name(talk):
    async def test(client):
        listed = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["one", "two"]
        assert (await client.get("/v1/models/two")).json()["id"] == "two"
        for name in ("one", "two"):
            answer = (await client.post("/v1/chat/completions", json=chat(name))).json()
            assert answer["model"] == name
            assert answer["usage"]["completion_tokens"] == 4
        for response in (await client.get("/v1/models/three"), await client.post("/v1/chat/completions", json=chat("three"))):
            assert response.status_code == 404
            assert "this server has 'one', 'two'" in response.json()["error"]["message"]
        for body in (b"[]", b'{"model": 1}', b'{"model": "\\ud83d"}', b"{"):
            assert (await client.post("/v1/chat/completions", content=body)).status_code == 400
        assert (await client.get("/ready")).json() == {"status": "ready"}

    talk(test)


def test_metrics_count_what_was_answered(talk):
    async def test(client):
        await client.post("/v1/chat/completions", json=chat("two", stream=True))
        await client.get("/v1/models")
        page = (await client.get("/metrics")).text
        samples = {
            (s.name, s.labels.get("model") or s.labels.get("route")): s.value
            for family in text_string_to_metric_families(page)
            for s in family.samples
        }
        assert samples["molmo_generated_tokens_total", "two"] == 4
        assert samples["molmo_time_to_first_token_seconds_count", "two"] == 1
        assert samples["molmo_answer_seconds_count", "two"] == 1
        assert samples["molmo_requests_total", "/v1/models"] == 1
        assert samples["molmo_requests_total", "/v1/chat/completions"] == 1

    talk(test)


def test_a_full_queue_is_a_429_and_the_rest_answers(talk):
    async def test(client):
        long = chat("one", max_tokens=3000, ignore_eos=True)
        held = [asyncio.create_task(client.post("/v1/chat/completions", json=long)) for _ in range(6)]
        load = 0
        async with asyncio.timeout(30):
            while load < 6:
                await asyncio.sleep(0.01)
                page = (await client.get("/metrics")).text
                assert (await client.get("/health")).status_code == 200
                response = await client.post("/v1/chat/completions", json=chat("one", max_tokens=1))
                load = 6 if response.status_code == 429 else load
        assert page
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        async with asyncio.timeout(30):
            while (await client.post("/v1/chat/completions", json=chat("one", max_tokens=1))).status_code != 200:
                await asyncio.sleep(0.01)

    talk(test)
