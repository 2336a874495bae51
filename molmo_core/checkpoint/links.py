"""Which rows of which tensor here are which rows of which tensor there: one table for both directions of a conversion."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from molmo_core.checkpoint.checksums import check_folder
from molmo_core.checkpoint.folder import CheckpointError
from molmo_core.checkpoint.safetensors_stream import MODEL_DTYPES, SafetensorsReader, TensorSpec, model_dtype
from molmo_core.nn.lora import is_adapter

if TYPE_CHECKING:
    from molmo_core.preprocessing.tokenizer import Tokenizer

Rows = tuple[int, int]
# What activation checkpointing, torch.compile and FSDP put into parameter names.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")


class Model(Protocol):
    """What checkpoints need of a model (`molmo_core.models.base.ModelBase` has it)."""

    config: Any

    @property
    def tokenizer(self) -> Tokenizer: ...

    def state_dict(self) -> dict[str, Any]: ...

    def named_modules(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]: ...


class Link(NamedTuple):
    """A (part of a) tensor of a model and where it is in another layout. Parts are ranges of rows (first axis)."""

    native: str
    """Name in the model."""
    other: str
    """Name in the other layout."""
    native_rows: Rows | None = None
    """[start, stop) in the model's tensor; None = all."""
    other_rows: Rows | None = None
    transposed: bool = False
    """The part is stored transposed there."""
    convert: Callable[[torch.Tensor], torch.Tensor] | None = None
    """What makes the model's tensor out of the other one, where that is not a plain copy (such links go one way)."""
    export_only: bool = False
    """A second copy there of what another link already fills here."""


class LoadReport(NamedTuple):
    """What `strict=False` let pass."""

    missing: list[str]
    """Tensors of the model that the checkpoint does not have."""
    unexpected: list[str]
    """Tensors of the checkpoint that the model does not have."""


def same_names(names: Iterable[str]) -> list[Link]:
    """Links of the native layout: every tensor is itself."""
    return [Link(name, name) for name in names]


