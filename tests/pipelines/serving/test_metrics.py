"""Numbers of several processes as one page that Prometheus' own parser reads."""

import asyncio
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipelines.serving.metrics import Collector, Counted, EngineMetrics, FrontendMetrics, Reporter


def values(page: bytes) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sorted(f"{key}={value}" for key, value in sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def test_every_frontend_shows_the_numbers_of_all_processes(monkeypatch):
    """The collector is a real one; only the way to it is not Serve's."""
    monkeypatch.setattr("pipelines.serving.metrics.REPORT_S", 0.01)
    collector, loop = Collector(), asyncio.new_event_loop()

    def remote(*call):
        return SimpleNamespace(result=lambda timeout_s: asyncio.run(collector.report(*call)))

    handle = SimpleNamespace(report=SimpleNamespace(remote=remote))
    metrics = [FrontendMetrics(), FrontendMetrics()]
    watch = metrics[0].begin("a", 100)
    watch.part(3, False)
    watch.part(2, True)
    watch.lost()
    reporters = [Reporter(handle, f"frontend-{i}", one.registry) for i, one in enumerate(metrics)]
    reporters.append(Reporter(handle, "model-0", EngineMetrics("a", lambda: {"running": 3, "tokens": 70})))

    async def all_have_reported():
        async with asyncio.timeout(10):
            while len(reporters[1]._all) < 3:
                await asyncio.sleep(0.01)

    loop.run_until_complete(all_have_reported())
    metrics[1].begin("a", 7)
    found = values(reporters[1].exposition())
    assert found["molmo_prompt_tokens_total", "model=a", "process=frontend-0"] == 100
    assert found["molmo_prompt_tokens_total", "model=a", "process=frontend-1"] == 7, "of its own, as they are now"
    assert found["molmo_generated_tokens_total", "model=a", "process=frontend-0"] == 5
    assert found["molmo_time_to_first_token_seconds_count", "model=a", "process=frontend-0"] == 1
    assert found["molmo_time_per_token_seconds_count", "model=a", "process=frontend-0"] == 1
    assert found["molmo_lost_replicas_total", "model=a", "process=frontend-0"] == 1
    assert found["molmo_engine_running", "model=a", "process=model-0"] == 3
    assert found["molmo_engine_tokens_total", "model=a", "process=model-0"] == 70
    for reporter in reporters:
        reporter.close()
    loop.close()


@pytest.mark.parametrize(("route", "label"), [(SimpleNamespace(path="/v1/models"), "/v1/models"), (None, "other")])
def test_requests_are_counted_by_route_and_status(route, label):
    metrics = FrontendMetrics()

    async def app(scope, receive, send):
        scope["route"] = route
        await send({"type": "http.response.start", "status": 429})
        await send({"type": "http.response.body"})

    async def send(message):
        pass

    asyncio.run(Counted(app, lambda: metrics)({"type": "http", "path": "/v1/../anything"}, None, send))
    assert metrics.registry.get_sample_value("molmo_requests_total", {"route": label, "status": "429"}) == 1


def test_a_process_that_reports_no_more_is_left_out(monkeypatch):
    async def main():
        collector = Collector()
        await collector.report("old", [])
        monkeypatch.setattr("pipelines.serving.metrics.FORGET_S", 0.0)
        return await collector.report("new", [])

    assert "old" not in asyncio.run(main())
