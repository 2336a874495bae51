"""Against transformers' CLIP, SigLIP and DINOv2 with the same random weights."""

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from molmo_core.nn.configs import VitConfig
from molmo_core.nn.connector import patchify
from molmo_core.nn.vit import VisionTransformer

SIZES = {"image_size": 28, "patch_size": 7, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}


def config(kind: str, activation: str, eps: float, positions: int) -> VitConfig:
    return VitConfig.new(
        image_model_type=kind, image_default_input_size=(28, 28), image_patch_size=7, image_pos_patch_size=7, image_emb_dim=32,
        image_num_heads=2, image_num_key_value_heads=2, image_head_dim=16, image_num_layers=3, image_mlp_dim=64,
        image_mlp_activations=activation, image_num_pos=positions, image_norm_eps=eps,
    )  # fmt: skip


def copy(ours: VisionTransformer, theirs: torch.nn.Module, names: dict[str, str]) -> None:
    """Fills our model from theirs: names maps ours to theirs, `{i}` is the layer; linear layers take weight and bias."""
    source, state = theirs.state_dict(), {}
    for mine, other in names.items():
        for i in range(3) if "{i}" in mine else [0]:
            name, key = mine.format(i=i), other.format(i=i)
            for suffix in ("", ".weight", ".bias"):
                if key + suffix in source:
                    tensor = source[key + suffix]
                    if name == "patch_embedding" and suffix == ".weight":
                        tensor = tensor.permute(0, 2, 3, 1).flatten(1)
                    state[name + suffix] = tensor.squeeze()
    ours.load_state_dict(state, strict=True)


BLOCK = "transformer.resblocks.{i}."
CLIP = {
    "class_embedding": "embeddings.class_embedding", "positional_embedding": "embeddings.position_embedding.weight",
    "patch_embedding": "embeddings.patch_embedding", "pre_ln": "pre_layrnorm",
    **{BLOCK + f"attention.w{x}": "encoder.layers.{i}.self_attn." + y for x, y in zip("qkvo", ("q_proj", "k_proj", "v_proj", "out_proj"))},
    BLOCK + "feed_forward.w1": "encoder.layers.{i}.mlp.fc1", BLOCK + "feed_forward.w2": "encoder.layers.{i}.mlp.fc2",
    BLOCK + "attention_norm": "encoder.layers.{i}.layer_norm1", BLOCK + "ffn_norm": "encoder.layers.{i}.layer_norm2",
}  # fmt: skip
SIGLIP = {k: v for k, v in CLIP.items() if k not in ("class_embedding", "pre_ln")}
DINO = {
    "class_embedding": "embeddings.cls_token", "positional_embedding": "embeddings.position_embeddings",
    "patch_embedding": "embeddings.patch_embeddings.projection",
    **{BLOCK + f"attention.w{x}": f"encoder.layer.{{i}}.attention.{x}_proj" for x in "qkvo"},
    BLOCK + "feed_forward.w1": "encoder.layer.{i}.mlp.fc1", BLOCK + "feed_forward.w2": "encoder.layer.{i}.mlp.fc2",
    BLOCK + "attention_norm": "encoder.layer.{i}.norm1", BLOCK + "ffn_norm": "encoder.layer.{i}.norm2",
    BLOCK + "lambda1": "encoder.layer.{i}.layer_scale1.lambda1", BLOCK + "lambda2": "encoder.layer.{i}.layer_scale2.lambda1",
}  # fmt: skip


def oracle(kind: str) -> tuple[torch.nn.Module, VitConfig, dict[str, str]]:
    if kind == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=64, vision_use_head=False))
        return model, config("siglip", "gelu_pytorch_tanh", 1e-6, 16), SIGLIP
    if kind == "dino":
        return Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2)), config("dino", "gelu", 1e-6, 17), DINO
    return CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=64)), config("openai", "quick_gelu", 1e-5, 17), CLIP


@pytest.mark.parametrize("kind", ["openai", "siglip", "dino"])
def test_equals_transformers(kind):
    torch.manual_seed(0)
    theirs, ours_config, names = oracle(kind)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.eval()
    ours = VisionTransformer(ours_config).eval()
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in theirs.state_dict()) else ""
    copy(ours, theirs, {k: prefix + v for k, v in names.items()})
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states[1:]
        outputs = ours(patchify(pixels, 7))
    assert len(outputs) == 3
    for output, reference in zip(outputs, expected):
        torch.testing.assert_close(output, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["openai", "siglip"])
def test_other_grids_interpolate_the_positions(kind):
    _, ours_config, _ = oracle(kind)
    vit = VisionTransformer(ours_config)
    vit.reset_parameters()
    special = int(ours_config.has_class_token)
    assert vit._positions((4, 4)) is vit.positional_embedding
    table = vit._positions((2, 6))
    assert table.shape == (special + 12, 32)
    assert torch.equal(table[:special], vit.positional_embedding[:special])
    grid = vit.positional_embedding[special:].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(2, 6), mode="bicubic", align_corners=False, antialias=True)[0].permute(1, 2, 0)
    torch.testing.assert_close(table[special:].view(2, 6, 32), expected)
    assert vit(torch.randn(1, 12, 147), (2, 6))[-1].shape == (1, special + 12, 32)


def test_fewer_blocks_give_the_same_outputs():
    _, ours_config, _ = oracle("openai")
    whole, short = VisionTransformer(ours_config), VisionTransformer(ours_config, layers=2)
    whole.reset_parameters()
    short.load_state_dict({k: v for k, v in whole.state_dict().items() if "resblocks.2." not in k})
    patches = torch.randn(1, 16, 147)
    for a, b in zip(whole(patches), short(patches)):
        assert torch.equal(a, b)


def test_recomputation_gives_the_same_gradients():
    _, ours_config, _ = oracle("dino")
    vit = VisionTransformer(ours_config).train()
    vit.reset_parameters()
    patches, gradients = torch.randn(1, 16, 147), []
    for policy in ("none", "selective", "full"):
        for block in vit.transformer.resblocks:
            block.recompute = policy
        vit.zero_grad()
        vit(patches)[-1].square().sum().backward()
        gradients.append([p.grad for p in vit.parameters()])
    for a, b, c in zip(*gradients):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)
