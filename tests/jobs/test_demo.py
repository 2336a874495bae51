"""The demo from end to end, with a few steps of training: every stage is real, only short."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.demo import app
from molmo_core.config import ConfigError
from pipelines import demo, tracking
from pipelines.data.config import PrepareConfig
from pipelines.data.preparation import easy_vqa
from pipelines.demo_config import DemoConfig, by_stage
from pipelines.evaluation.config import EvaluateConfig
from pipelines.registry.config import RegisterConfig
from pipelines.serving.config import ServeConfig
from pipelines.training.config import TrainConfig
from pipelines.training.trainer import TrainResult

ROOT = Path(__file__).parent.parent.parent
DEMO = DemoConfig.load(ROOT / "configs/demo/easy_vqa.yaml")
SHORT = [
    "prepare.limit=48",
    "train.steps=4",
    "train.log_interval=2",
    "evaluate.limit=8",
    "evaluate.max_new_tokens=4",
    "serve.max_new_tokens=4",
]


def test_overrides_by_stage():
    stages = by_stage(["train.steps=5", "train.optim.llm.lr=1", "serve.port=1"])
    assert stages["train"] == ["steps=5", "optim.llm.lr=1"]
    assert stages["serve"] == ["port=1"]
    assert stages["prepare"] == []
    with pytest.raises(ConfigError, match="begin with a stage"):
        by_stage(["steps=5"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs/demo").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_stages_of_a_demo_pass_on_what_they_make(path):
    config = DemoConfig.load(path)
    preparation, training = PrepareConfig.load(config.prepare), TrainConfig.load(config.train)
    evaluation, registration = EvaluateConfig.load(config.evaluate), RegisterConfig.load(config.register)
    model, data = f"{config.folder}/model", f"{config.folder}/data"
    assert preparation.output == data
    assert [dataset.path for dataset in training.data.datasets.values()] == [data]
    assert training.storage == config.folder
    assert training.model.llm.tokenizer.identifier.startswith(f"{data}/")
    assert evaluation.records.startswith(f"{data}/records/")
    assert (evaluation.model, registration.checkpoint) == (model, model)
    assert ServeConfig.load(config.serve).model == f"models:/{registration.name}@{registration.alias}"
    assert Path(config.serve).stem in ("demo", path.stem), "make serve DEMO=..."


def test_another_demo_is_named_first():
    told = CliRunner().invoke(app, ["configs/demo/no_such.yaml", "train.steps=5"])
    assert (told.exit_code, "configs/demo/no_such.yaml: no such configuration file" in told.output) == (2, True)


@pytest.mark.parametrize(
    ("change", "variable", "told"),
    [
        ("register.name=a/b", "", "name='a/b'"),
        ("register.alias=a b!", "", "alias='a b!'"),
        ("train.steps=2", "http://127.0.0.1:9", "no MLflow server answers there"),
    ],
)
def test_what_mlflow_refuses_is_told_before_the_last_demo_is_deleted(tmp_path, monkeypatch, change, variable, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    (tmp_path / "runs/demo").mkdir(parents=True)
    with pytest.raises(ConfigError, match=told):
        demo.demo(DEMO, [change])
    assert (tmp_path / "runs/demo").exists()


def test_questions_to_ask(tmp_path):
    easy_vqa.write("test", tmp_path / "test.jsonl", 40)
    asked = list(demo.questions_to_ask(str(tmp_path / "test.jsonl"), DEMO.asked))
    assert [question.type for question, _ in asked] == DEMO.asked
    assert len({image for _, image in asked}) == 4
    assert all(Path(image).is_file() for _, image in asked)


def test_a_summary_of_a_step_that_has_no_speed():
    """The first step compiles and loads: nothing is logged of how fast it was."""
    result = TrainResult("model", "run", 1, 1, 2.0, [(1, {"loss": 6.0, "accuracy": 0.0})])
    assert demo.train_summary(result, 2)["tokens_per_second"] is None
    result.metrics += [(step, {"loss": 5.0, "tokens_per_second": speed}) for step, speed in ((2, 30.4), (3, 10.0), (4, 20.0))]
    assert demo.train_summary(result, 2)["tokens_per_second"] == 20


@pytest.mark.slow
def test_end_to_end(tmp_path, monkeypatch):
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jobs.demo", *SHORT]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=590, check=False)
    assert run.returncode == 0, run.stdout + run.stderr

    summary = json.loads((tmp_path / "runs/demo/summary.json").read_text())
    assert summary.keys() == {"dataset", "train", "eval", "registry", "serve", "seconds_total"}
    assert summary["train"].keys() == {"steps", "seconds", "workers", "first_loss", "last_loss", "tokens_per_second"}
    assert summary["eval"].keys() == {"questions", "overall", "shape", "colour", "yes_no", "pointing"}
    assert summary["registry"].keys() == {"name", "version", "alias", "uri"}
    assert (summary["train"]["steps"], summary["train"]["workers"]) == (4, 2)
    assert summary["train"]["last_loss"] < summary["train"]["first_loss"]
    records = [json.loads(line) for line in (tmp_path / "runs/demo/data/records/test.jsonl").read_text().splitlines()]
    assert summary["eval"]["questions"] == sum(len(record["message_list"]) - 1 for record in records[:8])
    assert summary["registry"]["uri"] == "models:/molmo-demo@champion"
    assert all(answer.keys() == {"question", "answer", "expected"} for answer in summary["serve"]["answers"])
    assert len(summary["serve"]["answers"]) == 4
    with Image.open(tmp_path / "runs/demo/answers.png") as picture:
        assert picture.width > 500
    for words in ("Prepare", "Train", "step 2/4", "Evaluate", "Register", "Serve", "make serve", "make mlflow"):
        assert words in run.stdout + run.stderr

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert (tracking.resolve("models:/molmo-demo@champion") / "config.yaml").is_file()
