"""Loading checkpoints of any layout: own or published, from a folder or from the hub, without remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from molmo_core.checkpoint.adapters import Adapters
from molmo_core.checkpoint.folder import CheckpointError, Published, adapted_base, local_folder, locate
from molmo_core.checkpoint.layouts import detect_layout, published_links
from molmo_core.checkpoint.links import Link, LoadReport, Model, fill, load_tensors, model_tensors, same_names
from molmo_core.checkpoint.safetensors_stream import SafetensorsReader, model_dtype
from molmo_core.registry import BaseModelConfig


def load_model(path: str | Path, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None) -> Any:
    """The model that a path is, with its weights, in eval mode; tokenizer and preprocessing settings come with it (`model.config`).

    Reads own checkpoints and the published layouts of Molmo, MolmoE, MolmoPoint and Molmo2 (as released, and as transformers saves
    them), sharded or not, and adapters (`checkpoint.adapters`): their base, with them in its weights. The model is built without
    memory and filled tensor by tensor: the peak is the model and one buffer.

    Args:
        path: a folder, or a hub repository such as `allenai/Molmo-7B-D-0924` (its local cache is used when there).
        dtype: floating-point type, e.g. `torch.bfloat16` or `"bfloat16"` (None: as stored).
        device: where the model goes (None: CPU).

    Returns:
        A `molmo_core.models.base.ModelBase`.

    Raises:
        CheckpointError: no such checkpoint, an unknown layout, pickled weights, tensors that do not fit, or a file that is
            not as it was written (where the folder has checksums); adapters whose base is another model now.
        ValueError: `dtype` is not a floating-point type.
    """
    if (adapters := _adapters(path)) is not None:
        dtype = model_dtype(dtype)
        model = load_model(adapters.base, dtype if dtype and dtype.itemsize >= 4 else None, device)
        adapters.merge_into(model_tensors(model))
        return model.to(dtype)  # a narrower type is rounded to once, after the sum
    dtype, found = model_dtype(dtype), locate(path)
    config = BaseModelConfig.load(found)
    reader = SafetensorsReader(found.folder if isinstance(found, Published) else found.parent)
    with torch.device("meta"):
        model = config.build_model()
    load_tensors(model, reader, checkpoint_links(model, reader, found), strict=True, dtype=dtype, device=device)
    return model.eval()


def from_pretrained(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """`load_model` under the name and with the arguments that the published examples use.

    Args:
        path, dtype, device: see `load_model`.
        trust_remote_code: accepted because existing calls pass it; no code of a checkpoint is ever run.
    """
    return load_model(path, dtype, device)


def load_checkpoint(model: Model, path: str | Path, strict: bool = True) -> LoadReport:
    """Reads weights into an existing model, which may be sharded (FSDP2), keeping its dtype and device.

    Args:
        model: a model of the same configuration.
        path: an own checkpoint, a published one (config.json), adapters, a hub repository, or a bare safetensors file with own names.
        strict: every tensor must be there and be used; False reports what was not.

    Raises:
        CheckpointError: naming every missing, unexpected and mis-shaped tensor; or the file is a pickle, or not as it was written
            (where the folder has checksums).
    """
    if (adapters := _adapters(path)) is not None:
        report = load_checkpoint(model, adapters.base, strict)
        adapters.merge_into(model_tensors(model))
        return report
    path = local_folder(path)
    reader = SafetensorsReader(path)
    return load_tensors(model, reader, checkpoint_links(model, reader, locate(path) if path.is_dir() else path), strict)


class _Beginner(Model, Protocol):
    """What `begin_from` needs of a `molmo_core.models.base.ModelBase`."""

    EXTENDS: ClassVar[str]

    def own_parts(self) -> dict[str, torch.Tensor]: ...


def begin_from(model: _Beginner, path: str | Path) -> None:
    """The first weights of a model that is trained on: `load_checkpoint`, also from a model that this one extends (`EXTENDS`), whose
    checkpoint lacks this one's own parts; these are drawn (on every rank alike, if all have the same seed).

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    path = local_folder(path)
    own = {} if BaseModelConfig.load(path).model_name != model.EXTENDS else model.own_parts()
    report = load_checkpoint(model, path, strict=not own)
    if own:
        wrong = sorted(set(report.missing) - own.keys())
        if wrong or report.unexpected:
            lines = [f"missing: {name}" for name in wrong] + [f"has no place here: {name}" for name in report.unexpected]
            raise CheckpointError(f"{path}: its tensors do not fit the model's\n  " + "\n  ".join(lines))
        tensors = model_tensors(model)
        for name in report.missing:
            fill(tensors[name], own[name])


def _adapters(path: str | Path) -> Adapters | None:
    """The adapters that a path is; None if it is a model."""
    folder = Path(path)
    return None if adapted_base(folder) is None else Adapters(folder)


def checkpoint_links(model: Model, reader: SafetensorsReader, found: Path | Published) -> list[Link]:
    """How the tensors of a checkpoint correspond to the model's; `found` is what `locate` says of it."""
    names = model_tensors(model)
    if not isinstance(found, Published):
        return same_names(names)
    layout = detect_layout(found.model_type or "", reader.specs, found.folder)
    return published_links(layout, names, model.config.llm, reader.specs)
