"""A distributed evaluation: every record once, the same answers as the model alone, bad records reported."""

import json

import numpy as np
import pytest
from PIL import Image

from molmo_core.config import ConfigError
from pipelines import cluster
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.evaluate import evaluate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def connected():
    with cluster.connect(num_cpus=2, object_store_memory=256 << 20):
        yield


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Ten pictures with two questions each; the sixth file is damaged."""
    folder = tmp_path_factory.mktemp("records")
    rng = np.random.RandomState(0)
    lines = []
    for i in range(10):
        Image.fromarray(rng.randint(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")
        asked = [{"style": "demo", "question": q, "answer": "x", "type": t} for q, t in (("what is it?", "what"), ("why?", "why"))]
        lines.append(json.dumps({"image": f"{i}.png", "message_list": asked}))
    (folder / "5.png").write_bytes(b"not an image")
    (folder / "records.jsonl").write_text("\n".join(lines))
    return folder / "records.jsonl"


def config(checkpoint, records, output, **settings) -> EvaluateConfig:
    return EvaluateConfig(
        model=str(checkpoint), records=str(records), output=str(output), max_new_tokens=5, records_per_batch=3, workers=2, **settings
    )


def test_every_record_once(tiny_model, tiny_checkpoint, records, tmp_path):
    report = evaluate(config(tiny_checkpoint, records, tmp_path))
    assert (report["records"], report["rejected"], report["questions"]) == (10, 1, 18)
    results = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [result["record"] for result in results] == list(range(10))
    assert (results[5]["rejected"], results[5]["source"], results[5]["row"]) == ("image: undecodable", str(records), 5)
    assert "not an image" in results[5]["detail"]
    assert report["reasons"] == {"image: undecodable": 1}
    preprocess = tiny_model.config.build_preprocessor(for_inference=True, is_training=False)
    for k in (0, 9):
        for asked in results[k]["questions"]:
            example = preprocess({"image": records.parent / f"{k}.png", "style": "demo", "question": asked["question"]})
            assert asked["prediction"] == tiny_model.generate(**example, max_new_tokens=5).text[0].strip()
    assert json.loads((tmp_path / "report.json").read_text()) == report
    with Image.open(tmp_path / "answers.png") as picture:
        assert picture.width > 500


def test_limit(tiny_checkpoint, records, tmp_path):
    assert evaluate(config(tiny_checkpoint, records, tmp_path, limit=2))["questions"] == 4


def test_too_many_bad_records(tiny_checkpoint, records, tmp_path):
    for i in range(3):
        records.parent.joinpath(f"bad{i}.jsonl").write_text(json.dumps({"image": "missing.png", "question": "q", "answer": "a"}))
    with pytest.raises(ConfigError, match=r"records rejected, more than max_reject_rate=0.01 allows \(. x media: missing file"):
        evaluate(config(tiny_checkpoint, records.parent / "bad*.jsonl", tmp_path))
