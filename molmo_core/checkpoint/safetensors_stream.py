"""safetensors files, read and written tensor by tensor.

The safetensors library maps whole files (their pages then count as memory of the process) and writes only what is all in
memory. Loading here reads straight into the destination, and writing takes one tensor at a time, so that a
checkpoint passes through a buffer of `CHUNK_BYTES`. The format is: 8 bytes length, a JSON header, the raw tensors.
"""

from __future__ import annotations

import functools
import json
import math
import os
import struct
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from molmo_core.checkpoint.folder import PICKLE_SUFFIXES, CheckpointError, pickle_refusal

CHUNK_BYTES = 32 * 2**20
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_AGAIN = "copy or download it again"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types that a model computes in; narrower ones mean nothing without the scales of their quantisation."""


def model_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point type, given as such or by its name in torch (None stays None).

    Raises:
        ValueError: no type that a model computes in.
    """
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found is not None and found not in MODEL_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in MODEL_DTYPES)
        raise ValueError(f"dtype={dtype!r} is not a type that a model computes in ({names}; None = as stored)")
    return found


class TensorSpec(NamedTuple):
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Entry(NamedTuple):
    spec: TensorSpec
    file: Path
    offset: int


class SafetensorsReader:
    """The tensors of a folder (one file, or shards with an index) or of one file. Opening reads only headers."""

    def __init__(self, path: str | Path) -> None:
        """Opens a checkpoint.

        Raises:
            CheckpointError: nothing there, a damaged or missing file, or weights that exist as a pickle only.
        """
        self.path = Path(path)
        self._entries: dict[str, _Entry] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)
        for file, wanted in _files(self.path).items():
            entries = _read_header(file)
            missing = sorted(set(wanted or entries) - set(entries))
            if missing:
                raise CheckpointError(f"{file}: the index promises tensors that are not in the file: {', '.join(missing)}")
            self._entries.update({name: entries[name] for name in wanted or entries})

    @functools.cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Type and shape of every tensor, in file order."""
        return types.MappingProxyType({name: entry.spec for name, entry in self._entries.items()})

    def position(self, name: str) -> tuple[str, int]:
        """Where a tensor is (file, offset): reading in this order reads forward."""
        entry = self._entries[name]
        return str(entry.file), entry.offset

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor on the CPU."""
        spec = self._entries[name].spec
        out = torch.empty(spec.shape, dtype=spec.dtype)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: torch.Tensor, rows: tuple[int, int] | None = None) -> None:
        """Reads a tensor, or rows [start, stop) of it, into `out` (same shape; its own device and dtype)."""
        spec, file, offset = self._entries[name]
        start, stop = rows or (0, spec.shape[0] if spec.shape else 1)
        shape = (stop - start, *spec.shape[1:])
        out = out.view(shape) if not spec.shape else out
        if tuple(out.shape) != shape:
            raise ValueError(f"{name}: rows {start}:{stop} have shape {shape}, the destination has {tuple(out.shape)}")
        row_bytes = math.prod(shape[1:]) * spec.dtype.itemsize
        with file.open("rb") as stream:
            stream.seek(offset + start * row_bytes)
            if out.device.type == "cpu" and out.dtype == spec.dtype and out.is_contiguous():
                _fill(stream, out, file)
                return
            step = max(1, CHUNK_BYTES // max(1, row_bytes))
            if len(self._buffer) < step * row_bytes:
                self._buffer = torch.empty(step * row_bytes, dtype=torch.uint8)
            for first in range(0, stop - start, step):
                count = min(step, stop - start - first)
                chunk = self._buffer[: count * row_bytes].view(spec.dtype).view(count, *shape[1:])
                _fill(stream, chunk, file)
                out[first : first + count].copy_(chunk)


def write_safetensors(
    folder: str | Path,
    specs: Mapping[str, TensorSpec],
    tensor: Callable[[str], torch.Tensor | None],
    max_shard_bytes: int | None = None,
    write: bool = True,
) -> list[Path]:
    """Writes model.safetensors, or numbered shards and their index when the tensors exceed `max_shard_bytes`.

    Args:
        folder: existing folder.
        specs: what to write; larger element types come first in a file, so that all stay aligned.
        tensor: gives a tensor by name, called once each, in order. Its shape must be the promised one; it is cast to the dtype.
        write: False on the ranks that only take part in `tensor`, where that is a collective operation (it may return None).

    Returns:
        The files written.
    """
    folder = Path(folder)
    ordered = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    shards = _shards(ordered, specs, max_shard_bytes)
    names = [WEIGHTS_NAME] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file_name, shard in zip(names, shards, strict=True):
        if not write:
            for name in shard:
                tensor(name)
            continue
        with (folder / file_name).open("wb") as stream:
            stream.write(_header(shard, specs))
            for name in shard:
                stream.write(_bytes(tensor(name), name, specs[name]))
            stream.flush()
            os.fsync(stream.fileno())
    if write and len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(s.nbytes for s in specs.values())},
            "weight_map": {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard},
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return [folder / name for name in names]


