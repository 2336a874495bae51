"""The published models' configurations build (without memory) and have the published number of parameters."""

from pathlib import Path

import pytest
import torch

from molmo_core.models.base import BaseModelConfig

CONFIGS = Path(__file__).parents[3] / "configs" / "models"

# name: language model (with the special tokens' rows), vision encoder, connector (without those rows)
PUBLISHED = {
    "molmoe-1b": (6_919_424_000, 290_909_184, 11_542_528),
    "molmo-7b-o": (7_299_141_632, 290_909_184, 74_981_376),
    "molmo-7b-d": (7_616_075_264, 290_909_184, 114_040_832),
    "molmo-72b": (72_707_252_224, 290_909_184, 310_124_544),
    "molmo2-4b": (4_022_795_776, 382_505_936, 56_611_328),
    "molmo2-8b": (8_191_259_648, 382_505_936, 87_937_536),
    "molmo2-o-7b": (7_298_535_424, 382_505_936, 79_745_536),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name):
    config = BaseModelConfig.load(CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        model = config.build_model()
    groups = model.parameter_groups()
    sizes = {group: sum(p.numel() for _, p in named) for group, named in groups.items() if named}
    new_rows = model.transformer.wte.new_embedding.numel()
    llm, vit, connector = PUBLISHED[name]
    assert sizes == {"llm": llm - new_rows, "vit": vit, "connector": connector + new_rows}
    assert model.num_params() == llm + vit + connector


def test_names_of_the_dense_layout():
    """Names and shapes of a checkpoint of Molmo-7B-D, as published."""
    with torch.device("meta"):
        model = BaseModelConfig.load(CONFIGS / "molmo-7b-d.yaml").build_model()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(shapes) == 585
    block, vit = "transformer.blocks.27.", "vision_backbone.image_vit."
    layer = vit + "transformer.resblocks.22."
    expected = {
        "transformer.wte.embedding": (152064, 3584),
        "transformer.wte.new_embedding": (128, 3584),
        block + "att_proj.weight": (4608, 3584),
        block + "att_proj.bias": (4608,),
        block + "attn_out.weight": (3584, 3584),
        block + "ff_proj.weight": (37888, 3584),
        block + "ff_out.weight": (3584, 18944),
        block + "attn_norm.weight": (3584,),
        block + "ff_norm.weight": (3584,),
        "transformer.ln_f.weight": (3584,),
        "transformer.ff_out.weight": (152064, 3584),
        "vision_backbone.pad_embed": (2, 2048),
        "vision_backbone.image_pooling_2d.wq.weight": (1024, 2048),
        "vision_backbone.image_pooling_2d.wo.bias": (1024,),
        "vision_backbone.image_projector.w3.weight": (18944, 1024),
        "vision_backbone.image_projector.w2.weight": (3584, 18944),
        vit + "class_embedding": (1024,),
        vit + "positional_embedding": (577, 1024),
        vit + "patch_embedding.weight": (1024, 588),
        vit + "pre_ln.bias": (1024,),
        layer + "attention.wo.weight": (1024, 1024),
        layer + "feed_forward.w1.weight": (4096, 1024),
        layer + "ffn_norm.bias": (1024,),
    }
    assert {name: shapes.get(name) for name in expected} == expected
