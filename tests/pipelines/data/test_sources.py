"""Record files: every form gives the same records, by number, in workers too, and says what is wrong with it."""

from __future__ import annotations

import io
import json
import pickle
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from molmo_core.config import ConfigError
from pipelines.data.sources import Rejected, open_records

ROWS = [{"messages": [f"q{i}", f"a{i}"], "id": i, "image": f"{i}.png"} for i in range(25)]


def rows_of(path, **kwargs):
    records = pickle.loads(pickle.dumps(open_records(str(path), **kwargs)))
    return [records[i].data for i in range(len(records))]


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(r) for r in ROWS]
    path.write_text(lines[0] + "\n\n  \n" + "\r\n".join(lines[1:]))  # blank lines, Windows ends, no last newline
    records = open_records(str(path))
    assert rows_of(path) == ROWS
    assert [records.where(i)[1] for i in range(3)] == [0, 3, 4], "rows are numbered as an editor does, from 0"
    assert records[24].row == 26
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ConfigError, match="no records in it"):
        open_records(str(tmp_path / "empty.jsonl"))


def test_json_array(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*ROWS, 3]))
    records = open_records(str(path))
    assert [records[i].data for i in range(25)] == ROWS
    with pytest.raises(Rejected, match="not an object"):
        records[25]
    path.write_text('{"a": 1}')
    with pytest.raises(ConfigError, match="array"):
        open_records(str(path))


def test_parquet_with_several_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([*ROWS, {"id": 25}]), path, row_group_size=7)
    found = rows_of(path)
    assert found[:25] == ROWS
    assert found[25] == {"id": 25}, "nulls are absent fields"
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match=r"b.parquet: not a Parquet file"):
        open_records(str(tmp_path / "b.parquet"))


def test_hugging_face_on_disk(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"), num_shards=3)
    assert rows_of(tmp_path / "one") == ROWS
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ConfigError, match=r"with splits; name one: .*splits/train"):
        open_records(str(tmp_path / "splits"))
    assert len(open_records(str(tmp_path / "splits" / "train"))) == 25


def test_hugging_face_images(tmp_path, make):
    image = make.picture(tmp_path / "x.png")
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")})
    datasets.Dataset.from_list([{"image": str(image), "question": "q", "answer": "a"}], features=features).save_to_disk(str(tmp_path / "d"))
    (row,) = rows_of(tmp_path / "d")
    assert row["image"]["bytes"] == image.read_bytes() or row["image"]["path"] == str(image)


def test_webdataset(tmp_path):
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as tar:
        tar.write({"__key__": "x/0001", "jpg": b"first", "json": {"messages": ["q", "a"]}})
        tar.write({"__key__": "x/0002", "png": b"second", "txt": "a caption"})
        tar.write({"__key__": "x/0003", "a.jpg": b"one", "b.jpg": b"two", "json": {"messages": ["q", "a"]}})
        tar.write({"__key__": "x/0004", "mp4": b"clip", "json": {"question": "q", "answer": "a"}})
        tar.write({"__key__": "x/0005", "jpg": b"x", "json": b"{broken"})
    records = open_records(str(path))
    assert [records[i].data for i in range(4)] == [
        {"image": b"first", "messages": ["q", "a"]},
        {"image": b"second", "caption": "a caption"},
        {"images": [b"one", b"two"], "messages": ["q", "a"]},
        {"video": b"clip", "question": "q", "answer": "a"},
    ]
    with pytest.raises(Rejected, match="not JSON"):
        records[4]


def test_broken_tars(tmp_path):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for i in range(2):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = 5000
            tar.addfile(info, io.BytesIO(b"x" * 5000))
    (tmp_path / "cut.tar").write_bytes(whole.getvalue()[:7000])
    with pytest.raises(ConfigError, match=r"cut.tar: unreadable tar"):
        open_records(str(tmp_path / "cut.tar"))
    (tmp_path / "html.tar").write_text("<html>" * 200)
    with pytest.raises(ConfigError, match=r"html.tar: unreadable tar"):
        open_records(str(tmp_path / "html.tar"))


def test_folders_globs_and_urls(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": [name, name]}) + "\n")
    (tmp_path / "notes.txt").write_text("not records")
    assert [r["messages"][0] for r in rows_of(tmp_path)] == ["a", "b", "c"]
    assert [r["messages"][0] for r in rows_of(tmp_path / "[ab].jsonl")] == ["a", "b"]
    assert open_records(str(tmp_path)).where(1) == (str(tmp_path / "b.jsonl"), 0)
    assert rows_of(f"file://{tmp_path}/c.jsonl")[0]["messages"] == ["c", "c"]
    with pytest.raises(ConfigError, match="no file matches"):
        open_records(str(tmp_path / "*.parquet"))
    with pytest.raises(ConfigError, match=r"cannot tell what kind.*supported: .jsonl"):
        open_records(str(tmp_path / "notes.txt"))
    (tmp_path / "notes.txt").write_text('{"messages": ["q", "a"]}')
    assert rows_of(tmp_path / "notes.txt", format="jsonl") == [{"messages": ["q", "a"]}]
