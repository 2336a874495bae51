"""What a page of examples shows of a preparation: prepared rows if there are, else rows made from its records; and the model's mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from molmo_core.config import ConfigError
from molmo_core.nn.sequence_layout import sequence_layout
from molmo_core.registry import BaseModelConfig
from pipelines.data.batches.prepared import PreparedDataset, is_prepared
from pipelines.data.builder import ExampleBuilder, example_rng
from pipelines.data.config import PrepareConfig
from pipelines.data.preparation.claim import STATE
from pipelines.data.rejects import Rejected
from pipelines.data.sources import open_records
from pipelines.model_folder import model_folder


def preparation_rows(config: PrepareConfig, count: int) -> tuple[Any, list[dict[str, Any]], list[str]]:
    """The model, the first examples of a preparation, and of each record that was left out where it is and why.

    Raises:
        ConfigError: neither records nor a prepared folder are given.
    """
    prepared = bool(config.output) and is_prepared(config.output)
    source = json.loads(Path(config.output, STATE).read_text())["settings"]["model"] if prepared else config.model
    tokenizer = Path(config.output, "tokenizer")
    trained = [f"llm.tokenizer.identifier={tokenizer.resolve()}"] if (prepared or config.tokenizer) and tokenizer.is_dir() else []
    model: Any = BaseModelConfig.load(model_folder(source), trained)
    if prepared:
        dataset = PreparedDataset(config.output)
        return model, [dataset[i] for i in range(min(count, len(dataset)))], []
    if not config.records:
        raise ConfigError("nothing to inspect: give records=PATH, or output=DIR of a finished preparation")
    return model, *_built(config, model, count)


def _built(config: PrepareConfig, model: Any, count: int) -> tuple[list[dict[str, Any]], list[str]]:
    records = open_records(config.records, config.format)
    length = config.sequence_length or model.llm.max_sequence_length
    builder = ExampleBuilder(model.build_preprocessor(for_inference=False, max_seq_len=length), config.max_image_pixels)
    rows: list[dict[str, Any]] = []
    left_out = []
    for i in range(len(records)):
        source, row = records.where(i)
        try:
            rows.append(builder(records[i], example_rng(config.seed, 0, 0, i)))
            rows[-1]["metadata"] |= {"source": source, "row": row}
        except Rejected as reason:
            left_out.append(f"{source}, row {row}: {reason}")
        if len(rows) == count:
            break
    return rows, left_out


def attention_mask(model: Any, ids: np.ndarray, segments: np.ndarray | None, weights: np.ndarray | None) -> np.ndarray:
    """bool [S, S]: which token (row) may attend to which (column), by the model's own rule."""
    tokens = torch.as_tensor(np.array(ids))[None]
    segment = None if segments is None else torch.as_tensor(np.array(segments))[None]
    response = None if weights is None else torch.as_tensor(np.array(weights))[None] > 0
    layout = sequence_layout(tokens, model.image_tokens, model.bi_directional_attn, None, segment, response)
    return layout.dense_mask(1, len(ids))[0, 0].numpy()
