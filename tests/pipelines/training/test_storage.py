"""The storage of a run behind a URL: what tells that a folder is whole comes last."""

import pytest
from pyarrow import fs

from pipelines.training.storage import Storage


@pytest.fixture
def remote(tmp_path):
    """A storage whose filesystem is not taken for a disk of this machine."""
    storage = Storage(str(tmp_path), "run")
    storage.local = None
    return storage


def test_a_folder_is_whole_last(remote, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    for name in ("checksums.json", "config.yaml", "model.safetensors"):
        (folder / name).write_text(name)
    order = []
    copy = fs.copy_files

    def watched(source, *arguments):
        copy(source, *arguments)
        order.append(sorted(path.name for path in (tmp_path / "run/step_000001/model").iterdir()))

    monkeypatch.setattr(fs, "copy_files", watched)
    remote.upload(folder, "step_000001/model", last="checksums.json")
    assert order == [["config.yaml", "model.safetensors"]]
    assert remote.read("step_000001/model/checksums.json") == "checksums.json"
