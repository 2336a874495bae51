"""A small byte-level BPE tokenizer trained on the records, for models that start from nothing; and the model with it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from molmo_core.preprocessing.data_formatter import Formatter
from molmo_core.registry import BaseModelConfig
from pipelines.data.config import PrepareConfig
from pipelines.data.preparation.text_model import text_model
from pipelines.data.records.reading import read_record
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Records
from pipelines.model_folder import model_folder

EOS = "<|endoftext|>"
_RECORDS = 100_000


def model_for(folder: Path, config: PrepareConfig, records: Records, total: int) -> Any:
    """The configuration of the model for which `total` records are prepared in a folder, with the tokenizer that was asked for: its own,
    that of a text model in `folder/text_model`, or one in `folder/tokenizer`, trained on the records unless it is there."""
    if config.text_model is not None:
        target = text_model(folder, config.text_model)
        return BaseModelConfig.load(model_folder(config.model), overrides=[f"llm.tokenizer.identifier={target}"])
    if config.tokenizer is None:
        return BaseModelConfig.load(model_folder(config.model))
    target = folder / "tokenizer"
    if not target.is_dir():
        model: Any = BaseModelConfig.load(model_folder(config.model))
        formatter = model.data_formatter
        if formatter.pointing_format == "tokens":  # what is between the tokens of points is like the text of the other form
            formatter = dataclasses.replace(formatter, pointing_format="html-v2")
        texts = _texts(records, min(total, _RECORDS), Formatter(formatter), np.random.RandomState(config.seed))
        temporary = folder / ".tokenizer.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        train_tokenizer(texts, config.tokenizer.vocab_size, temporary)
        temporary.replace(target)
    return BaseModelConfig.load(model_folder(config.model), overrides=[f"llm.tokenizer.identifier={target}"])


def _texts(records: Records, total: int, formatter: Formatter, rng: np.random.RandomState) -> Iterator[str]:
    """The texts of the records as the model will read and write them, roles included."""
    for i in range(total):
        try:
            for annotation in formatter(read_record(records[i]), rng, image_sizes=[(1000, 1000)]):
                yield from annotation.messages
        except (Rejected, ValueError):
            continue  # reported when its shard is made


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains on `texts` and writes tokenizer.json and tokenizer_config.json; every byte and the end token are in the vocabulary.

    Args:
        texts: what the model will read and write.
        vocab_size: largest number of ids (at least 257).
        folder: is created.
    """
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one, so that coordinates and counts share their parts. Words keep their punctuation: a task's fixed phrases, the
    # markup of a point among them, become few tokens (half as many as with GPT-2's pattern on the demo's pointing answers).
    words = pre_tokenizers.Split(Regex(r"\d|\s?[^\s\d]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
