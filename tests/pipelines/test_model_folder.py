"""A model is named alike everywhere: a file, an own or a published folder, a hub repository, an address of the registry."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from molmo_core.checkpoint import load_model
from molmo_core.checkpoint.export import export_checkpoint
from molmo_core.config import ConfigError
from molmo_core.registry import BaseModelConfig
from pipelines import cluster, tracking
from pipelines.data.config import PrepareConfig
from pipelines.data.inspection_rows import preparation_rows
from pipelines.data.preparation.prepare import prepare
from pipelines.data.sources import open_records
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.worker import Worker
from pipelines.model_folder import fixed_model, model_folder
from pipelines.serving.app import build
from pipelines.serving.config import ServeConfig
from pipelines.training.config import TrainConfig

KINDS = ["own", "published", "registered own", "registered published"]


@pytest.fixture(scope="module")
def addresses(empty_database, tiny_model, tiny_checkpoint, tmp_path_factory):
    """The same model under every kind of name."""
    folder = tmp_path_factory.mktemp("models")
    published = export_checkpoint(tiny_model, folder / "published")
    shutil.copy(empty_database, folder)
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    for name, path in (("own", tiny_checkpoint), ("published", published)):
        tracking.register(path, name, "champion")
    yield dict(zip(KINDS, (str(tiny_checkpoint), str(published), "models:/own@champion", "models:/published@champion")))
    patch.undo()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    rows = []
    for i in range(4):
        Image.fromarray(np.random.RandomState(i).randint(0, 255, (60, 60, 3), np.uint8)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "style": "demo", "question": f"What is in picture {i}?", "answer": "noise"})
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "records.jsonl"


def prepare_config(model: str, records: Path, folder: Path) -> Path:
    path = folder / "prepare.yaml"
    PrepareConfig.from_dict(
        {"records": str(records), "output": str(folder / "data"), "model": model, "tokenizer": None, "sequence_length": 1024}
    ).save(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_stage(kind, addresses, tiny_model, records, tmp_path):
    address = addresses[kind]
    weights = load_model(model_folder(fixed_model(address))).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in tiny_model.state_dict().items())

    # prepare and inspect: the same examples from every name
    model, rows, _ = preparation_rows(PrepareConfig.load(prepare_config(address, records, tmp_path)), 4)
    expected = BaseModelConfig.load(addresses["own"])
    assert (model.llm.d_model, model.llm.max_sequence_length) == (expected.llm.d_model, 16384)
    _, ours, _ = preparation_rows(PrepareConfig.load(prepare_config(addresses["own"], records, tmp_path)), 4)
    assert len(rows) == len(ours) == 4
    for row, our in zip(rows, ours):
        assert all(np.array_equal(row[key], our[key]) for key in our if key != "metadata")

    # train: its configuration and its weights
    train = tmp_path / "train.yaml"
    train.write_text(f"name: x\nsteps: 1\nmodel: {address}\ndata: {{datasets: {{x: {{path: {records}}}}}}}\n")
    config = TrainConfig.load(train, ["model.llm.max_sequence_length=99"])
    assert (config.model.llm.d_model, config.model.llm.max_sequence_length) == (expected.llm.d_model, 99)
    assert fixed_model(str(config.init_from)) == config.init_from
    built = config.model.build_model()
    built.load_checkpoint(config.init_from)
    assert torch.equal(built.state_dict()["transformer.wte.embedding"], weights["transformer.wte.embedding"])

    # evaluate and serve
    settings = EvaluateConfig(model=address, records=str(records), output=str(tmp_path / "evaluation"), max_new_tokens=2)
    rows = Worker(settings, fixed_model(address), open_records(str(records)), 4).rows(range(4))
    assert [(row["record"], "rejected" in row) for row in rows] == [(i, False) for i in range(4)]
    build(ServeConfig(model=address, name="x"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"adapter_config.json": '{"base_model_name_or_path": "someone/model"}'},
            "a PEFT adapter .LoRA. of someone/model",
        ),
        ({"config.json": '{"model_type": "qwen2_vl"}'}, "model_type 'qwen2_vl' is not a Molmo model"),
        ({}, "neither config.yaml .*this one is empty"),
    ],
    ids=["adapter", "other architecture", "empty"],
)
def test_what_is_not_a_model_is_refused_before_anything_starts(content, message, records, tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)
    train = tmp_path / "train.yaml"
    train.write_text(f"name: x\nsteps: 1\nmodel: {folder}\ndata: {{datasets: {{x: {{path: {records}}}}}}}\n")
    stages = {
        "prepare": lambda: preparation_rows(PrepareConfig.load(prepare_config(str(folder), records, tmp_path)), 1),
        "train": lambda: TrainConfig.load(train),
        "evaluate": lambda: fixed_model(str(folder)),
        "serve": lambda: build(ServeConfig(model=str(folder), name="x")),
        "register": lambda: tracking.register(folder, "x"),
    }
    for run in stages.values():
        with pytest.raises(ConfigError, match=message):
            run()


def test_a_configuration_has_no_weights(tiny_checkpoint):
    with pytest.raises(ConfigError, match="is a file with a configuration; weights are in a checkpoint folder"):
        fixed_model(str(tiny_checkpoint / "config.yaml"))
    with pytest.raises(ConfigError, match=r"allenai/Molmo-7B-D-0924: no such folder here, .*Offline"):
        fixed_model("allenai/Molmo-7B-D-0924")


@pytest.mark.slow
def test_a_published_folder_from_records_to_scores(addresses, records, tmp_path):
    with cluster.connect(num_cpus=2, object_store_memory=256 << 20):
        report = prepare(PrepareConfig.load(prepare_config(addresses["published"], records, tmp_path)))
        assert (report["rows_in"], report["rows_out"]) == (4, 4)
        settings = EvaluateConfig(
            model=addresses["registered published"], records=str(records), output=str(tmp_path / "e"), max_new_tokens=2, workers=1
        )
        assert evaluate(settings).figures["questions"] == 4
