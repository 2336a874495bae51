"""WebDataset tars: every file of a sample is used, is a field that is counted by name, or rejects the sample by name."""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pipelines.data.records.files import WebDataset
from pipelines.data.records.reading import read_record
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Record

SOUND = b"RIFF\x24\0\0\0WAVEfmt "
ARRAY = b"\x93NUMPY\1\0v\0{'descr': '<f4'}"
RECORD = b'{"question": "What?", "answer": "A cat."}'


def sample(tmp_path: Path, files: dict[str, bytes]) -> Record:
    path = tmp_path / "a.tar"
    with tarfile.open(path, mode="w") as tar:
        for extension, data in files.items():
            info = tarfile.TarInfo(f"0001.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return Record(str(path), 0, WebDataset(str(path)).read(0))


@pytest.mark.parametrize(
    ("files", "expected", "counted"),
    [
        ({"json": RECORD, "cls": b"3\n"}, {}, ["cls"]),
        ({"json": RECORD, "id": b"a b"}, {}, []),
        ({"json": RECORD, "meta.json": b'{"camera": "a b", "size": [3, 4]}'}, {}, ["meta"]),
        ({"question.txt": b"What?", "answer.txt": b"A cat.\n"}, {}, []),
        ({"json": b'{"question": "What?"}', "answer": b"A cat."}, {}, []),
        ({"json": RECORD, "answer.txt": b"A cat."}, {}, []),
        ({"json": b'{"question": "What?", "answer": "A cat.", "image": "coco/7.jpg"}'}, {}, []),
        ({"json": RECORD, "txt": b" "}, {}, ["caption"]),
        ({"txt": b"A cat.", "json": b'{"width": 3, "url": "https://host/a.jpg"}'}, {"text": "A cat."}, ["width", "url"]),
        ({"txt": b"A cat.\n", "json": b'{"caption": "A cat. ", "key": "7"}'}, {"text": "A cat. "}, ["key"]),
    ],
)  # fmt: skip
def test_every_file_of_a_sample_is_a_field(tmp_path, files, expected, counted):
    counts: Counter[str] = Counter()
    example = read_record(sample(tmp_path, {"jpg": b"picture", **files}), counts)
    expected = expected or {"question": "What?", "answer": "A cat."}
    assert {k: v for k, v in example.items() if k in ("image", "text", "question", "answer")} == {"image": b"picture", **expected}
    assert sorted(counts) == sorted(counted)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"json": RECORD, "wav": SOUND}, "wav: sound is not read"),
        ({"json": RECORD, "npy": ARRAY}, "npy: not read, and it may change the meaning"),
        ({"json": RECORD, "box.pth": b"PK\3\4\0"}, "box.pth: not read"),
        ({"json": RECORD, "pyd": b"\x80\4\x95"}, "pyd: not read"),
        ({"json": RECORD, "seg.png": b"\x89PNG"}, "seg.png: this image is not read beside the others"),
        ({"json": RECORD, "txt": b"A second text."}, "caption: .*a record is one task"),
        ({"json": b'{"messages": ["What?", "A cat."]}', "txt": b"A second text."}, "txt: not read"),
        ({"json": b'{"text": "A cat.", "style": "long_caption"}', "txt": b"A second text."}, "txt: not read"),
        ({"json": b'{"caption": "A cat."}', "txt": b"A dog."}, "txt: not read"),
        ({"json": RECORD, "answer.txt": b"A dog."}, "answer: once in the .json and once as a file"),
        ({"json": RECORD, "system.txt": b"Be brief.", "weight": b"half"}, "weight"),
        ({"json": RECORD, "notes.txt": b"two words", "context.txt": b"two words"}, "context: not read"),
        ({"json": b'{"question": "What?", "answer": "A.", "image": "data:image/png;base64,i"}'}, "image: in the .json, and as a file"),
        ({"json": b'{"question": "What?", "answer": "A.", "images": ["a.png", "b.png"]}'}, "in the .json, and as a file"),
        ({"json": RECORD, "more.json": b"{broken"}, "record: not JSON"),
        ({"json": RECORD, "answer.txt": b"\xff\xfe"}, "record: not UTF-8"),
    ],
)  # fmt: skip
def test_files_that_nothing_reads_reject_the_sample_by_name(tmp_path, files, reason):
    with pytest.raises(Rejected, match=reason):
        read_record(sample(tmp_path, {"jpg": b"picture", **files}))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text("abcdefgmnopstwxyz_.", min_size=1, max_size=12),
    st.binary(min_size=1, max_size=40) | st.text("ab c\n", min_size=1).map(str.encode),
)
def test_no_file_of_a_sample_is_lost(tmp_path, extension, data):
    extension = extension.strip(".")
    assume(extension and extension.rpartition(".")[2] not in (*WebDataset.IMAGES, *WebDataset.VIDEOS))
    counts: Counter[str] = Counter()
    rejected = ""
    try:
        example = read_record(sample(tmp_path, {"jpg": b"picture", "json": RECORD, extension: data}), counts)
    except Rejected as reason:
        rejected = str(reason)
    name = re.escape(re.sub(r"\.(json|txt)$", "", extension))
    if rejected:
        assert re.search(rf"\b(record: not (JSON|UTF-8)|caption|{name})", rejected)
    else:
        assert counts or len(example) > len(read_record(sample(tmp_path, {"jpg": b"picture", "json": RECORD})))
