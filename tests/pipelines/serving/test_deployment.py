"""Several models in one server, and the application of a YAML file as `serve deploy` takes it."""

import concurrent.futures
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai
import pytest
import ray
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from molmo_core.config import ConfigError
from pipelines import cluster
from pipelines.serving import app as module
from pipelines.serving.app import app, serving
from pipelines.serving.config import ServeConfig
from pipelines.serving.port import free_port

ROOT = Path(__file__).parents[3]


def ask(api, model, text="hello", **settings):
    messages = [{"role": "user", "content": text}]
    return api.chat.completions.create(model=model, messages=messages, max_tokens=24, **settings)


def wait_until(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def api(tiny_checkpoint):
    one = {"model": str(tiny_checkpoint), "name": "one", "max_batch_size": 4, "cpus_per_replica": 0.5}
    scaled = {"model": str(tiny_checkpoint), "name": "scaled", "max_replicas": 2, "max_batch_size": 2, "cpus_per_replica": 0.5}
    config = ServeConfig.from_dict({"models": [one, scaled], "port": free_port()})
    with (
        pytest.MonkeyPatch.context() as patch,
        cluster.connect(num_cpus=cluster.cpus_for(config.cpus), object_store_memory=256 << 20),
    ):
        patch.setattr(module, "UPSCALE_DELAY_S", 2.0)
        with serving(config) as url:
            yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.mark.alone
@pytest.mark.slow
def test_several_models(api):
    assert [model.id for model in api.models.list()] == ["one", "scaled"]
    assert ask(api, "one").choices[0].message.content == ask(api, "scaled").choices[0].message.content, "the same weights"
    assert ask(api, "scaled").model == "scaled"
    with pytest.raises(openai.NotFoundError, match="this server has 'one', 'scaled'"):
        ask(api, "third")


@pytest.mark.alone
@pytest.mark.slow
def test_replicas_come_with_the_load(api):
    """With more requests than one replica has places there are two; nobody has to ask for them."""
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        messages = [{"role": "user", "content": "hello"}]
        settings = {"max_tokens": 15_000, "stream": True, "extra_body": {"ignore_eos": True}}
        streams = [pool.submit(api.chat.completions.create, model="scaled", messages=messages, **settings) for _ in range(12)]
        wait_until(lambda: serve.status().applications["molmo"].deployments["model-1-scaled"].replica_states.get("RUNNING") == 2)
        for stream in concurrent.futures.as_completed(streams):
            stream.result().close()


@pytest.mark.alone
@pytest.mark.slow
def test_metrics_of_all_processes(api):
    def samples():
        with urllib.request.urlopen(f"{api.base_url}".replace("/v1/", "/metrics"), timeout=10) as response:
            page = response.read().decode()
        return [sample for family in text_string_to_metric_families(page) for sample in family.samples]

    wait_until(lambda: {"one", "scaled"} <= {s.labels["model"] for s in samples() if s.name == "molmo_engine_running"})
    names = {sample.name for sample in samples()}
    assert {"molmo_requests_total", "molmo_time_to_first_token_seconds_bucket", "molmo_engine_pages_used"} <= names


@pytest.mark.alone
@pytest.mark.slow
def test_the_application_of_a_yaml_file(api, tiny_checkpoint, tmp_path):
    """`serve run FILE`, on the cluster that is there; its own arguments win over those of the file that it names."""
    address, url = ray.get_runtime_context().gcs_address, f"{api.base_url}".split("/v1")[0]
    serve.delete("molmo")
    (tmp_path / "own.yaml").write_text(f"model: {tiny_checkpoint}\nname: mine\nmax_new_tokens: 3\n")
    description = yaml.safe_load((ROOT / "deploy/application.yaml").read_text())
    description["applications"][0]["args"] = {"config": str(tmp_path / "own.yaml"), "name": "yours", "cpus_per_replica": 0.5}
    del description["http_options"], description["proxy_location"]  # of the Serve that runs already
    (tmp_path / "application.yaml").write_text(yaml.safe_dump(description))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(tmp_path / "application.yaml"), "--address", address]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        try:
            there = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)

            def answers():
                try:
                    return [model.id for model in there.models.list()] == ["yours"]
                except openai.APIError:
                    return False

            wait_until(answers)
            reply = there.chat.completions.create(model="yours", messages=[{"role": "user", "content": "hello"}])
            assert reply.usage.completion_tokens == 3
        finally:
            process.terminate()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "either model or models"),
        ({"model": "a", "models": [{"model": "b"}]}, "either model or models"),
        ({"models": [{"name": "a"}]}, "each of them has a `model`"),
        ({"models": [{"model": "/x/a"}, {"model": "/y/a"}]}, "the same name"),
        ({"model": "models:/a/1", "follow_alias": True}, "has no alias"),
        ({"model": "a", "replicas": 3, "max_replicas": 2}, "less than replicas=3"),
        ({"config": "no/such.yaml"}, "no/such.yaml"),
        ({"model": "a", "prot": 1}, "prot"),
    ],
)
def test_what_is_wrong_is_said(args, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        app(args)
