import dataclasses

import numpy as np
import pytest
import torch

from molmo_core.config import ConfigError
from molmo_core.nn.configs import LlmConfig, MolmoVisionBackboneConfig, VitConfig
from molmo_core.nn.connector import NORMALISATION, MolmoVisionBackbone, normalise_pixels, patchify, used_layers

LLM = LlmConfig(d_model=24, n_heads=2, n_layers=1, mlp_hidden_size=40)
VIT = VitConfig.new(
    image_model_type="siglip", image_default_input_size=(28, 28), image_patch_size=7, image_pos_patch_size=7, image_emb_dim=16,
    image_num_heads=2, image_num_key_value_heads=2, image_head_dim=8, image_num_layers=3, image_mlp_dim=32, image_num_pos=16,
)  # fmt: skip
POOLINGS = ("attention_meanq", "attention", "attention_2wide", "attention_meanq_2x", "attention_meanq_4x", "stack", "mean", "none")


def make(**changes) -> MolmoVisionBackbone:
    torch.manual_seed(0)
    backbone = MolmoVisionBackbone(MolmoVisionBackboneConfig.new(vit=VIT, vit_layers=[-1, -3], **changes), LLM).eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return backbone


def test_patches_are_row_column_channel():
    image = np.arange(3 * 4 * 6).reshape(3, 4, 6)
    patches = patchify(torch.from_numpy(image), 2)
    assert patches.shape == (6, 12)
    for row in range(2):
        for col in range(3):
            window = image[:, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2].transpose(1, 2, 0)
            assert patches[3 * row + col].tolist() == window.ravel().tolist()
    with pytest.raises(ValueError, match="multiples of 5"):
        patchify(torch.zeros(3, 4, 6), 5)


@pytest.mark.parametrize("kind", NORMALISATION)
def test_normalisation(kind):
    pixels = torch.randint(0, 256, (2, 12), dtype=torch.uint8)
    mean, std = NORMALISATION[kind]
    expected = (pixels.numpy().reshape(2, 4, 3) / 255 - np.array(mean)) / np.array(std)
    torch.testing.assert_close(normalise_pixels(pixels, kind, torch.float32), torch.tensor(expected).flatten(1).float())


def test_pixel_forms_agree():
    """uint8 or normalised floats, crops of pixels or of patches: the same features."""
    backbone = make()
    pixels = torch.randint(0, 256, (2, 3, 3, 28, 28), dtype=torch.uint8)
    expected = backbone.patch_features(pixels)
    patches = patchify(pixels, 7)
    torch.testing.assert_close(backbone.patch_features(patches), expected, atol=0, rtol=0)
    floats = pixels.float() / 127.5 - 1  # the SigLIP normalisation
    torch.testing.assert_close(backbone.patch_features(floats), expected, atol=1e-4, rtol=1e-4)
    assert expected.shape == (2, 3 * 16, 32)
    assert backbone.patch_features(torch.rand(1, 1, 3, 14, 42)).shape == (1, 12, 32)  # another grid
    with pytest.raises(ValueError, match=r"\[B, crops, 16, 147\]"):
        backbone.patch_features(torch.rand(1, 1, 15, 147))


def test_selected_layers_are_concatenated_in_order():
    backbone = make()
    patches = torch.randn(1, 2, 16, 147)
    outputs = backbone.image_vit(patches[0])
    expected = torch.cat((outputs[2], outputs[0]), dim=-1).flatten(0, 1)[None]
    torch.testing.assert_close(backbone.patch_features(patches), expected)


@pytest.mark.parametrize("kind", ["pad_and_partial_pad", "pad_embed", "regress"])
def test_padding_embedding(kind):
    backbone, plain = make(image_padding_embed=kind), make()
    plain.load_state_dict({k: v for k, v in backbone.state_dict().items() if k != "pad_embed"})
    patches, masks = torch.randn(1, 1, 16, 147), torch.rand(1, 1, 16)
    masks[0, 0, :4] = torch.tensor([0.0, 1.0, -1.0, 0.5])
    added = (backbone.patch_features(patches, masks) - plain.patch_features(patches))[0]
    embedding = backbone.pad_embed
    for i, m in enumerate(masks[0, 0].tolist()):
        if kind == "regress":
            expected = embedding * max(m, 0)
        elif kind == "pad_embed":
            expected = embedding * (m == 0)
        else:  # the -1 of the first release's mask order counts as partial
            expected = embedding[0] if m == 0 else embedding[1] * (m < 1)
        torch.testing.assert_close(added[i], expected.expand(32), atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="image_masks"):
        torch.testing.assert_close(backbone.patch_features(patches), plain.patch_features(patches))


