"""Record files: every form gives the same records, by number, in workers too, and says what is wrong with it."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import io
import json
import os
import pickle
import tarfile
import threading
import zipfile

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from molmo_core.config import ConfigError
from pipelines.data.preparation.inventory import inventory_path
from pipelines.data.rejects import Rejected
from pipelines.data.sources import open_records

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


def tar_of(*files: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def test_webdataset_media_of_one_sample(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(
        tar_of(
            ("0.jpg", b"i"), ("0.mp4", b"v"), ("1.a.mp4", b"v"), ("1.b.mp4", b"v"), ("2.img10.jpg", b"ten"), ("2.img2.jpg", b"two"),
            ("._2.jpg", b"what macOS adds"),
        )
    )  # fmt: skip
    records = open_records(str(path))
    assert len(records) == 3
    for i in (0, 1):
        with pytest.raises(Rejected, match="record: too many media"):
            records[i]
    assert records[2].data == {"images": [b"two", b"ten"]}


def test_joined_tars_repeat_their_keys(tmp_path):
    first, second = (tar_of(("0.jpg", name), ("0.txt", name), ("1.jpg", name)) for name in (b"first", b"second"))
    (tmp_path / "a.tar").write_bytes(first + second)
    found = [row["image"] for row in rows_of(tmp_path / "a.tar")]
    assert found == [b"first", b"first", b"second", b"second"]


def test_broken_tars(tmp_path):
    whole = tar_of(("0.jpg", b"x" * 5000), ("1.json", b'{"messages": ["q", "a"]}'), ("1.jpg", b"x" * 5000))
    second = 512 + 5120  # where the header of 1.json begins
    for cut in (second + 1100, second + 1024, second + 512 + 10, second + 1024 + 512 + 3000):  # in a header, before it, in the files
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        records = open_records(str(tmp_path / "cut.tar"))
        assert records[0].data == {"image": b"x" * 5000}
        assert len(records) == 2
        with pytest.raises(Rejected, match="record: truncated tar"):
            records[1]
    for name, data in {"first.tar": whole[:3000], "html.tar": b"<html>" * 200, "empty.tar": b""}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=f"{name}: unreadable tar"):
            open_records(str(tmp_path / name))


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


def test_rows_that_no_parser_takes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": ' + b"7" * 5000 + b'}\n{"id": ' + b"[" * 100_000 + b'\n{"id": 1}\n')
    records = open_records(str(path))
    for i in (0, 1):
        with pytest.raises(Rejected, match="record: not JSON"):
            records[i]
    assert records[2].data == {"id": 1}
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"]).buffers())
    pq.write_table(pa.table({"question": broken}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"day": pa.array([10**7], pa.date32())}), tmp_path / "b.parquet")
    for read in (open_records(str(tmp_path / "a.parquet")).__getitem__, open_records(str(tmp_path / "a.parquet")).text):
        assert read(0).data == {"question": "ok"}
        with pytest.raises(Rejected, match="record: not UTF-8"):
            read(1)
    with pytest.raises(Rejected, match="record: unreadable value"):
        open_records(str(tmp_path / "b.parquet"))[0]
    reason = Rejected("record: bad field", "half a pair: \ud800")
    assert json.dumps(reason.detail, ensure_ascii=False).encode() == b'"half a pair: ?"'
    assert pickle.loads(pickle.dumps(reason)).detail == reason.detail


def test_byte_order_marks(tmp_path):
    bom = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(bom + b'{"id": 0}\r\n' + bom + b'{"id": 1}\n' + bom)
    (tmp_path / "b.json").write_bytes(bom + b'[{"id": 2}]')
    (tmp_path / "c.tar").write_bytes(tar_of(("0.json", bom + b'{"id": 3}'), ("1.txt", bom + b"a caption")))
    assert rows_of(tmp_path) == [{"id": 0}, {"id": 1}, {"id": 2}, {"id": 3}, {"caption": "a caption"}]


def test_folders_and_globs_of_any_filesystem(tmp_path):
    memory = fsspec.filesystem("memory")
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", ".hidden.jsonl", "deep/.cache/d.jsonl", "notes.txt"):
        line = json.dumps({"id": name}).encode()
        memory.pipe_file(f"/globs/{name}", line)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(line)
    for name in ("inventory.parquet", "a.jsonl.inventory.parquet"):  # what jobs.inventory writes
        pq.write_table(pa.table({"row": [0]}), tmp_path / name)
        memory.pipe_file(f"/globs/{name}", (tmp_path / name).read_bytes())
    for base in (str(tmp_path), f"file://{tmp_path}", f"file://localhost{tmp_path}", "memory://globs"):
        found = {p: [row["id"] for row in rows_of(f"{base}{p}")] for p in ("", "/*.jsonl", "/**/*.jsonl", "/*/c.jsonl", "/[a]*")}
        assert found[""] == found["/*.jsonl"] == ["a.jsonl", "b.jsonl"]
        assert found["/**/*.jsonl"] == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
        assert found["/*/c.jsonl"] == ["deep/c.jsonl"]
        assert found["/[a]*"] == ["a.jsonl"]
        with pytest.raises(ConfigError, match="no file matches"):
            open_records(f"{base}/*.parquet")
        with pytest.raises(ConfigError, match=r"no such file|unreadable"):
            open_records(f"{base}/nowhere.jsonl")
    assert inventory_path(str(tmp_path)) == f"{tmp_path}/inventory.parquet", "the names that are left out"
    assert inventory_path(str(tmp_path / "*.jsonl")).endswith(".inventory.parquet")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "a.jsonl", "a.jsonl")
    assert rows_of(f"zip://*.jsonl::{tmp_path}/all.zip") == [{"id": "a.jsonl"}]


def test_hugging_face_by_url(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "a b"))
    assert rows_of(f"file://{tmp_path}/a b") == rows_of(f"file://{tmp_path}/a%20b") == ROWS
    fsspec.filesystem("memory").pipe_file("/hf/state.json", b"{}")
    with pytest.raises(ConfigError, match="copy it to a local disk"):
        open_records("memory://hf")


@pytest.fixture
def server(tmp_path):
    """The URL of a server of `tmp_path` that knows no range requests."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.handle_error = lambda *_: None  # a client that has seen enough hangs up
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls_that_cannot_be_used(tmp_path, server):
    with pytest.raises(ConfigError, match=r"^foo://x/a.jsonl: unreadable: Protocol not known: foo$"):
        open_records("foo://x/a.jsonl")
    if importlib.util.find_spec("s3fs") is None:
        with pytest.raises(ConfigError, match=r"^s3://x/a.jsonl: .*missing: Install s3fs"):
            open_records("s3://x/a.jsonl")
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    assert rows_of(f"{server}/b.json?key=1") == ROWS, "is read as a whole"
    with pytest.raises(ConfigError, match="unreadable"):
        open_records(f"{server}/nowhere.jsonl")
    large = [{"text": os.urandom(3 << 20).hex()} for _ in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in large))
    pq.write_table(pa.Table.from_pylist(large), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(ConfigError, match="its server gives no parts of files"):
            open_records(f"{server}/{name}")


def test_stamps_tell_changed_records(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "hf"), num_shards=2)
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n')
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/stamps/a.jsonl", b'{"id": 1}\n')
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "hf"), "memory://stamps/a.jsonl"]
    before = [open_records(p).stamp for p in paths]
    assert before == [pickle.loads(pickle.dumps(open_records(p))).stamp for p in paths] == json.loads(json.dumps(before))
    assert before[0] == [[paths[0], 1, 10, (tmp_path / "a.jsonl").stat().st_mtime_ns]]
    shards = sorted((tmp_path / "hf").glob("*.arrow"))
    assert before[1][0][:3] == [paths[1], 25, sum(s.stat().st_size for s in shards)]
    (tmp_path / "a.jsonl").write_text('{"id": 2}\n')
    memory.pipe_file("/stamps/a.jsonl", b'{"id": 2}\n')
    os.utime(shards[0], ns=(0, 0))
    os.utime(tmp_path / "a.jsonl", ns=(0, 0))
    assert all(open_records(p).stamp != stamp for p, stamp in zip(paths, before))
