"""Show examples as the model sees them, on one page: crops, pooled tokens, loss weights, points, mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from jobs.command import ConfigPath, Overrides, job
from molmo_core.config import ConfigError, read_yaml
from molmo_core.nn.sequence_layout import sequence_layout
from molmo_core.registry import BaseModelConfig
from pipelines.data.batches.loader import TrainLoader
from pipelines.data.batches.prepared import PreparedDataset, is_prepared
from pipelines.data.builder import ExampleBuilder, example_rng
from pipelines.data.config import PrepareConfig
from pipelines.data.inspection import Inspector
from pipelines.data.preparation.prepare import STATE
from pipelines.data.rejects import Rejected
from pipelines.data.sources import open_records
from pipelines.model_folder import model_folder
from pipelines.training.config import TrainConfig


def main(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("inspect.html"),
    count: Annotated[int, typer.Option(help="Rows to show.")] = 8,
) -> None:
    """Show examples as the model sees them, on one page. CONFIG is a training configuration (packs as they are trained on), or that of
    a preparation (its records, or what it prepared)."""
    content = read_yaml(config)
    model, rows = training_rows(config, overrides, count) if "data" in content else prepared_rows(config, overrides, count)
    if not rows:
        raise ConfigError(f"{config}: none of the first records is usable")
    settings = model.build_preprocessor(for_inference=False).settings if getattr(model, "vision_backbone", None) else None
    inspector = Inspector(model.build_tokenizer(), settings, lambda *arrays: attention_mask(model, *arrays))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(inspector.page(rows, f"{config}: {len(rows)} rows"), encoding="utf-8")
    print(f"{out}: {len(rows)} rows, {out.stat().st_size / 1e6:.1f} MB")


def training_rows(path: Path, overrides: list[str] | None, count: int) -> tuple[Any, list[dict[str, Any]]]:
    """The model and the first rows of a training run, made in this process."""
    config = TrainConfig.load(path, overrides)
    loader = TrainLoader(config.data, config.model, count, config.sequence_length, config.seed, 0, 1)
    return config.model, loader.examples()


def prepared_rows(path: Path, overrides: list[str] | None, count: int) -> tuple[Any, list[dict[str, Any]]]:
    """The model and the first examples of a preparation: prepared ones (and the model they are for) if there are, else made from the
    records."""
    config = PrepareConfig.load(path, overrides)
    prepared = bool(config.output) and is_prepared(config.output)
    source = json.loads(Path(config.output, STATE).read_text())["settings"]["model"] if prepared else config.model
    tokenizer = Path(config.output, "tokenizer")
    trained = [f"llm.tokenizer.identifier={tokenizer.resolve()}"] if (prepared or config.tokenizer) and tokenizer.is_dir() else []
    model: Any = BaseModelConfig.load(model_folder(source), trained)
    if prepared:
        dataset = PreparedDataset(config.output)
        return model, [dataset[i] for i in range(min(count, len(dataset)))]
    if not config.records:
        raise ConfigError(f"{path}: give records=PATH, or output=DIR of a finished preparation")
    records = open_records(config.records, config.format)
    length = config.sequence_length or model.llm.max_sequence_length
    builder = ExampleBuilder(model.build_preprocessor(for_inference=False, max_seq_len=length), config.max_image_pixels)
    rows: list[dict[str, Any]] = []
    for i in range(len(records)):
        try:
            rows.append(builder(records[i], example_rng(config.seed, 0, 0, i)))
            rows[-1]["metadata"] |= dict(zip(("source", "row"), records.where(i)))
        except Rejected as reason:
            print(f"left out {records.where(i)}: {reason}")
        if len(rows) == count:
            break
    return model, rows


def attention_mask(model: Any, ids: np.ndarray, segments: np.ndarray | None, weights: np.ndarray | None) -> np.ndarray:
    """bool [S, S]: which token (row) may attend to which (column), by the model's own rule."""
    tokens = torch.as_tensor(np.array(ids))[None]
    segment = None if segments is None else torch.as_tensor(np.array(segments))[None]
    response = None if weights is None else torch.as_tensor(np.array(weights))[None] > 0
    layout = sequence_layout(tokens, model.image_tokens, model.bi_directional_attn, None, segment, response)
    return layout.dense_mask(1, len(ids))[0, 0].numpy()


app = job(main)

if __name__ == "__main__":
    app()
