"""A small byte-level BPE tokenizer trained on the records, for models that start from nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

EOS = "<|endoftext|>"


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
