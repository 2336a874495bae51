"""A release as it is made: of two served models one follows its alias on an MLflow server; a better version is promoted under load."""

import concurrent.futures
import copy
import json
import threading
import time
from pathlib import Path

import openai
import pandas as pd
import pytest
from typer.testing import CliRunner

from jobs.promote import app
from pipelines import cluster, tracking
from pipelines.evaluation.worker import Worker
from pipelines.registry.aliases import Aliases, aliases
from pipelines.registry.config import PromoteConfig, RegisterConfig
from pipelines.registry.promote import evaluations_of
from pipelines.registry.pyfunc import Predictor
from pipelines.registry.register import register
from pipelines.serving.app import serving
from pipelines.serving.config import ServeConfig
from pipelines.serving.port import free_port

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.parametrize("mlflow_server", ["sqlite"], indirect=True)]
TOKENS = 24
PROMPTS = [f"What is number {i}?" for i in range(6)]


def texts(folder):
    return Predictor(str(folder)).predict(pd.DataFrame({"prompt": PROMPTS}), {"max_tokens": TOKENS})


@pytest.fixture
def versions(mlflow_server, tiny_model, tiny_checkpoint, tmp_path, monkeypatch):
    """Answers of version 1 of `mine`, its champion, and of its candidate, which is right. They have been asked the gate's records."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.chdir(tmp_path)
    other = copy.deepcopy(tiny_model)
    other.transformer.ff_out.weight.data = other.transformer.ff_out.weight.data.roll(1, 1)
    other.save_checkpoint(tmp_path / "other")
    register(RegisterConfig(checkpoint=str(tiny_checkpoint), name="mine", alias="champion"))
    register(RegisterConfig(checkpoint=str(tmp_path / "other"), name="mine", alias="candidate"))
    old, new = texts(tiny_checkpoint), texts(tmp_path / "other")
    rows = [{"message_list": [{"messages": [prompt, answer], "type": "what"}]} for prompt, answer in zip(PROMPTS, new)]
    Path("records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gate = {"records": "records.jsonl", "better": ["what"], "at_least": {"overall": 0.9}}
    Path("gate.yaml").write_text(json.dumps({**gate, "evaluate": {"max_new_tokens": TOKENS, "metric": "exact_match"}}))
    for evaluation in evaluations_of("mine", ["1", "2"], PromoteConfig.load("gate.yaml")):
        worker = Worker(evaluation.config, evaluation.model, evaluation.records, evaluation.total)
        for file in worker({"shard": list(evaluation.results.shards)})["file"]:
            evaluation.results.commit(0, file)
    return old[0], new[0]


def ask(api, model, **settings):
    messages = [{"role": "user", "content": PROMPTS[0]}]
    return api.chat.completions.create(model=model, messages=messages, max_tokens=TOKENS, **settings)


def test_a_promotion_changes_the_answers_and_fails_nobody(versions, tiny_checkpoint):
    """Two clients ask all the time, one of them streamed."""
    old, new = versions
    assert old != new
    followed = {"model": "models:/mine@champion", "follow_alias": True, "cpus_per_replica": 0.5}
    config = ServeConfig.from_dict({"models": [followed, {"model": str(tiny_checkpoint), "name": "fixed", "cpus_per_replica": 0.5}]})
    config.port = free_port()
    with cluster.connect(num_cpus=cluster.cpus_for(config.cpus), object_store_memory=256 << 20), serving(config) as url:
        api = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        answers = under_load(api, old, new)
        assert set(answers) == {old, new}, "every answer is of one version or of the other"
        assert [model.model_extra.get("root") for model in api.models.list()] == ["models:/mine/2", None]
        assert ask(api, "fixed").choices[0].message.content == old


def under_load(api, old, new):
    """The answers before, during and after the promotion."""
    answers, done = [], threading.Event()

    def client(streamed):
        while not done.is_set():
            if streamed:
                answers.append("".join(chunk.choices[0].delta.content or "" for chunk in ask(api, "mine", stream=True)))
            else:
                answers.append(ask(api, "mine").choices[0].message.content)

    def wait_until_all_are(answer):
        deadline = time.monotonic() + 120
        while set(answers[-20:]) != {answer} and not any(one.done() for one in clients):
            assert time.monotonic() < deadline, "the server does not follow"
            time.sleep(0.1)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(client, streamed) for streamed in (True, False)]
        try:
            wait_until_all_are(old)
            result = CliRunner().invoke(app, ["mine", "--candidate", "candidate", "--config", "gate.yaml"])
            assert (result.exit_code, aliases(tracking.client(), "mine")) == (0, Aliases("2", "1")), result.output
            assert "@champion is version 2 of 'mine'; version 1 is @previous" in result.output
            wait_until_all_are(new)
        finally:
            done.set()
        for one in clients:
            one.result()
    return answers
