"""The inventory knows what can be used and how long every example will be, and nothing is decoded for it."""

from __future__ import annotations

import collections
import concurrent.futures

import pyarrow as pa
import pytest

from molmo_core.config import ConfigError
from molmo_core.models.base import BaseModelConfig
from pipelines.data import schema
from pipelines.data.batches.packs import Streamed
from pipelines.data.batches.plan import Draw
from pipelines.data.builder import ExampleBuilder
from pipelines.data.preparation.inventory import SCHEMA, Inventory, inventory_path, measure_records, write_inventory
from pipelines.data.rejects import Rejected
from pipelines.data.sources import open_records


def take(path):
    """What `take_inventory` does, in this process."""
    records = open_records(str(path))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        rows = measure_records(records, list(range(len(records))), pool)
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
