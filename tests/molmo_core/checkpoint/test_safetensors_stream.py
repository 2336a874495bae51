"""Reading and writing safetensors, against the safetensors library."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from molmo_core.checkpoint import safetensors_stream
from molmo_core.checkpoint.safetensors_stream import CheckpointError, SafetensorsReader, TensorSpec, write_safetensors

TENSORS = {
    "matrix": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
    "half": torch.randn(3, 2).to(torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "ids": torch.arange(6).view(2, 3),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def specs(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def test_reads_what_the_library_wrote(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    assert reader.specs == specs(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read(name), tensor), name


@pytest.mark.parametrize("limit", [None, 60, 1])
def test_the_library_reads_what_is_written(tmp_path, limit):
    files = write_safetensors(tmp_path, specs(TENSORS), TENSORS.__getitem__, limit)
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    reader = SafetensorsReader(tmp_path)
    assert all(torch.equal(reader.read(name), TENSORS[name]) for name in TENSORS)
    if limit is None:
        assert [f.name for f in files] == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {f.name for f in files}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"


def test_rows_and_conversion_pass_through_a_small_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_stream, "CHUNK_BYTES", 48)  # two rows of five floats
    save_file(TENSORS, tmp_path / "model.safetensors")
    out = torch.full((7, 5), -1.0, dtype=torch.float64)
    SafetensorsReader(tmp_path).read_into("matrix", out[2:6], rows=(1, 5))
    assert torch.equal(out[2:6].float(), TENSORS["matrix"][1:5])
    assert (out[:2] == -1).all()
    assert (out[6:] == -1).all()
    transposed = torch.empty(5, 7)
    SafetensorsReader(tmp_path).read_into("matrix", transposed.t())
    assert torch.equal(transposed, TENSORS["matrix"].t())
    with pytest.raises(ValueError, match="rows 0:7"):
        SafetensorsReader(tmp_path).read_into("matrix", torch.empty(6, 5))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused_with_the_way_out(tmp_path, name):
    torch.save(TENSORS, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=r"unpickling runs code[\s\S]*save_file"):
            SafetensorsReader(path)


def test_damaged_files_are_named(tmp_path):
    write_safetensors(tmp_path, specs(TENSORS), TENSORS.__getitem__, 60)
    shard = tmp_path / "model-00001-of-00005.safetensors"
    files = sorted(tmp_path.glob("model-*.safetensors"))
    shard = next(f for f in files if "matrix" in load_file(f))
    content = shard.read_bytes()
    shard.write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match=rf"{shard.name}.*matrix is cut off"):
        SafetensorsReader(tmp_path)
    shard.write_bytes(b"hello")
    with pytest.raises(CheckpointError, match=f"{shard.name}: not a safetensors file"):
        SafetensorsReader(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"missing: {shard.name}"):
        SafetensorsReader(tmp_path)


def test_an_index_that_promises_too_much(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"promises tensors that are not in the file: b"):
        SafetensorsReader(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        SafetensorsReader(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        SafetensorsReader(tmp_path)


def test_a_wrong_tensor_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"x: expected shape \(2,\)"):
        write_safetensors(tmp_path, {"x": TensorSpec(torch.float32, (2,))}, lambda _: torch.zeros(3))
