"""Writing a model for other tools, and checking what was written by reading it back."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
import torch

from molmo_core.checkpoint.folder import CheckpointError, Published
from molmo_core.checkpoint.layouts import Layout, published_links
from molmo_core.checkpoint.links import export_specs, exporter, model_tensors
from molmo_core.checkpoint.loading import load_model
from molmo_core.checkpoint.native import SHARD_BYTES, atomic_folder, save_checkpoint
from molmo_core.checkpoint.published_config import read_published_config
from molmo_core.checkpoint.published_export import published_layout_of, write_published_files
from molmo_core.checkpoint.safetensors_stream import write_safetensors
from molmo_core.checkpoint.tensor_comparison import compare_tensors
from molmo_core.config import flatten

ExportFormat = Literal["huggingface", "native"]
PROMPT = "Point to the dogs and count them."


@dataclasses.dataclass(frozen=True)
class Verification:
    """How the logits of a reloaded export compare with the model's, on an image and a question."""

    reader: str
    """Who read the export: `molmo_core` or `transformers`."""
    positions: int
    max_difference: float
    """Largest absolute difference of a logit."""
    scale: float
    """Largest absolute logit of the model."""
    top1_agreement: float
    """Share of positions with the same most probable token."""
    tolerance: float
    """Allowed difference, relative to the largest logit."""

    @property
    def passed(self) -> bool:
        return self.max_difference <= self.tolerance * self.scale

    def __str__(self) -> str:
        return (
            f"{'verified' if self.passed else 'FAILED'}: read back by {self.reader}, "
            f"{self.positions} positions of a question with a picture or clip, "
            f"logits differ by at most {self.max_difference:.2g} (largest logit {self.scale:.3g}), "
            f"same best token at {self.top1_agreement:.1%}"
        )


def export_checkpoint(model: Any, out: str | Path, format: ExportFormat = "huggingface", dtype: torch.dtype | None = None) -> Path:
    """Writes a model to a folder in a layout that others read.

    Args:
        model: any of the models; `huggingface` covers Molmo, MolmoE, Molmo2 and MolmoPoint.
        out: a folder that does not exist yet.
        format: `huggingface`: the published layout with config, tokenizer, chat template, generation and processor settings (Molmo2:
            what transformers' native class and vLLM read); `native`: our own.
        dtype: floating-point type to store (None: the model's).

    Raises:
        CheckpointError: `out` exists, or the published layout cannot express the model.
        ValueError: no such format, or no floating-point type.
    """
    if format not in get_args(ExportFormat):
        raise ValueError(f"format={format!r}: one of {', '.join(get_args(ExportFormat))}")
    out = Path(out)
    _check_new(out)
    if format == "native":
        save_checkpoint(model, out, sharded=True, dtype=dtype)
        return out
    layout = published_layout_of(model.config)
    tensors = _stored_tensors(model, layout)
    links = published_links(layout, tensors, model.config.llm)
    specs = export_specs(tensors, links, dtype)
    stored = str(next(iter(specs.values())).dtype).removeprefix("torch.")
    with atomic_folder(out) as folder:
        write_published_files(folder, model.config, layout, model.tokenizer, stored)
        write_safetensors(folder, specs, exporter(tensors, links), SHARD_BYTES)
        lost = _lost_settings(model.config, folder)
    if lost:
        listed = "\n  ".join(lost)
        warnings.warn(f"{out}: the published layout has no place for some settings, readers use their own\n  {listed}", stacklevel=2)
    return out


def _lost_settings(config: Any, folder: Path) -> list[str]:
    """Settings of texts, images and dropout that come back otherwise (weights and structure are compared by the logits)."""
    ours, theirs = flatten(config.as_dict()), flatten(type(config).from_dict(read_published_config(Published.read(folder))).as_dict())
    kept = [key for key in ours if key.startswith(("data_formatter.", "mm_preprocessor.")) or key.endswith(("dropout", "dropout_rate"))]
    return [f"{key}: {ours[key]!r} here, {theirs[key]!r} there" for key in kept if ours[key] != theirs[key]]


def _check_new(out: Path) -> None:
    if out.exists():
        raise CheckpointError(f"{out} exists; an export goes to a new folder")


def _stored_tensors(model: Any, layout: Layout | None) -> dict[str, torch.Tensor]:
    """The model's tensors; of Molmo2 without encoder blocks above the last one used, which its releases lack and no reader builds."""
    tensors = model_tensors(model)
    if layout not in ("molmo2", "molmo_point"):
        return tensors
    vision = model.config.vision_backbone
    top = max(layer % vision.vit.image_num_layers for layer in vision.vit_layers)
    unused = tuple(f"vision_backbone.image_vit.transformer.resblocks.{i}." for i in range(top + 1, vision.vit.image_num_layers))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}


