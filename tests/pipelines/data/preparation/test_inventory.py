"""The inventory knows what can be used and how long every example will be, and nothing is decoded for it."""

from __future__ import annotations

import collections
import json
import os
import signal
import zipfile

import fsspec
import pyarrow as pa
import pytest

from jobs.inventory import load_data
from molmo_core.config import ConfigError
from molmo_core.models.base import BaseModelConfig
from pipelines.data import schema
from pipelines.data.batches.loader import TrainLoader
from pipelines.data.batches.packs import Streamed
from pipelines.data.batches.plan import Draw
from pipelines.data.builder import ExampleBuilder
from pipelines.data.config import DataConfig
from pipelines.data.isolation import VideoDecoder
from pipelines.data.preparation.inventory import (
    SCHEMA,
    Inventory,
    MediaMeter,
    RecordMeter,
    inventory_path,
    require_inventory,
    write_inventory,
)
from pipelines.data.rejects import Rejected
from pipelines.data.sources import open_records


def take(path):
    """What `take_inventory` does, in this process."""
    records = open_records(str(path))
    meter = RecordMeter(records, threads=4)
    rows = meter.rows(range(len(records)))
    meter.close()
    counts = write_inventory(pa.Table.from_pylist(rows, schema=SCHEMA), records, inventory_path(str(path)))
    return records, counts


def test_lengths_are_exact(golden, good_records):
    records, counts = take(good_records)
    assert counts == {"rows": 40, "usable": 40}
    overrides = ["data_formatter.prompt_templates=uber_model", "data_formatter.system_prompt=demo_or_style"]
    model = BaseModelConfig.load(golden / "molmo-qwen2-siglip-bidir" / "config.yaml", overrides=overrides)
    builder = ExampleBuilder(model.build_preprocessor(for_inference=False, max_seq_len=512), 10**8)
    dataset = Streamed(records, builder, seed=3, inventory=Inventory(records, inventory_path(str(good_records))))
    for row in range(40):
        for epoch in range(2):
            draw = Draw(0, row, epoch)
            assert dataset.measure(draw) == schema.size(dataset.build(draw, dataset.read(draw)))


def test_unusable_records_are_found_and_never_drawn(make, tmp_path):
    make.picture(tmp_path / "0.png")
    rows, reasons = make.corrupt_corpus(tmp_path / "corrupt")
    mixed = [row for bad in rows for row in (bad, make.chat("0.png"))]
    path = make.write_jsonl(tmp_path / "mixed.jsonl", mixed)
    records, counts = take(path)
    inventory = Inventory(records, inventory_path(str(path)))
    # That a picture is truncated can only be seen by decoding it: the builder rejects it later.
    later = {2 * i for i, reason in enumerate(reasons) if reason == "image: undecodable"}
    assert set(range(1, len(mixed), 2)) <= set(inventory.usable.tolist()) <= set(range(1, len(mixed), 2)) | later
    assert counts["rows"] == len(mixed)
    assert {k: n for k, n in counts.items() if k in reasons and k != "image: undecodable"} == {
        k: n for k, n in collections.Counter(reasons).items() if k != "image: undecodable"
    }
    with pytest.raises(Rejected):
        Streamed(records, ExampleBuilder(None, 10**7), 0, inventory).builder(records[0], None)


def test_video_times(golden, make, tmp_path):
    path = make.write_jsonl(tmp_path / "v.jsonl", [{"video": str(golden / "video-olmo" / "video.mp4"), "question": "q", "answer": "a"}])
    records, _ = take(path)
    media = Inventory(records, inventory_path(str(path))).media(0)
    assert media.image_sizes == []
    assert media.fps > 0
    assert len(media.timestamps) > 5
    assert media.timestamps[0] == 0


def test_inventory_of_other_records_is_refused(make, tmp_path):
    make.picture(tmp_path / "0.png")
    path = make.write_jsonl(tmp_path / "a.jsonl", [make.chat("0.png")])
    with pytest.raises(ConfigError, match=r"run `python -m jobs.inventory CONFIG` first"):
        Inventory(open_records(str(path)), inventory_path(str(path)))
    take(path)
    make.write_jsonl(path, [make.chat("0.png")] * 2)
    with pytest.raises(ConfigError, match="an inventory of other records"):
        Inventory(open_records(str(path)), inventory_path(str(path)))


def packed(path, model, length=2048):
    """The loader of a run that packs these records."""
    config = DataConfig.from_dict({"datasets": {"x": {"path": str(path)}}, "packing": {"max_crops": 16}})
    return TrainLoader(config, model, 2, length, 0, 0, 1)


