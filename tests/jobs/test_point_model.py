"""MolmoPoint from records to answers: trained a little, evaluated, registered, served; its points arrive as text and as data."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs import evaluate, register, train
from molmo_core.preprocessing.points import extract_points
from pipelines import cluster
from pipelines.data.preparation import easy_vqa
from pipelines.data.preparation.train_tokenizer import train_tokenizer
from pipelines.serving import client
from pipelines.serving.app import serving
from pipelines.serving.config import ServeConfig
from pipelines.serving.port import free_port

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PICTURES = 4
SIZE = 64
SMALL = [
    "model.llm.n_layers=1",
    "model.vision_backbone.vit.image_default_input_size=[32,32]",
    "model.vision_backbone.vit.image_num_pos=64",
]
"""A quarter of the patches: a step is quick."""


def run(job, *arguments):
    result = CliRunner().invoke(job.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A few pictures, each with its pointing task and a question."""
    folder = tmp_path_factory.mktemp("point")
    easy_vqa.write("test", folder / "all.jsonl", PICTURES, points=True)
    rows = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
    for row in rows:
        row["message_list"] = [row["message_list"][0], row["message_list"][-1]]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [f'User: {task["question"]} Assistant: <points coords="1 {task.get("answer")}">{figure}</points>'
             for row in rows for task in row["message_list"] for figure in easy_vqa.SHAPES]  # fmt: skip
    train_tokenizer(texts, 400, folder / "tokenizer")
    return folder / "records.jsonl"


def test_train_evaluate_register_serve(records, own_database, tmp_path):
    changes = [f"data.datasets.easy_vqa.path={records}", "data.actors=1", "data.shuffle=false", f"storage={tmp_path}", "name=tiny"]
    changes += [f"model.llm.tokenizer.identifier={records.parent / 'tokenizer'}", "num_workers=1", "log_interval=10", *SMALL]
    with cluster.connect(num_cpus=3, object_store_memory=256 << 20):
        run(train, ROOT / "configs/train/demo-point.yaml", *changes, "steps=80", f"global_batch_size={PICTURES}")
        (model,) = tmp_path.glob("tiny/step_*/model")
        evaluation = [f"model={model}", f"records={records}", f"output={tmp_path / 'evaluation'}", "workers=1"]
        run(evaluate, ROOT / "configs/evaluate/own.yaml", *evaluation)
        report = json.loads((tmp_path / "evaluation/report.json").read_text())
        assert report["types"]["pointing"]["questions"] == PICTURES
        predicted = pq.read_table(tmp_path / "evaluation/predictions").to_pylist()
        run(register, ROOT / "configs/register/own.yaml", f"checkpoint={model}", "name=tiny-point")
        with serving(ServeConfig(model="models:/tiny-point@champion", port=free_port(), max_new_tokens=24)) as url:
            answers = {row["image"]: answered(url, row) for row in map(json.loads, records.read_text().splitlines())}
    # What it was taught, within the 5 % of the width that the metric asks for; clients read what evaluation was given.
    assert report["types"]["pointing"]["score"] >= 0.75
    texts = {text.strip() for text, _ in answers.values()}
    assert all(text.startswith('<points coords="1 1 ') and text.endswith("</points>") for text in texts), texts
    assert texts == {row["prediction"].strip() for row in predicted if row["type"] == "pointing"}
    assert len(texts) > 1, "it looks at the picture"


def answered(url, record):
    """The text and the points of an answer, which are the same when it is streamed."""
    body = client.request("tiny-point", record["message_list"][-1]["question"], Path(record["image"]).read_bytes())
    message = client.post(url, body)["choices"][0]["message"]
    deltas = list(client.deltas(url, body))
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    streamed = [{k: v for k, v in point.items() if k != "index"} for delta in deltas for point in delta.get("points", [])]
    assert streamed == message["points"]
    written = extract_points(message["content"], SIZE, SIZE)
    assert [(p["x"], p["y"]) for p in message["points"]] == [(round(p.x, 2), round(p.y, 2)) for p in written]
    assert all(0 <= p["x"] <= SIZE and 0 <= p["y"] <= SIZE and p["image"] == 0 for p in message["points"])
    return message["content"], message["points"]
