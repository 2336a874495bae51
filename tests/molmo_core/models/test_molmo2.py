"""Molmo2 against transformers' own implementation (random tiny models of every variant), and its batches, packs and masks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.molmo2_parity import native_inputs, native_twin
from molmo_core.models.molmo2 import Molmo2, Molmo2Config
from molmo_core.preprocessing.packing import pack

VIDEO = Path(__file__).parents[2] / "golden" / "video-olmo" / "video.mp4"
RNG = np.random.RandomState(0)
IMAGES = [RNG.randint(0, 256, size, np.uint8) for size in ((70, 130, 3), (56, 40, 3), (160, 60, 3))]
EXAMPLES: dict[str, dict[str, Any]] = {
    "text": {"messages": ["What is the capital of France?", "Paris."]},
    "image": {"image": IMAGES[0], "messages": ["How many dogs are there?", "Two."]},
    "images": {"images": IMAGES, "messages": ["Which one shows a cat?", "The second."]},
    "video": {"video": VIDEO, "messages": ["What happens?", "A ball rolls."]},
}


def config_of(golden: Path, qk_norm: str = "qwen3", norm_after: bool = False, **changes: Any) -> Molmo2Config:
    """3 blocks of width 64 on crops of 4 x 4 patches."""
    llm = {
        "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "n_layers": 3, "mlp_hidden_size": 192, "vocab_size": 406,
        "embedding_size": 448, "rope_theta": 10_000.0, "attention_layer_norm": True, "attention_layer_norm_type": qk_norm,
        "norm_after": norm_after, "max_sequence_length": 1024, "tokenizer": {"identifier": str(golden / "tokenizer")},
    } | changes  # fmt: skip
    vit = {
        "image_model_type": "siglip", "image_default_input_size": [56, 56], "image_emb_dim": 48, "image_num_heads": 3,
        "image_num_key_value_heads": 3, "image_head_dim": 16, "image_num_layers": 3, "image_mlp_dim": 96,
        "image_mlp_activations": "gelu_pytorch_tanh", "image_num_pos": 16, "image_norm_eps": 1e-6,
    }  # fmt: skip
    return Molmo2Config.new(
        llm=llm,
        vision_backbone={"vit": vit, "vit_layers": [-1, -3], "pooling_attention_mask": True},
        mm_preprocessor={"max_crops": 4, "overlap_margins": [1, 1], "max_frames": 4},
    )


def random_model(config: Molmo2Config) -> Molmo2:
    """Weights wide enough that every part shows in the logits."""
    torch.manual_seed(0)
    model = Molmo2(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if ("norm" in name or "ln_f" in name) and "weight" in name else 0.08 * noise)
    return model


def batch_of(config: Molmo2Config, *names: str, for_inference: bool = False) -> dict[str, torch.Tensor]:
    preprocessor = config.build_preprocessor(for_inference=for_inference, is_training=False)
    records = [dict(EXAMPLES[name]) for name in names]
    for record in records:
        record["messages"] = record["messages"][: 1 if for_inference else 2]
    return config.build_collator(None, None, include_metadata=False)([preprocessor(r) for r in records])


YARN = {
    "rope_type": "yarn", "rope_factor": 8.0, "rope_attention_factor": 1.2, "rope_beta_fast": 32.0, "rope_beta_slow": 1.0,
    "rope_original_max_position_embeddings": 64,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3, norm after": {"norm_after": True},
    "olmo": {"qk_norm": "olmo"},
    "olmo, norm after": {"qk_norm": "olmo", "norm_after": True},
    "olmo 3: YaRN on some layers": {"qk_norm": "olmo", "norm_after": True, "rope_scaling_layers": [1], **YARN},
    "YaRN on all layers": YARN,
    "tied, as the 4B": {"weight_tying": True},
}


@pytest.mark.parametrize("name", ["image", "video"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_logits_are_those_of_transformers(golden: Path, variant: str, name: str) -> None:
    compare_logits(random_model(config_of(golden, **VARIANTS[variant])), name)


@pytest.mark.parametrize("name", ["text", "images"])
def test_logits_of_text_and_of_several_images(golden: Path, name: str) -> None:
    compare_logits(random_model(config_of(golden)), name)


def compare_logits(model: Molmo2, name: str) -> None:
    batch = batch_of(model.config, name)
    with torch.no_grad():
        ours = model(**batch).logits
        theirs = native_twin(model)(**native_inputs(batch, model.config.image_tokens.all)).logits
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", list(EXAMPLES))
@pytest.mark.parametrize("variant", ["qwen3", "olmo 3: YaRN on some layers"])
def test_greedy_tokens_are_those_of_transformers(golden: Path, variant: str, name: str) -> None:
    model = random_model(config_of(golden, **VARIANTS[variant]))
    batch = batch_of(model.config, name, for_inference=True)
    ours = model.generate(**batch, max_new_tokens=10, min_new_tokens=10).token_ids
    inputs = native_inputs(batch, model.config.image_tokens.all)
    theirs = native_twin(model).generate(**inputs, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert ours.tolist() == theirs[:, batch["input_ids"].shape[1] :].tolist()


def test_text_and_image_rows_of_a_batch_are_those_alone(golden: Path) -> None:
    model = random_model(config_of(golden))
    names = list(EXAMPLES)
    batch = batch_of(model.config, *names)
    with torch.no_grad():
        together = model(**batch).logits
        for row, name in zip(together, names):
            alone = model(**batch_of(model.config, name)).logits[0]
            torch.testing.assert_close(row[: len(alone)], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("names", [("image", "text", "video"), ("text", "images"), ("video", "video", "image")])
def test_packed_equals_separate(golden: Path, names: tuple[str, ...]) -> None:
    """Image tokens of different examples do not see each other, nor does their text."""
    model = random_model(config_of(golden))
    preprocessor = model.config.build_preprocessor(for_inference=False, is_training=False)
    examples = [preprocessor(EXAMPLES[name]) for name in names]
    collate = model.config.build_collator(None, None, include_metadata=False)
    with torch.no_grad():
        packed = model(**collate([pack(examples)])).logits[0]
        separate = torch.cat([model(**collate([e])).logits[0] for e in examples])
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=0)


def test_all_image_tokens_of_a_row_see_each_other_in_both_directions(golden: Path) -> None:
    """The types of the published processor: patch, col, both starts, end; in several images, across images, but no text."""
    model = random_model(config_of(golden))
    batch = batch_of(model.config, "images")
    ids = batch["input_ids"][0]
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions[0][0]
    image = torch.isin(ids, torch.tensor(model.config.image_tokens.all))
    assert {model.config.image_tokens.low_res_start, model.config.image_tokens.col} <= set(ids.tolist())
    seen = (weights > 0).all(0)
    causal = torch.ones_like(seen).tril()
    assert torch.equal(seen, causal | (image[:, None] & image[None, :]))


def test_defaults_are_the_published_ones() -> None:
    config = Molmo2Config()
    assert config.bi_directional_attn == "image_tokens"
    assert (config.data_formatter.message_format, config.data_formatter.pointing_format) == ("qwen3", "html-v2")
    assert (config.mm_preprocessor.use_single_crop_col_tokens, config.mm_preprocessor.use_single_crop_start_token) == (False, True)
    assert config.image_tokens.frame_end == config.llm.embedding_rows + 8
