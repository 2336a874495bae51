"""What a registered version carries, and that MLflow alone answers with it: in another process, from another folder."""

import io
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from molmo_core.config import ConfigError
from pipelines import tracking
from pipelines.ask import Asker
from pipelines.registry.config import RegisterConfig
from pipelines.registry.package import PACKAGES, input_example, requirements
from pipelines.registry.pyfunc import Predictor
from pipelines.registry.register import register

ROOT = Path(__file__).parents[3]
QUESTIONS = ["What is this?", "How many dogs are there?", "Point to the cat.", "Say something."]
REPORT = {
    "model": "m",
    "records": 30,
    "rejected": 1,
    "questions": 29,
    "overall": 0.75,
    "low": 0.6,
    "high": 0.9,
    "types": {"colour|s": {"questions": 29, "metric": "exact_match", "score": 0.75}},
}


def picture(seed):
    """A PNG file of noise."""
    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (60, 80, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def registered(empty_database, tiny_checkpoint, tmp_path_factory):
    """The folder in which a version was registered, with the reports of its evaluation and its data."""
    folder = tmp_path_factory.mktemp("my registry")
    shutil.copy(empty_database, folder)
    for name, report in (("evaluation", REPORT), ("prepared", {"rows_in": 4000, "rows_out": 3999, "tokens": 123456})):
        (folder / name).mkdir()
        (folder / name / "report.json").write_text(json.dumps(report))
    (folder / "evaluation" / "answers.png").write_bytes(picture(0))
    (folder / "prepared" / "report.html").write_text("<p>data</p>")
    (folder / "photo one.png").write_bytes(picture(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        config = RegisterConfig(str(tiny_checkpoint), "mine", evaluation=f"{folder}/evaluation", data=f"{folder}/prepared")
        assert register(config)["uri"] == "models:/mine@champion"
        yield folder


def test_it_carries_its_signature_example_requirements_reports_and_card(registered, tiny_checkpoint):
    version = tracking.client().get_model_version_by_alias("mine", "champion")
    assert version.description == "Evaluation: overall 75.0%, colour|s 75.0%"
    checkpoint = tracking.resolve("models:/mine@champion")
    assert sorted(os.listdir(checkpoint)) == sorted(os.listdir(tiny_checkpoint))
    folder = checkpoint.parents[1]
    info = mlflow.models.get_model_info("models:/mine@champion")
    assert info.signature.inputs.input_names() == ["prompt", "image"]
    assert info.signature.outputs.input_names() == ["answer"]
    assert (folder / "requirements.txt").read_text().split() == requirements()
    card = (folder / "README.md").read_text()
    for told in (
        "# mine",
        "| **all but pointing** | 29 | **75.0%** | 60.0% to 90.0% | mean |",
        "| colour\\|s | 29 | 75.0% |  |",
        "| records | 4,000 |",
    ):
        assert told in card
    assert "![What it answers](evaluation/answers.png)" in card
    assert (folder / "evaluation/answers.png").is_file()
    assert (folder / "data_report/report.html").is_file()


ELSEWHERE = """
import json, sys
import mlflow, pandas
model = mlflow.pyfunc.load_model("models:/mine@champion")
photo, data = sys.argv[1], open(sys.argv[1], "rb").read()
frame = pandas.DataFrame({"image": [photo, data, data, None], "prompt": json.loads(sys.argv[2])}, index=[7, 7, 2, 0])
answers = [model.predict(frame, params={"max_tokens": 12}) for _ in range(2)]
assert list(answers[0].index) == [7, 7, 2, 0]
import molmo_core
loaded = [name for name in ("ray", "pipelines.data", "pipelines.tracking") if name in sys.modules]
example = model.predict(model.input_example, params={"max_tokens": 3})
print(json.dumps([answers[0].tolist(), answers[1].tolist(), len(example), molmo_core.__file__, loaded]))
"""


@pytest.mark.slow
def test_another_process_elsewhere_gets_the_answers_of_the_model(registered, tiny_checkpoint, tmp_path):
    photo = registered / "photo one.png"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(photo), json.dumps(QUESTIONS)]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, again, examples, code, loaded = json.loads(done.stdout.splitlines()[-1])
    assert (first, examples, loaded) == (again, 1, [])
    assert "/code/molmo_core/" in code, "what was registered, not what is installed"
    asker = Asker(str(tiny_checkpoint))
    media = [{"image": np.array(Image.open(photo))}] * 3 + [{}]
    assert first == ["".join(asker.ask(question, shown, 12)).strip() for question, shown in zip(QUESTIONS, media)]
    assert len(set(first)) > 1


@pytest.fixture(scope="module")
def predictor(tiny_checkpoint):
    return Predictor(str(tiny_checkpoint))


def test_more_rows_than_are_answered_together(predictor):
    frame = pd.DataFrame({"prompt": [f"Question {i % 3}?" for i in range(40)], "image": [picture(i % 2) for i in range(40)]})
    answers = predictor.predict(frame, {"max_tokens": 4})
    assert len(answers) == 40
    for i in range(40):
        assert answers[i] == answers[i % 6], "a row's answer does not depend on the others"
    assert len(predictor.predict(frame[:0])) == 0


@pytest.mark.parametrize(
    ("frame", "told"),
    [
        (
            {"prompt": ["a", None, 3], "image": [None] * 3},
            r"2 of 3 rows .*\n  row 1: prompt: NoneType, text is wanted\n  row 2: prompt: int",
        ),
        ({"prompt": ["  "]}, "row 0: prompt: an empty text"),
        ({"prompt": ["a"], "image": ["nowhere.png"]}, "row 0: image: nowhere.png: no such file"),
        ({"prompt": ["a"], "image": [b"no picture"]}, "row 0: image: image of 10 bytes"),
        ({"prompt": ["a"], "image": ["data:image/png;base64,%%%"]}, "row 0: image: image of 0 bytes"),
        ({"prompt": ["a"], "image": [picture(0)[:300]]}, "row 0: .*"),
        ({"prompt": ["a"], "image": [5]}, "row 0: image: int; the path of a file"),
        ({"prompt": ["word " * 20000], "image": [None]}, "row 0: the prompt is 100006 tokens long"),
        ({"question": ["a"]}, "a DataFrame with the columns 'prompt' and 'image' is wanted"),
        ({"prompt": [None] * 9}, "9 of 9 rows(.*\n)*  and 4 more"),
    ],
)
def test_bad_rows_are_named(predictor, frame, told):
    with pytest.raises(MlflowException, match=told) as failure:
        predictor.predict(pd.DataFrame(frame))
    assert failure.value.error_code == "INVALID_PARAMETER_VALUE"


def test_bad_lengths_are_refused(predictor):
    with pytest.raises(MlflowException, match="max_tokens=0: at least 1"):
        predictor.predict(input_example(), {"max_tokens": 0})


def test_two_versions_of_one_run_do_not_share_files(registered, tiny_checkpoint):
    with tracking.Run("vision", "trained") as run:
        pass
    for version in ("2", "3"):
        assert register(RegisterConfig(str(tiny_checkpoint), "mine", None, run.id))["version"] == version
    assert tracking.resolve("models:/mine/2") != tracking.resolve("models:/mine/3")


@pytest.mark.parametrize("setting", ["evaluation", "data"])
def test_a_report_that_is_not_there_is_told_before_anything_is_made(tiny_checkpoint, tmp_path, monkeypatch, setting):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(ConfigError, match=rf"{setting}=.*holds no report.json of jobs\."):
        register(RegisterConfig(str(tiny_checkpoint), "mine", **{setting: str(tmp_path)}))
    assert not (tmp_path / "mlflow.db").exists()


def test_requirements_are_what_the_core_depends_on():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    core = {line.partition(">")[0] for line in declared} - {"typer", "rich"}  # of the command line
    assert core | {"pandas", "mlflow"} == set(PACKAGES)