@pytest.mark.parametrize(
    ("path", "beside"),
    [
        ("{local}/a.jsonl", "{local}/a.jsonl.inventory.parquet"),
        ("{local}/a*.jsonl", "{local}/a_.jsonl.inventory.parquet"),
        ("{local}/*/deep/**/*.jsonl", "{local}/_deep_.jsonl.inventory.parquet"),
        ("{local}/one", "{local}/one/inventory.parquet"),
        ("memory://{key}/a.jsonl", "memory://{key}/a.jsonl.inventory.parquet"),
        ("memory://{key}/*/deep/*.jsonl", "memory://{key}/_deep_.jsonl.inventory.parquet"),
        ("memory://{key}/one", "memory://{key}/one/inventory.parquet"),
        ("zip://one/a.jsonl::{local}/all.zip", "{local}/all.zip.one_a.jsonl.inventory.parquet"),
        ("zip://*/a.jsonl::{local}/all.zip", "{local}/all.zip._a.jsonl.inventory.parquet"),
    ],
)
def test_inventories_are_found_again(golden, tmp_path, path, beside):
    """Of files, folders and globs on any filesystem: written where they are looked for, and no records themselves."""
    text = "".join(json.dumps({"messages": ["How are you?", f"Well, {i}."]}) + "\n" for i in range(5))
    key = tmp_path.name
    memory = fsspec.filesystem("memory")
    for name in ("a.jsonl", "one/a.jsonl", "one/deep/a.jsonl", "one/deep/er/b.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        memory.pipe(f"/{key}/{name}", text.encode())
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("one/a.jsonl", text)
    path, beside = (p.format(local=tmp_path, key=key) for p in (path, beside))
    assert inventory_path(path) == beside
    model = BaseModelConfig.load(golden / "molmo-qwen2-siglip-bidir" / "config.yaml")
    with pytest.raises(ConfigError, match="needs their inventory"):
        packed(path, model)
    records, counts = take(path)
    assert counts["usable"] == len(records) >= 5
    require_inventory(beside)
    assert len(packed(path, model).examples(2)) == 2
    assert len(open_records(path)) == len(records)


def test_no_inventory_beside_a_web_server():
    with pytest.raises(ConfigError, match="copy the records to a disk or a bucket"):
        inventory_path("https://example.org/a.jsonl")


class Crashing(MediaMeter):
    """Opening one of the videos kills its process."""

    def build(self, example, rng=None):
        if example["video"].endswith("/crash.mp4"):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().build(example, rng)


@pytest.mark.slow
def test_a_video_that_crashes_its_reader_costs_its_record(make, tmp_path):
    names = [make.clip(tmp_path / f"{name}.mp4").name for name in ("a", "crash", "b")]
    rows = [{"video": name, "question": "What?", "answer": "Noise."} for name in names]
    meter = RecordMeter(open_records(str(make.write_jsonl(tmp_path / "x.jsonl", rows))))
    meter.decoder = VideoDecoder([Crashing()])
    measured = meter.rows(range(3))
    meter.close()
    assert [row.get("frames") for row in measured] == [20, None, 20]
    assert measured[1]["reason"].startswith("video: crashes the decoder: ")


def test_changes_are_those_of_training(golden, tmp_path):
    (tmp_path / "data.yaml").write_text("datasets: {a: {path: x.jsonl}}\n")
    model = golden / "molmo-qwen2-clip" / "config.yaml"
    (tmp_path / "train.yaml").write_text(f"name: x\nsteps: 1\nmodel: {model}\ndata: data.yaml\n")
    (tmp_path / "whole.yaml").write_text(f"name: x\nsteps: 1\nmodel: {model}\ndata: {{datasets: {{a: {{path: x.jsonl}}}}}}\n")
    for name in ("data", "train", "whole"):
        (data,) = load_data(tmp_path / f"{name}.yaml", ["data.datasets.a.path=other.jsonl", "data.shuffle=false"])
        assert (data.datasets["a"].path, data.shuffle) == ("other.jsonl", False), name
    validation = ["validation.data.datasets.b.path=held-out.jsonl"]
    assert [list(data.datasets) for data in load_data(tmp_path / "train.yaml", validation)] == [["a"], ["b"]], "validation packs, too"
    load_data(tmp_path / "train.yaml", ["steps=5", "data.shuffle=false"])
    with pytest.raises(ConfigError, match=r"changes begin with data., as in jobs.train: data.shuffle=false"):
        load_data(tmp_path / "data.yaml", ["shuffle=false"])
    with pytest.raises(ConfigError, match="shufle"):
        load_data(tmp_path / "train.yaml", ["data.shufle=false"])
