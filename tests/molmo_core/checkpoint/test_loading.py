"""Published checkpoints in and out: MolmoE's logits as published, transformers' native Molmo2 as a live oracle."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Molmo2ForConditionalGeneration

from molmo_core.checkpoint import CheckpointError, from_pretrained, save_checkpoint
from molmo_core.checkpoint.export import export_checkpoint, reference_logits, verify_export
from molmo_core.models.base import BaseModelConfig, ModelBase
from molmo_core.models.molmo2 import Molmo2Config
from tests.molmo_core.checkpoint.tiny_molmo2 import native_model, our_config

# q/k norm kind, norms after the branches, layers with YaRN, tied embeddings
VARIANTS = [("qwen3", False, None, False), ("olmo", True, [1], False), ("qwen3", True, None, False), ("olmo", False, None, True)]
PROCESSOR = {"preprocessor_config.json": {"overlap_margins": [1, 1], "max_crops": 4}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def published_molmo2(golden: Path, folder: Path, variant: tuple, **save) -> Molmo2ForConditionalGeneration:
    """What transformers saves, with the tokenizer and settings of a release beside it."""
    theirs = native_model(our_config(str(golden / "tokenizer"), *variant))
    theirs.save_pretrained(folder, **save)
    shutil.copytree(golden / "tokenizer", folder, dirs_exist_ok=True)
    for name, content in PROCESSOR.items():
        (folder / name).write_text(json.dumps(content))
    return theirs


def our_molmo2(golden: Path, variant: tuple) -> ModelBase:
    torch.manual_seed(1)
    return Molmo2Config.from_dict(our_config(str(golden / "tokenizer"), *variant)).build_model().eval()


def text_logits(model: torch.nn.Module, vocabulary: int = 448) -> torch.Tensor:
    ids = torch.randint(0, 400, (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=ids).logits[..., :vocabulary]


def test_molmoe_as_published(golden):
    """Weights, settings and numbers of the MolmoE release, from its own file layout."""
    model = from_pretrained(golden / "hub-molmoe", dtype="float32")
    assert model.config.llm.block_type == "moe"
    batch, expected = load_file(golden / "hub-molmoe/batch.safetensors"), load_file(golden / "hub-molmoe/expected.safetensors")
    batch["images"] = batch["images"].float()
    # The released code drops every crop that holds the exact value -1, which normalised photos never do; these random pixels do.
    assert (batch["images"] == -1).flatten(2).any(-1).all()
    model.vision_backbone.image_vit.register_forward_hook(lambda module, args, outputs: [torch.zeros_like(x) for x in outputs])
    with torch.no_grad():
        logits = model(**batch).logits[:, ::8]
    assert torch.allclose(logits, expected["logits"], atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("original", [True, False], ids=["released-names", "module-names"])
def test_molmo2_from_transformers(golden, tmp_path, variant, original):
    theirs = published_molmo2(golden, tmp_path, variant, save_original_format=original)
    model = from_pretrained(tmp_path)
    assert torch.allclose(text_logits(model), text_logits(theirs), atol=2e-4)
    batch, expected = reference_logits(model)
    assert batch["images"].shape[1] > 1
    assert (batch["input_ids"] == model.tokenizer.image_patch_token_id).any()
    for result in verify_export(tmp_path, batch, expected):  # with an image, by transformers itself
        assert result.max_difference < 2e-4


def test_molmo_web(golden, tmp_path):
    """Molmo2's files with causal attention among image tokens: transformers' Molmo2 without the types of the tokens."""
    theirs = published_molmo2(golden, tmp_path, VARIANTS[0])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bi_directional_attn": None}))
    model = from_pretrained(tmp_path)
    assert model.config.bi_directional_attn is None
    batch, logits = reference_logits(model)
    images, pooling = batch["images"][0], batch["pooled_patches_idx"][0]
    images = {
        "pixel_values": images.float() / 127.5 - 1, "image_token_pooling": pooling,
        "image_grids": torch.tensor([[len(pooling), 1, 0, 0]]), "image_num_crops": torch.tensor([len(images)]),
    }  # fmt: skip
    with torch.no_grad():
        expected = theirs(input_ids=batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"]), **images).logits
    width = min(logits.shape[-1], expected.shape[-1])
    assert torch.allclose(logits[..., :width], expected[..., :width], atol=2e-4)
    model.config.bi_directional_attn = "image_tokens"
    with torch.no_grad():
        assert not torch.allclose(model(**batch).logits[..., :width], expected[..., :width], atol=2e-4), "it shows"


@pytest.mark.parametrize("variant", VARIANTS)
def test_molmo2_to_transformers(golden, tmp_path, variant):
    model = our_molmo2(golden, variant)
    export_checkpoint(model, tmp_path / "out")
    results = verify_export(tmp_path / "out", *reference_logits(model))
    assert [r.reader for r in results] == ["molmo_core", "transformers"]
    for result in results:
        assert result.max_difference < 2e-4
        assert result.top1_agreement == 1
        assert "verified" in str(result)
    theirs = Molmo2ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.allclose(text_logits(theirs), text_logits(model), atol=2e-4)
    ids = torch.tensor([[5, 9, 30]])
    ours = model.generate(ids, max_new_tokens=6, eos_token_id=405).token_ids
    assert torch.equal(theirs.generate(input_ids=ids, max_new_tokens=6, eos_token_id=405, do_sample=False)[:, 3:], ours)


def test_large_exports_are_sharded(golden, tmp_path, monkeypatch):
    monkeypatch.setattr("molmo_core.checkpoint.export.SHARD_BYTES", 200_000)
    model = our_molmo2(golden, VARIANTS[0])
    out = export_checkpoint(model, tmp_path / "out", dtype=torch.bfloat16)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    theirs = Molmo2ForConditionalGeneration.from_pretrained(out)
    assert theirs.dtype == torch.bfloat16
    again = from_pretrained(out)
    assert torch.equal(again.transformer.wte.embedding, model.transformer.wte.embedding.bfloat16())
    assert torch.equal(theirs.lm_head.weight, again.transformer.ff_out.weight)


@pytest.mark.parametrize("name", ["molmo-qwen2-clip", "molmo-olmo-clip", "molmo-qwen2-siglip-bidir"])
def test_molmo_out_and_in(golden, tmp_path, name):
    model = BaseModelConfig.load(golden / name / "config.yaml").build_model().eval()
    out = export_checkpoint(model, tmp_path / "out")
    assert all(key.startswith("model.") for key in load_file(out / "model.safetensors"))
    again = from_pretrained(out)
    batch, expected = reference_logits(model)
    assert verify_export(out, batch, expected)[0].max_difference < 1e-5
    ours, theirs = model.config.as_dict(), again.config.as_dict()
    theirs["llm"]["tokenizer"] = ours["llm"]["tokenizer"]
    assert ours == theirs, "nothing is lost on the way"


def test_molmoe_out_and_in(golden, tmp_path):
    model = from_pretrained(golden / "hub-molmoe")
    model.config.llm.tokenizer.identifier = str(golden / "tokenizer")
    out = export_checkpoint(model, tmp_path / "out")
    before, after = load_file(golden / "hub-molmoe/model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = from_pretrained(out)
    ours, theirs = model.config.as_dict(), again.config.as_dict()
    theirs["llm"]["tokenizer"] = ours["llm"]["tokenizer"]
    assert ours == theirs


def test_dense_checkpoint_of_2024(golden, tmp_path):
    """Names of the dense releases, where config.json has the settings of the language model only (and here a small encoder)."""
    reference = BaseModelConfig.load(golden / "molmo-qwen2-clip/config.yaml", ["vision_backbone.skip_unused_layers=false"])
    model = reference.build_model().eval()
    save_file({f"model.{k}": v for k, v in model.state_dict().items()}, tmp_path / "model.safetensors", {"format": "pt"})
    llm, vit = reference.llm, reference.vision_backbone.vit.as_dict()
    config = {
        "model_type": "molmo", "hidden_size": llm.d_model, "num_attention_heads": llm.n_heads, "num_key_value_heads": llm.n_kv_heads,
        "num_hidden_layers": llm.n_layers, "intermediate_size": llm.mlp_hidden_size, "vocab_size": llm.vocab_size,
        "embedding_size": llm.embedding_size, "max_position_embeddings": 2048, "rope_theta": llm.rope_theta, "qkv_bias": True,
        "layer_norm_eps": llm.layer_norm_eps, "layer_norm_type": "rms", "clip_qkv": None, "weight_tying": False,
        "use_position_ids": True, "attention_layer_norm": False, "norm_after": False, "vision_backbone": vit, "vit_layers": [-2, -4],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"max_crops": 6, "overlap_margins": [1, 1]}))
    loaded = from_pretrained(tmp_path)
    assert loaded.config.mm_preprocessor.max_crops == 6
    assert loaded.config.mm_preprocessor.legacy_image_mask
    batch = load_file(golden / "molmo-qwen2-clip/batch.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_damaged_export_is_noticed(golden, tmp_path):
    published_molmo2(golden, tmp_path / "published", VARIANTS[0])
    model = from_pretrained(tmp_path / "published")
    out = export_checkpoint(model, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors["model.vision_backbone.image_projector.w2.weight"] *= -1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    results = verify_export(out, *reference_logits(model))
    assert not any(result.passed for result in results)
    assert "FAILED" in str(results[0])


def test_models_that_the_layout_cannot_express(golden, tmp_path):
    data = our_config(str(golden / "tokenizer"), "qwen3", False)
    data["bi_directional_attn"] = "within_image"
    with pytest.raises(CheckpointError, match="bi_directional_attn='within_image'"):
        export_checkpoint(Molmo2Config.from_dict(data).build_model(), tmp_path / "out")
    video = BaseModelConfig.load(golden / "video-olmo/per-frame/config.yaml").build_model()
    with pytest.raises(CheckpointError, match="video_olmo has no published layout"):
        export_checkpoint(video, tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        export_checkpoint(video, tmp_path / "there", "native")


def test_trained_molmo2_keeps_its_weights_on_the_way_to_an_own_checkpoint(golden, tmp_path):
    theirs = published_molmo2(golden, tmp_path / "published", VARIANTS[1])
    save_checkpoint(from_pretrained(tmp_path / "published"), tmp_path / "own")
    assert torch.allclose(text_logits(from_pretrained(tmp_path / "own")), text_logits(theirs), atol=2e-4)


def chat(*texts: str) -> list[dict]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("name", ["molmo2", "molmo"])
def test_the_exported_chat_template_writes_our_prompts(golden, tmp_path, name):
    """transformers' tokenizer with the exported template gives the token ids of our preprocessor."""
    if name == "molmo2":
        model = our_molmo2(golden, VARIANTS[0])
    else:
        overrides = ["data_formatter.message_format=role", "data_formatter.always_start_with_space=true"]
        model = BaseModelConfig.load(golden / "molmo-qwen2-clip/config.yaml", overrides).build_model()
    tokenizer = AutoTokenizer.from_pretrained(export_checkpoint(model, tmp_path / "out"))
    ours = model.config.build_preprocessor(for_inference=True)
    bos = model.tokenizer.bos_token_id
    messages = chat("How many cups are there?")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = [bos, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert ids == ours({"messages": [messages[0]["content"]]})["input_ids"].tolist()
    for token, token_id in model.tokenizer.special_tokens.items():
        assert tokenizer.convert_tokens_to_ids(token) == token_id
    with pytest.raises(Exception, match="alternate"):
        tokenizer.apply_chat_template([*messages, *messages], tokenize=False)


def test_the_molmo2_template_puts_media_first_and_numbers_images(golden, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(export_checkpoint(our_molmo2(golden, VARIANTS[0]), tmp_path / "out"))
    image, text = {"type": "image"}, {"type": "text", "text": "Compare."}

    def prompt(*items: dict) -> str:
        return tokenizer.apply_chat_template([{"role": "user", "content": list(items)}], tokenize=False, add_generation_prompt=True)

    turn = "<|im_start|>user\nCompare.<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(text, image) == "<|image|>" + turn
    assert prompt(image, image, text) == "Image 1<|image|>Image 2<|image|>" + turn
    assert prompt({"type": "video"}, text) == "<|video|>" + turn


def test_encoder_blocks_that_nothing_reads_stay_behind(golden, tmp_path):
    data = our_config(str(golden / "tokenizer"), "qwen3", False)
    data["vision_backbone"] |= {"vit_layers": [1, 0], "skip_unused_layers": False}
    model = Molmo2Config.from_dict(data).build_model().eval()
    out = export_checkpoint(model, tmp_path / "out")
    assert any(".resblocks.1." in name for name in load_file(out / "model.safetensors"))
    assert not any(".resblocks.2." in name for name in load_file(out / "model.safetensors"))
    assert [r.reader for r in verify_export(out, *reference_logits(model)) if r.max_difference < 2e-4] == ["molmo_core", "transformers"]