def attention_by_hand(backbone: MolmoVisionBackbone, query: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """One query [P] over the patches of a window [k, P]."""
    pooling = backbone.image_pooling_2d
    q, k, v = pooling.wq(query), pooling.wk(window), pooling.wv(window)
    heads = []
    for part in torch.arange(len(q)).split(pooling.head_dim):
        weights = (k[:, part] @ q[part] / pooling.head_dim**0.5).softmax(0)
        heads.append(weights @ v[:, part])
    return pooling.wo(torch.cat(heads))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", POOLINGS)
def test_pooling(kind, masked):
    backbone = make(image_pooling_2d=kind, pooling_attention_mask=masked)
    width = 1 if kind == "none" else 4
    features = torch.randn(2, 20, 32)
    idx = torch.randint(0, 20, (2, 5, width))
    idx[0, 1, width // 2 :] = -1
    idx[1, 4] = -1
    pooled, valid = backbone.pool(features, idx)[0]
    assert valid.tolist() == [[bool((idx[b, n] >= 0).any()) for n in range(5)] for b in range(2)]
    assert torch.isfinite(pooled).all()
    for b in range(2):
        for n in range(5):
            if not valid[b, n]:
                continue
            present = idx[b, n] >= 0
            window = torch.where(present[:, None], features[b, idx[b, n].clamp(min=0)], 0.0)
            seen = window[present] if masked else window
            if kind == "stack":
                expected = window.flatten()
            elif kind == "none":
                expected = window[0]
            elif kind == "mean":
                expected = window[present].mean(0)
            else:
                expected = attention_by_hand(backbone, seen.mean(0) if "meanq" in kind else window[0], seen)
            torch.testing.assert_close(pooled[b, n], backbone.image_projector(expected), atol=1e-5, rtol=1e-5)


def test_masked_pooling_does_not_depend_on_the_width_of_the_index():
    backbone = make(pooling_attention_mask=True)
    features, idx = torch.randn(1, 20, 32), torch.randint(0, 20, (1, 6, 4))
    wide = torch.nn.functional.pad(idx, (0, 5), value=-1)
    torch.testing.assert_close(backbone.pool(features, idx)[0][0], backbone.pool(features, wide)[0][0], atol=1e-5, rtol=1e-5)


def test_several_indices_in_one_call():
    backbone = make()
    images = torch.randn(1, 2, 16, 147)
    low, high = torch.randint(0, 32, (1, 3, 4)), torch.randint(0, 32, (1, 5, 1))
    (a, _), (b, _) = backbone(images, None, low, high)
    features = backbone.patch_features(images)
    torch.testing.assert_close(a, backbone.pool(features, low)[0][0])
    torch.testing.assert_close(b, backbone.pool(features, high)[0][0])


@pytest.mark.parametrize("changes", [{}, {"image_projector": "linear"}, {"image_pooling_2d": "stack"}, {"image_padding_embed": "regress"}])
def test_blank_crop_reaches_every_parameter(changes):
    backbone = make(**changes)
    (backbone.blank_features(2) * 0).sum().backward()
    used = {n for n, p in backbone.named_parameters() if p.grad is not None}
    assert used == {n for n, _ in backbone.named_parameters()}


def test_unused_layers():
    config = MolmoVisionBackboneConfig.new(vit=VIT, vit_layers=[-2, -3])
    assert used_layers(config) == [1, 0]
    assert len(MolmoVisionBackbone(config, LLM).image_vit.transformer.resblocks) == 2
    kept = MolmoVisionBackbone(dataclasses.replace(config, skip_unused_layers=False, image_model_type=None), LLM)
    assert len(kept.image_vit.transformer.resblocks) == 3
    with pytest.raises(ConfigError, match="3 layers"):
        used_layers(MolmoVisionBackboneConfig.new(vit=VIT, vit_layers=[-4]))