def reference_logits(model: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A question about a picture (VideoOlmo: a clip) as this model's inputs, and its logits [1, S, E] float32 on the CPU."""
    preprocessor = model.config.build_preprocessor(for_inference=True)
    picture = np.linspace(0, 255, 300 * 400 * 3).astype(np.uint8).reshape(300, 400, 3)
    with tempfile.TemporaryDirectory() as folder:
        media = {"video": _clip(picture, Path(folder) / "clip.mp4")} if model.config.model_name == "video_olmo" else {"image": picture}
        example = preprocessor({**media, "messages": [PROMPT]})
    batch = model.config.build_collator(model.config.llm.max_sequence_length, None, include_metadata=False)([example])
    with torch.no_grad():
        return batch, model(**batch).logits.float().cpu()


def _clip(picture: np.ndarray, path: Path) -> str:
    """Two seconds of a picture that moves sideways."""
    height, width = picture.shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 8, (width, height))
    for frame in range(16):
        writer.write(np.roll(picture, 8 * frame, axis=1))
    writer.release()
    return str(path)


def verify_export(
    out: Path, batch: dict[str, torch.Tensor], expected: torch.Tensor, dtype: torch.dtype | None = None
) -> list[Verification]:
    """Reads an export back and compares logits: with this project's loader, and for Molmo2 with transformers' own class, too.

    Args:
        out: the exported folder.
        batch, expected: from `reference_logits` of the model that was exported (in the dtype that was stored).
        dtype: precision to compare in (None: as stored).
    """
    model = load_model(out, dtype)
    with torch.no_grad():
        results = [_compare("molmo_core", model(**batch).logits, expected, 1e-4)]
    if model.config.model_name == "molmo2" and (out / "config.json").is_file():
        token_ids = sorted(model.tokenizer.image_token_ids)
        del model
        logits = _transformers_molmo2(out, batch, token_ids, dtype)
        if logits is not None:
            # Another implementation: sums in another order, rounded in the precision of the weights.
            results.append(_compare("transformers", logits, expected, 1e-3 if logits.dtype == torch.float32 else 5e-2))
    return results


def export_and_verify(
    checkpoint: str | Path, out: str | Path, format: ExportFormat, dtype: torch.dtype | None = None, log: Callable[[str], Any] = print
) -> list[Verification]:
    """Loads a checkpoint, exports it, reads it back: every tensor, and the logits of a question.

    Only one copy of the model is in memory at a time. The export takes its name when it is verified; otherwise nothing is left.

    Raises:
        CheckpointError: `out` exists; the layout cannot express the model; or what was written is not what the checkpoint holds or
            computes: the tensors by name, and what to do.
        ValueError: `dtype` is not a type that a model computes in.
    """
    out = Path(out)
    _check_new(out)  # before a large checkpoint is read
    model = load_model(checkpoint, dtype)
    batch, expected = reference_logits(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        written = export_checkpoint(model, Path(folder) / out.name, format)
        left_out = frozenset(model_tensors(model)) - frozenset(_stored_tensors(model, _layout(model, format)))
        del model
        try:
            comparison = compare_tensors(checkpoint, written, left_out)
            results = verify_export(written, batch, expected, dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{out}: not written, {str(error).replace(str(written), str(out))}") from error
        failed = [str(result) for result in results if not result.passed]
        if failed:
            lines = "\n  ".join(failed)
            raise CheckpointError(f"{out}: not written, the export does not compute what the checkpoint computes\n  {lines}")
        os.replace(written, out)
    log(f"wrote {out} ({sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:,.1f} MB, {format} layout)")
    for line in (comparison, *results):
        log(str(line))
    return results


def _layout(model: Any, format: ExportFormat) -> Layout | None:
    return published_layout_of(model.config) if format == "huggingface" else None


def _compare(reader: str, logits: torch.Tensor, expected: torch.Tensor, tolerance: float) -> Verification:
    logits = logits.float().cpu()
    same = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
    difference, scale = (logits - expected).abs().max(), expected.abs().max()
    return Verification(reader, expected.shape[1], float(difference), float(scale), float(same), tolerance)


def _transformers_molmo2(
    folder: Path, batch: dict[str, torch.Tensor], image_token_ids: list[int], dtype: torch.dtype | None
) -> torch.Tensor | None:
    """Logits of transformers' Molmo2 (None where the installed version has none)."""
    try:
        from transformers import Molmo2ForConditionalGeneration
    except ImportError:
        return None
    model = Molmo2ForConditionalGeneration.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True).eval()
    ids, images, pooling = batch["input_ids"], batch["images"][0], batch["pooled_patches_idx"][0]
    pixels = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
    with torch.no_grad():
        return model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=torch.isin(ids, torch.tensor(image_token_ids)).long(),
            pixel_values=pixels.to(model.dtype),
            image_token_pooling=pooling,
            image_grids=torch.tensor([[len(pooling), 1, 0, 0]]),
            image_num_crops=torch.tensor([len(images)]),
        ).logits
