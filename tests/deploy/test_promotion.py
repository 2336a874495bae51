"""A version passes the gate and is served, fails it and is not, and goes back, while sixteen clients ask; with a real MLflow server."""

import concurrent.futures
import copy
import io
import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import openai
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.promote import REFUSED, app
from pipelines import cluster, tracking
from pipelines.registry.aliases import OUTCOME, TAG, Aliases, aliases
from pipelines.registry.config import RegisterConfig
from pipelines.registry.promote import WHY
from pipelines.registry.pyfunc import Predictor
from pipelines.registry.register import register
from pipelines.serving.app import serving
from pipelines.serving.config import ServeConfig
from pipelines.serving.port import free_port

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("mlflow_server", ["sqlite"], indirect=True, scope="module")]
ROOT = Path(__file__).parents[2]
LIMIT = 12


@pytest.fixture(scope="module")
def place(mlflow_server, tiny_model, tiny_checkpoint, tmp_path_factory):
    """The folder of a working day: two versions of `mine` on the server, the first is champion; records that the second answers right."""
    folder = tmp_path_factory.mktemp("promotion")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.chdir(folder)
        other = copy.deepcopy(tiny_model)
        other.transformer.ff_out.weight.data = other.transformer.ff_out.weight.data.roll(1, 1)
        other.save_checkpoint(folder / "other")
        assert register(RegisterConfig(str(folder / "other"), "mine"))["version"] == "1"
        assert register(RegisterConfig(str(tiny_checkpoint), "mine", None))["version"] == "2"
        files = []
        for i in range(10):
            file = io.BytesIO()
            Image.fromarray(np.random.RandomState(i).randint(0, 255, (48, 64, 3), np.uint8)).save(file, "PNG")
            (folder / f"{i}.png").write_bytes(file.getvalue())
            files.append(f"{i}.png")
        prompts = [f"What is number {i}?" for i in range(10)]
        answers = Predictor(str(tiny_checkpoint)).predict(pd.DataFrame({"prompt": prompts, "image": files}), {"max_tokens": LIMIT})
        rows = [{"image": f, "messages": [p, a], "type": "what"} for f, p, a in zip(files, prompts, answers)]
        (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        gate = {"records": "records.jsonl", "not_worse": {"overall": 0.0}, "better": ["what"], "at_least": {"overall": 0.9}}
        (folder / "gate.yaml").write_text(
            json.dumps({**gate, "evaluate": {"max_new_tokens": LIMIT, "metric": "exact_match", "workers": 1, "cpus_per_worker": 0.5}})
        )
        yield folder


def promote(*arguments):
    result = CliRunner().invoke(app, ["mine", *arguments])
    assert "Traceback" not in result.output, result.output
    return result


def test_promoted_refused_and_rolled_back_under_load(place):
    config = ServeConfig.from_dict({"model": "models:/mine@champion", "follow_alias": True, "cpus_per_replica": 0.5, "port": free_port()})
    gate = ("--config", "gate.yaml")
    answers, done = [], threading.Event()
    with cluster.connect(num_cpus=cluster.cpus_for(config.cpus + 1), object_store_memory=256 << 20), serving(config) as url:
        api = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)

        def ask():
            return api.chat.completions.create(model="mine", messages=[{"role": "user", "content": "hello"}], max_tokens=LIMIT)

        def client():
            while not done.is_set():
                answers.append(ask().choices[0].message.content)

        def served(version, answer):
            """Waits until a version is shown, and only it answers."""
            deadline = time.monotonic() + 200
            while api.models.retrieve("mine").root != f"models:/mine/{version}" or set(answers[-48:]) != {answer}:
                assert time.monotonic() < deadline, set(answers[-48:])
                assert not any(one.done() for one in clients), "a client failed"
                time.sleep(0.2)

        first = ask().choices[0].message.content
        second = Predictor(str(tracking.resolve("models:/mine/2"))).predict(pd.DataFrame({"prompt": ["hello"]}), {"max_tokens": LIMIT})[0]
        assert first.strip() != second
        mlflow_client = tracking.client()
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            clients = [pool.submit(client) for _ in range(16)]
            try:
                served(1, first)
                result = promote("--candidate", "2", *gate, "--dry-run")
                assert (result.exit_code, aliases(mlflow_client, "mine")) == (0, Aliases("1", None)), result.output
                assert "Dry run: version 2 of 'mine' would be promoted" in result.output
                result = promote("--candidate", "2", *gate)
                assert (result.exit_code, aliases(mlflow_client, "mine")) == (0, Aliases("2", "1")), result.output
                assert "| what | 10 | 100.0% | 0.0% | +100.0 % [+100.0, +100.0] | better | ok |" in result.output
                served(2, next(answer for answer in iter(lambda: ask().choices[0].message.content, None) if answer.strip() == second))
                result = promote("--candidate", "1", *gate)
                assert (result.exit_code, aliases(mlflow_client, "mine")) == (REFUSED, Aliases("2", "1")), result.output
                assert promote("--rollback").exit_code == 0
                assert aliases(mlflow_client, "mine") == Aliases("1", None)
                served(1, first)
            finally:
                done.set()
            for one in clients:
                one.result()
    assert {answer.strip() for answer in answers} == {first.strip(), second}
    tags = mlflow_client.get_model_version("mine", "1").tags
    assert (tags[OUTCOME], tags[WHY][:35]) == ("refused", "overall: may be worse by more than ")
    assert mlflow_client.get_model_version("mine", "2").tags[OUTCOME] == "rolled back"
    assert TAG not in mlflow_client.get_registered_model("mine").tags


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--candidate", "7", "--config", "gate.yaml"), "version=7"),
        (("--candidate", "two words", "--config", "gate.yaml"), "alias='two words'"),
        (
            ("--candidate", "2", "--config", "gate.yaml", "better=[wat]"),
            "records.jsonl is of type 'wat'. Did you mean 'what'",
        ),
        (("--candidate", "2", "--config", "gate.yaml", "records=nowhere.jsonl"), "nowhere.jsonl"),
        (("--candidate", "1", "--config", "gate.yaml"), "version 1 of 'mine' is @champion already"),
        (("--candidate", "2"), "--config CONFIG is missing"),
        (("--rollback", "--candidate", "2"), "give either --candidate"),
        (("--rollback",), "has nothing to go back to"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(place, arguments, told):
    client = tracking.client()
    for alias, version in (("champion", "1"), ("previous", None)):
        if version:
            client.set_registered_model_alias("mine", alias, version)
        elif aliases(client, "mine").previous:
            client.delete_registered_model_alias("mine", alias)
    runs = client.search_runs([found.experiment_id for found in client.search_experiments()])
    result = promote(*arguments)
    assert result.exit_code == 2
    assert re.search(told, result.stderr), result.stderr
    assert len(client.search_runs([found.experiment_id for found in client.search_experiments()])) == len(runs)
    assert TAG not in client.get_registered_model("mine").tags
