"""Parquet rows at random: their text without their media, and how many row groups are kept."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.records.tables import Recent
from pipelines.data.rejects import Rejected
from pipelines.data.sources import open_records


def test_parquet_text_does_not_read_media(tmp_path):
    path = tmp_path / "a.parquet"
    noise = [bytes([i]) + os.urandom(5000) for i in range(20)]
    rows = [{"image": {"bytes": noise[i], "path": f"{i}.png"}, "video": noise[-i], "question": f"{i}?"} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=6, compression="none")
    records = open_records(str(path))
    expected = [{**row, "image": {**row["image"], "bytes": b"-"}, "video": b"-"} for row in rows]
    assert [records[i].data for i in range(20)] == rows
    assert [records.text(i).data for i in range(20)] == expected
    data = bytearray(path.read_bytes())
    metadata = pq.read_metadata(path)
    for group in range(metadata.num_row_groups):
        for k in range(metadata.num_columns):
            column = metadata.row_group(group).column(k)
            if column.path_in_schema in ("image.bytes", "video"):
                start = column.dictionary_page_offset or column.data_page_offset
                data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    damaged = open_records(str(path))
    assert [damaged.text(i).data for i in range(20)] == expected
    with pytest.raises(Rejected, match="unreadable row group"):
        damaged[0]


def test_parquet_text_of_every_form_of_media(tmp_path):
    picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema(
        {
            "id": pa.int64(),
            "image": pa.binary(),
            "images": pa.list_(pa.binary()),
            "frames": pa.list_(picture),
            "video": pa.struct({"bytes": pa.large_binary(), "start": pa.float64()}),
            "only": pa.struct({"bytes": pa.binary()}),
            "a.b": pa.binary(),
            "a.c": pa.string(),
            "map": pa.map_(pa.string(), pa.binary()),
        }
    )
    rows = [
        {"id": 0, "image": b"x", "images": [b"y", None, b"z"], "frames": [{"bytes": b"f", "path": "p"}, None], "map": [("k", b"v")]},
        {"id": 1, "video": {"bytes": b"clip", "start": 1.5}, "only": {"bytes": b"o"}, "a.b": b"ab", "a.c": "ac"},
        {"id": 2, "images": [], "frames": []},
        {"id": 3, "a.c": "beside nothing"},
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
    records = open_records(str(tmp_path / "a.parquet"))

    def light(value):
        if isinstance(value, dict):
            return {k: light(v) for k, v in value.items()}
        return [light(v) for v in value] if isinstance(value, list) else b"-" if isinstance(value, bytes) else value

    for i in range(4):
        assert records.text(i).data == light(records[i].data)
        assert records.text(i).row == i
    pq.write_table(pa.table({"image": [b"x", b"y"]}), tmp_path / "media.parquet")
    assert open_records(str(tmp_path / "media.parquet")).text(1).data.keys() == {"image"}
    (tmp_path / "a.jsonl").write_text('{"image": "x.png"}')
    assert open_records(str(tmp_path / "a.jsonl")).text(0) == open_records(str(tmp_path / "a.jsonl"))[0]


def test_recent_tables_are_bounded_by_bytes():
    made = []

    def get(key):
        return recent.get(key, lambda: made.append(key) or pa.table({"x": pa.array([key] * 100, pa.int64())}))

    recent = Recent(2000)  # two tables of 800 bytes
    for key in (1, 2, 1, 3, 1, 2):
        assert get(key).column("x")[0].as_py() == key
    assert made == [1, 2, 3, 2], "the one that was used longest ago makes room"
    recent = Recent(10)
    made.clear()
    for key in (1, 1, 2, 2):
        get(key)
    assert made == [1, 2], "one is kept however large"
