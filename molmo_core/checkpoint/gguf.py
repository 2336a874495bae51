"""Text models from GGUF files (llama.cpp's format): written as a folder of transformers, which then initialises a model.

Quantised weights become the float32 numbers that they stand for. llama.cpp rotates neighbouring pairs of a head's numbers, transformers
(and this project) its two halves: the rows of queries and keys are put back in that order.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from molmo_core.checkpoint.folder import CheckpointError
from molmo_core.checkpoint.safetensors_stream import TensorSpec, write_safetensors
from molmo_core.config import ConfigError

if TYPE_CHECKING:
    from gguf import GGUFReader

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_OF_BLOCKS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_CONTROL = 3
"""Kind of a token that is no text."""


def convert_gguf(path: str | Path, folder: str | Path) -> None:
    """Writes a GGUF file's model as config.json, model.safetensors (float32) and tokenizer.json with its configuration.

    Args:
        path: a Llama with a byte-level BPE tokenizer cut as SmolLM's; other kinds are refused.
        folder: is created.

    Raises:
        ConfigError: the gguf package is not installed.
        CheckpointError: no GGUF file, or one of another kind.
    """
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise ConfigError("GGUF files are read by the package gguf: pip install gguf==0.19.0 (or the project's [scenes] extra)") from None
    path, folder = Path(path), Path(folder)
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a GGUF file, or damaged ({error})") from error
    kind = tuple(_value(reader, path, key) for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm"):
        raise CheckpointError(f"{path}: a model of kind {kind}; only ('llama', 'gpt2', 'smollm') is read from GGUF files")
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(reader, path)
    _write_weights(reader, path, folder, config)
    _write_tokenizer(reader, path, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _value(reader: GGUFReader, path: Path, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise CheckpointError(f"{path}: no {key} in this GGUF file")
    return field.contents()


def _config(reader: GGUFReader, path: Path) -> dict[str, Any]:
    """config.json, as LlamaConfig reads it."""

    def of(key: str) -> Any:
        return _value(reader, path, f"llama.{key}")

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": of("embedding_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "intermediate_size": of("feed_forward_length"),
        "vocab_size": len(_value(reader, path, "tokenizer.ggml.tokens")),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": float(f"{of('attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5, which the file has as a float32
        "rope_parameters": {"rope_type": "default", "rope_theta": of("rope.freq_base")},
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": _value(reader, path, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, path, "tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }


def _write_weights(reader: GGUFReader, path: Path, folder: Path, config: dict[str, Any]) -> None:
    from gguf import dequantize

    tensors = {_name(tensor.name, path): tensor for tensor in reader.tensors}
    specs = {name: TensorSpec(torch.float32, tuple(int(n) for n in reversed(tensor.shape))) for name, tensor in tensors.items()}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def numbers(name: str) -> torch.Tensor:
        weight = np.array(dequantize(tensors[name].data, tensors[name].tensor_type), np.float32).reshape(specs[name].shape)
        count = heads.get(name.split(".")[-2])
        if count is not None:  # [heads, pairs, 2, ...] → [heads, 2, pairs, ...]
            rows, columns = weight.shape
            weight = weight.reshape(count, rows // count // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        return torch.from_numpy(np.ascontiguousarray(weight))

    write_safetensors(folder, specs, numbers)


def _name(name: str, path: Path) -> str:
    """A tensor's name in transformers."""
    if name in _WHOLE:
        return _WHOLE[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in _OF_BLOCKS:
        raise CheckpointError(f"{path}: a tensor {name}, which a Llama does not have")
    return f"model.layers.{match[1]}.{_OF_BLOCKS[match[2]]}.weight"


def _write_tokenizer(reader: GGUFReader, path: Path, folder: Path) -> None:
    tokens, kinds, merges = (_value(reader, path, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, kind in zip(tokens, kinds) if kind == _CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = tokens[_value(reader, path, "tokenizer.ggml.eos_token_id")]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