def _files(path: Path) -> dict[Path, list[str] | None]:
    """The files of a checkpoint and the tensors expected in each (None: all that are in it)."""
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(pickle_refusal(path))
    if path.is_file():
        return {path: None}
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    if (path / INDEX_NAME).is_file():
        try:
            weight_map = dict(json.loads((path / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path / INDEX_NAME}: no index of shards ({error!r}); {_AGAIN}") from error
        files: dict[Path, list[str] | None] = {}
        for name, file_name in weight_map.items():
            if Path(file_name).name != file_name:
                raise CheckpointError(f"{path / INDEX_NAME}: {file_name!r} is not a file of this folder")
            wanted = files.setdefault(path / file_name, [])
            assert wanted is not None
            wanted.append(name)
        absent = sorted(f.name for f in files if not f.is_file())
        if absent:
            raise CheckpointError(f"{path}: shards named by {INDEX_NAME} are missing: {', '.join(absent)}; {_AGAIN}")
        return files
    if (path / WEIGHTS_NAME).is_file():
        return {path / WEIGHTS_NAME: None}
    pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(pickle_refusal(pickles[0]))
    shards = ", though shards are: the copy or download is not complete" if any(path.glob("*.safetensors")) else ""
    raise CheckpointError(f"{path}: neither {WEIGHTS_NAME} nor {INDEX_NAME} in this folder{shards}")


def _read_header(file: Path) -> dict[str, _Entry]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"{file}: not a safetensors file, or cut off; {_AGAIN}")
        text = stream.read(length)
    try:
        header = {name: info for name, info in dict(json.loads(text)).items() if name != "__metadata__"}
        found = [(name, info["dtype"], tuple(info["shape"]), *map(int, info["data_offsets"])) for name, info in header.items()]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not a safetensors file, or damaged ({error!r}); {_AGAIN}") from error
    entries = {}
    for name, dtype, shape, start, stop in sorted(found, key=lambda item: item[3]):
        if dtype not in DTYPES:
            raise CheckpointError(f"{file}: tensor {name} has the unsupported type {dtype}")
        spec = TensorSpec(DTYPES[dtype], shape)
        if start < 0 or stop - start != spec.nbytes or 8 + length + stop > size:
            raise CheckpointError(f"{file}: tensor {name} is cut off (the file is damaged or its download is incomplete); {_AGAIN}")
        entries[name] = _Entry(spec, file, 8 + length + start)
    return entries


def _fill(stream: BinaryIO, out: torch.Tensor, file: Path) -> None:
    buffer = out.detach().reshape(-1).view(torch.uint8).numpy().data
    if stream.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise CheckpointError(f"{file}: cut off while reading")


def _shards(names: Iterable[str], specs: Mapping[str, TensorSpec], limit: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name in names:
        if limit is not None and shards[-1] and used + specs[name].nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += specs[name].nbytes
    return shards


def _header(names: list[str], specs: Mapping[str, TensorSpec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        spec = specs[name]
        header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: torch.Tensor | None, name: str, spec: TensorSpec) -> memoryview:
    if tensor is None or tuple(tensor.shape) != spec.shape:
        raise ValueError(f"{name}: expected shape {spec.shape}, got {None if tensor is None else tuple(tensor.shape)}")
    tensor = tensor.detach().cpu()
    flat = tensor.to(spec.dtype).contiguous().reshape(-1)
    if spec.dtype != tensor.dtype and not flat.isfinite().all() and tensor.isfinite().all():
        kind = str(spec.dtype).removeprefix("torch.")
        raise CheckpointError(f"{name}: values up to {tensor.abs().max():.3g} are infinite in {kind}; store it as bfloat16 or float32")
    return flat.view(torch.uint8).numpy().data
