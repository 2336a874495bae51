"""Requests to the whole application become traces in a real MLflow server: with their spans, and with the picture."""

import io
import itertools
import time

import mlflow
import numpy as np
import openai
import pytest
from PIL import Image

from pipelines import cluster
from pipelines.serving import client
from pipelines.serving.app import serving
from pipelines.serving.config import ServeConfig
from pipelines.serving.port import free_port

pytestmark = pytest.mark.slow
PARTS = ("media", "queue", "prefill", "decode")


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def traced(mlflow_server, tiny_checkpoint):
    """The API of a server whose traces go to an experiment, and the tracking client with the experiment's id."""
    tracking = mlflow.MlflowClient(mlflow_server)
    experiment = tracking.create_experiment("serving")
    settings = {"max_new_tokens": 12, "trace_endpoint": f"{mlflow_server}/v1/traces", "trace_sample": 1.0, "trace_content": True}
    config = ServeConfig(model=str(tiny_checkpoint), name="tiny", port=free_port(), **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"x-mlflow-experiment-id={experiment}")
        with cluster.connect(num_cpus=2, object_store_memory=256 << 20), serving(config) as url:
            yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120), tracking, experiment


def traces(tracking, experiment, count):
    """The newest first. Spans are sent every few seconds, that of the whole request with the last of them."""
    deadline = time.monotonic() + 60
    while True:
        found = tracking.search_traces(locations=[experiment])
        states = [trace.info.state for trace in found]
        if len(found) == count and "IN_PROGRESS" not in states:
            return found
        assert time.monotonic() < deadline, states
        time.sleep(0.5)


@pytest.mark.parametrize("mlflow_server", ["sqlite"], indirect=True)
def test_a_request_is_a_trace(traced):
    api, tracking, experiment = traced
    body = client.request("tiny", "what is this?", picture(), max_tokens=6)
    plain = api.chat.completions.create(**body)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in api.chat.completions.create(**body, stream=True))
    both = traces(tracking, experiment, 2)
    assert [trace.info.state for trace in both] == ["OK", "OK"]
    for trace, text in zip(both, (streamed, plain.choices[0].message.content)):
        spans = {span.name: span for span in trace.data.spans}
        root = spans["chat tiny"]
        assert {span.parent_id for name, span in spans.items() if name in PARTS} == {root.span_id}
        own = [spans[name] for name in PARTS]
        for before, after in itertools.pairwise(own):
            assert before.end_time_ns <= after.start_time_ns, f"{before.name} ends before {after.name} begins"
        durations = [span.end_time_ns - span.start_time_ns for span in own]
        assert all(duration > 0 for duration in durations)
        assert sum(durations) <= root.end_time_ns - root.start_time_ns
        assert root.inputs["messages"] == body["messages"], "with the picture"
        assert root.outputs["choices"][0]["message"]["content"] == text
        assert root.attributes["gen_ai.usage.output_tokens"] == plain.usage.completion_tokens
        assert trace.info.token_usage["input_tokens"] == plain.usage.prompt_tokens
