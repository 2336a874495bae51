"""Whether every tensor of a written checkpoint is the source's: nothing missing, no bit changed, no value lost to a narrower type."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from molmo_core.checkpoint.adapters import Adapters
from molmo_core.checkpoint.folder import CheckpointError, Published, adapted_base, locate
from molmo_core.checkpoint.links import by_native, check_fit, model_tensors, read_native
from molmo_core.checkpoint.loading import checkpoint_links
from molmo_core.checkpoint.safetensors_stream import SafetensorsReader
from molmo_core.registry import BaseModelConfig

_CHUNK = 2**22
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SHOWN = 20
_WIDER = "export with bfloat16, which has the range of float32, or float32"


class Comparison(NamedTuple):
    """How the tensors of a written checkpoint compare with the source's."""

    tensors: int
    worst: str
    """Name of the tensor with the largest error."""
    error: float
    """Its error: norm of the difference over the norm of the source."""

    def __str__(self) -> str:
        if not self.error:
            return f"verified: all {self.tensors:,} tensors are the source's, bit for bit"
        return f"verified: all {self.tensors:,} tensors, rounded as they have to be (largest relative error {self.error:.2g}, {self.worst})"


def compare_tensors(source: str | Path, written: str | Path, left_out: frozenset[str] = frozenset()) -> Comparison:
    """Compares every tensor of a checkpoint with that of the one it was made from, two tensors in memory at a time.

    What is stored has to be the source's values, rounded to the stored type. A tensor of a narrower type may not hold infinities that were
    finite numbers, nor lose more than the rounding of that type (numbers below its range).

    Args:
        source: the checkpoint that was exported, of any layout; adapters count with their base.
        written: the export.
        left_out: tensors of the source that the export does not have.

    Raises:
        CheckpointError: it names every tensor that is damaged or missing, and says what to do.
    """
    ours, theirs = locate(source), locate(written)
    with torch.device("meta"):
        model = BaseModelConfig.load(ours).build_model()
    original, stored = _reader(ours), _reader(theirs)
    tensors = model_tensors(model)
    source_parts = by_native(checkpoint_links(model, original, ours))
    links = [link for link in checkpoint_links(model, stored, theirs) if link.native not in left_out]
    check_fit({name: tensor for name, tensor in tensors.items() if name not in left_out}, links, stored)
    compared, wrong, worst, error = list(by_native(links).items()), [], "", 0.0
    for link in (link._replace(export_only=False) for link in links if link.export_only):
        name = f"{link.native} (stored a second time as {link.other})"
        if check_fit({link.native: tensors[link.native]}, [link], stored, strict=False).missing:
            wrong.append(f"{name}: missing")
        else:
            compared.append((name, [link]))
    changes = _changes(Path(source))
    for name, parts in compared:
        native = parts[0].native
        tensor = read_native(tensors[native], source_parts[native], original)
        for adapters in changes.get(native, ()):
            tensor += adapters.change(native.removesuffix(".weight")).to(tensor.dtype)
        problem, lost = _damage(tensor, read_native(tensors[native], parts, stored))
        if problem:
            wrong.append(f"{name}: {problem}")
        if lost > error:
            worst, error = name, lost
    if wrong:
        shown = wrong if len(wrong) <= _SHOWN else [*wrong[:_SHOWN], f"... and {len(wrong) - _SHOWN:,} more"]
        raise CheckpointError(f"{len(wrong)} tensor(s) are not what {source} holds\n  " + "\n  ".join(shown))
    return Comparison(len(compared), worst, error)


def _changes(source: Path) -> dict[str, list[Adapters]]:
    """Adapters by the name of the tensor that they change, in the order in which they are merged."""
    base = adapted_base(source)
    if base is None:
        return {}
    changes, adapters = _changes(base), Adapters(source)
    for layer in adapters.layers:
        changes.setdefault(f"{layer}.weight", []).append(adapters)
    return changes


def _reader(found: Path | Published) -> SafetensorsReader:
    return SafetensorsReader(found.folder if isinstance(found, Published) else found.parent)


def _damage(source: torch.Tensor, stored: torch.Tensor) -> tuple[str | None, float]:
    """What is wrong with a stored tensor (None: nothing), and its relative error."""
    kind = str(stored.dtype).removeprefix("torch.")
    overflowed = changed = strange = 0
    largest = difference = norm = 0.0
    for a, b in zip(source.reshape(-1).split(_CHUNK), stored.reshape(-1).split(_CHUNK)):
        finite, expected = a.isfinite(), a.to(b.dtype)
        lost = finite & ~b.isfinite()
        bits = _BITS[b.dtype.itemsize]
        same = (expected.view(bits) == b.view(bits)) | (expected.isnan() & b.isnan())
        strange += int((~finite).sum())
        overflowed += int((lost & same).sum())
        changed += int((~same).sum())
        if lost.any():
            largest = max(largest, float(a[lost].abs().max()))
            continue
        x = a.double().masked_fill(~finite, 0)
        difference += float((x - b.double().masked_fill(~finite, 0)).square().sum())
        norm += float(x.square().sum())
    error = (difference / norm) ** 0.5 if norm else 0.0
    count = f"{source.numel():,}"
    if changed:
        return f"{changed:,} of {count} values are not the source's: the file is damaged; export again", error
    if strange:
        return (
            f"{strange:,} of {count} values are not finite in the source itself; use an earlier checkpoint",
            error,
        )
    if overflowed:
        most = torch.finfo(stored.dtype).max
        return f"{overflowed:,} of {count} values are infinite in {kind} (up to {largest:.3g}; it ends at {most:.3g}); {_WIDER}", error
    if stored.dtype != source.dtype and error > torch.finfo(stored.dtype).eps:
        return f"{kind} cannot hold its small numbers (relative error {error:.2g}); {_WIDER}", error
    return None, error