def model_tensors(model: Model) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by their native names (wrappers' prefixes left out), adapters aside: no checkpoint has them."""
    return {clean_name(name): tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}


def load_tensors(
    model: Model,
    reader: SafetensorsReader,
    links: list[Link],
    strict: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LoadReport:
    """Fills a model from a checkpoint, tensor by tensor.

    Tensors of the model on the meta device are created; others are overwritten in place and keep their type and
    device. Of an FSDP-sharded model every rank reads its own rows.

    Args:
        links: how names and rows correspond; links whose `other` the checkpoint lacks count as missing.
        strict: raise on missing or unexpected tensors; False reports them. A wrong shape is always an error.
        dtype: floating-point type of created tensors; None = as stored.
        device: where created tensors go; None = CPU.

    Raises:
        CheckpointError: one error that names every missing, unexpected and mis-shaped tensor; or a file is not as it was written
            (where the folder has checksums). Nothing has been loaded then.
    """
    tensors = model_tensors(model)
    targets, report = by_native(links), check_fit(tensors, links, reader, strict)
    check_folder(reader.path)  # last: what has a more specific message has been told by now
    names = [name for name in targets if name in tensors and name not in report.missing]
    owners = _owners(model)
    for name in sorted(names, key=lambda n: reader.position(targets[n][0].other)):
        tensor, parts = tensors[name], targets[name]
        if tensor.is_meta:
            stored = reader.specs[parts[0].other].dtype
            new = torch.empty(tensor.shape, dtype=dtype if dtype and stored.is_floating_point else stored, device=device)
            _assemble(new, parts, reader)
            module, leaf = owners[name]
            old = getattr(module, leaf)
            setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)
        elif isinstance(tensor, DTensor) and (held := held_rows(tensor)) and not any(p.transposed or p.convert for p in parts):
            _assemble(tensor.to_local().detach(), parts_of(parts, held, reader), reader)
        elif isinstance(tensor, DTensor):
            full = torch.empty(tensor.shape, dtype=tensor.dtype)
            _assemble(full, parts, reader)
            fill(tensor, full)
        else:
            _assemble(tensor.detach(), parts, reader)
    return report


def fill(tensor: torch.Tensor, full: torch.Tensor) -> None:
    """Copies a whole tensor, the same on all ranks, into one of a model that may be a shard."""
    if not isinstance(tensor, DTensor):
        tensor.detach().copy_(full)
        return
    local = distribute_tensor(full.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements, src_data_rank=None)
    typing.cast(DTensor, tensor.detach()).to_local().copy_(typing.cast(DTensor, local).to_local())


def held_rows(tensor: DTensor) -> Rows | None:
    """The rows [start, stop) of a tensor that this rank's shard is; None if it is sharded otherwise than by rows."""
    start, stop = 0, tensor.shape[0] if tensor.ndim else 0
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        if type(placement) is not Shard or placement.dim != 0:
            return None
        chunk = -(-(stop - start) // tensor.device_mesh.size(dimension))  # the last ranks may have fewer rows, or none
        first = min(stop, start + chunk * tensor.device_mesh.get_local_rank(dimension))
        start, stop = first, min(stop, first + chunk)
    return (start, stop) if tensor.to_local().shape[:1] == (stop - start,) else None


def parts_of(parts: list[Link], held: Rows, reader: SafetensorsReader) -> list[Link]:
    """What plain links fill of rows [start, stop) of their tensor, as links to a tensor of these rows alone."""
    found = []
    for link in parts:
        rows = reader.specs[link.other].shape[0]
        there = link.other_rows or (0, rows)
        here = link.native_rows or (0, there[1] - there[0])
        first, last = max(here[0], held[0]), min(here[1], held[1])
        if first < last:
            moved = there[0] - here[0]
            found.append(link._replace(native_rows=(first - held[0], last - held[0]), other_rows=(first + moved, last + moved)))
    return found


def export_specs(tensors: Mapping[str, torch.Tensor], links: list[Link], dtype: torch.dtype | None = None) -> dict[str, TensorSpec]:
    """Types and shapes that the model's tensors have in the other layout.

    Raises:
        ValueError: `dtype` is not a floating-point type.
    """
    dtype = model_dtype(dtype)
    specs: dict[str, TensorSpec] = {}
    for other, parts in _by_other(links).items():
        shapes = [_part_shape(tuple(tensors[link.native].shape), link.native_rows, link.transposed) for link in parts]
        stored = tensors[parts[0].native].dtype
        rows = sum(shape[0] for shape in shapes) if len(parts) > 1 else None
        shape = shapes[0] if rows is None else (rows, *shapes[0][1:])
        specs[other] = TensorSpec(dtype if dtype and stored.is_floating_point else stored, shape)
    return specs


def exporter(tensors: Mapping[str, torch.Tensor], links: list[Link]) -> Callable[[str], torch.Tensor | None]:
    """A function that builds a tensor of the other layout by name (collective for FSDP shards: rank 0 gets it, others None)."""
    by_other = _by_other(links)

    def build(other: str) -> torch.Tensor | None:
        parts = [_gathered(tensors[link.native]) for link in by_other[other]]
        if dist.is_initialized() and dist.get_rank() != 0:
            return None
        pieces = []
        for link, tensor in zip(by_other[other], parts, strict=True):
            piece = tensor if link.native_rows is None else tensor[slice(*link.native_rows)]
            pieces.append(piece.t() if link.transposed else piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return build


def by_native(links: list[Link]) -> dict[str, list[Link]]:
    """The parts of each of the model's tensors (second copies left out)."""
    parts: dict[str, list[Link]] = {}
    for link in links:
        if not link.export_only:
            parts.setdefault(link.native, []).append(link)
    return parts


def read_native(tensor: torch.Tensor, parts: list[Link], reader: SafetensorsReader) -> torch.Tensor:
    """A tensor of the model, on the CPU and of the type that is stored; of `tensor` only the shape counts."""
    out = torch.empty(tensor.shape, dtype=reader.specs[parts[0].other].dtype)
    _assemble(out, parts, reader)
    return out


def check_fit(tensors: Mapping[str, torch.Tensor], links: list[Link], reader: SafetensorsReader, strict: bool = True) -> LoadReport:
    """Whether a checkpoint holds the tensors of a model, in their shapes.

    Raises:
        CheckpointError: one error that names every mis-shaped and, if `strict`, missing and unexpected tensor.
    """
    specs, targets, known = reader.specs, by_native(links), {link.other for link in links}
    missing, misfits = [], []
    for name, tensor in tensors.items():
        parts = targets.get(name)
        if parts is None or any(link.other not in specs for link in parts):
            absent = [link.other for link in parts or [] if link.other not in specs and link.other != name]
            missing.append(f"{name} (stored as {', '.join(absent)})" if absent else name)
            continue
        problem = _misfit(tensor, parts, specs)
        if problem:
            misfits.append(f"{name}: {problem}")
    unexpected = sorted(set(specs) - known) + sorted({n for n in targets if n not in tensors and all(p.other in specs for p in targets[n])})
    lines = [f"mis-shaped: {line}" for line in misfits]
    if strict:
        lines = [f"missing: {name}" for name in missing] + [f"unexpected: {name}" for name in unexpected] + lines
    if lines:
        raise CheckpointError(f"{reader.path}: {len(lines)} tensor(s) do not fit the model\n  " + "\n  ".join(lines))
    return LoadReport([name.split(" ")[0] for name in missing], unexpected)


def _misfit(tensor: torch.Tensor, parts: list[Link], specs: Mapping[str, TensorSpec]) -> str | None:
    """Why the parts do not make up this tensor (None: they do)."""
    for link in parts:
        if (specs[link.other].dtype in MODEL_DTYPES) != tensor.is_floating_point():
            return f"the model has {tensor.dtype}, the checkpoint {specs[link.other].dtype} ({link.other}; quantised weights are not read)"
    shape = tuple(tensor.shape)
    if parts[0].convert is not None:
        return None  # the conversion checks itself
    covered = 0
    for link in parts:
        stored = specs[link.other].shape
        have = _part_shape(stored, link.other_rows, link.transposed)
        want = _part_shape(shape, link.native_rows, False)
        if have != want or (link.other_rows and link.other_rows[1] > stored[0]):
            return f"the model has {list(want)}, the checkpoint {list(have)} ({link.other} {list(stored)})"
        covered += want[0] if want else 1
    expected = shape[0] if shape else 1
    return None if covered == expected else f"the model has {expected} rows, the checkpoint gives {covered}"


def _part_shape(shape: tuple[int, ...], rows: Rows | None, transposed: bool) -> tuple[int, ...]:
    part = shape if rows is None else (rows[1] - rows[0], *shape[1:])
    return part[::-1] if transposed else part


def _assemble(out: torch.Tensor, parts: list[Link], reader: SafetensorsReader) -> None:
    for link in parts:
        target = out if link.native_rows is None else out[slice(*link.native_rows)]
        if link.convert is not None:
            made = link.convert(reader.read(link.other))
            if made.shape != target.shape:
                raise CheckpointError(f"{reader.path}: {link.other} gives shape {list(made.shape)} for {link.native} {list(target.shape)}")
            target.copy_(made)
        else:
            reader.read_into(link.other, target.t() if link.transposed else target, link.other_rows)


def _by_other(links: list[Link]) -> dict[str, list[Link]]:
    by_other: dict[str, list[Link]] = {}
    for link in links:
        by_other.setdefault(link.other, []).append(link)
    return {other: sorted(parts, key=lambda link: link.other_rows or (0, 0)) for other, parts in by_other.items()}


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _owners(model: Model) -> dict[str, tuple[nn.Module, str]]:
    """The module and attribute behind every native name."""
    owners = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf in (*module._parameters, *module._buffers):
            owners[clean_name(f"{prefix}.{leaf}" if prefix else leaf)] = (module, leaf)
    return owners


def clean_name(name: str) -> str:
    """A parameter's own name, without what wrappers add."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
