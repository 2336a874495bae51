"""The real Qwen2 / Qwen3 tokenizer, built from the vocabulary file inside the PyPI package dashscope."""

import base64
import functools
import importlib.metadata
import itertools
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN3_SPECIALS = (
    *QWEN2_SPECIALS, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>",
    "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>",
    "</tool_response>", "<think>", "</think>",
)  # fmt: skip


def write_qwen_tokenizer(folder: Path, specials: tuple[str, ...], eos: str) -> Path:
    """Writes tokenizer.json and tokenizer_config.json of Qwen2 or Qwen3 (they differ in special tokens only)."""
    vocabulary, merges = _vocabulary()
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": eos, "bos_token": None, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    ranks = _ranks()
    return {_text(token): rank for token, rank in ranks.items()}, _merges(ranks)


def _ranks() -> dict[bytes, int]:
    files = importlib.metadata.files("dashscope") or []
    path = Path(str(next(f for f in files if f.name == "qwen.tiktoken").locate()))
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in path.read_bytes().splitlines() if line)}


def _merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """The merge that makes each token: its two halves are what byte-pair encoding with the lower ranks leaves of it."""
    merges = []
    for token, rank in ranks.items():
        splits = [i for i in range(1, len(token)) if ranks.get(token[:i], rank) < rank and ranks.get(token[i:], rank) < rank]
        if splits:
            at = splits[0] if len(splits) == 1 else _last_split(token, rank, ranks)
            merges.append((_text(token[:at]), _text(token[at:])))
    return merges


def _last_split(token: bytes, rank: int, ranks: dict[bytes, int]) -> int:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return len(parts[0])


def _byte_characters() -> dict[int, str]:
    """How byte-level BPE writes each byte as a printable character (the GPT-2 convention)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


_CHARACTERS = _byte_characters()


def _text(token: bytes) -> str:
    return "".join(_CHARACTERS[b] for b in token)
