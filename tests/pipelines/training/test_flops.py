"""FLOPs of encoder and connector against torch's own count, for every kind of image index."""

import pytest
import torch
from batches import GOLDEN
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from molmo_core.registry import BaseModelConfig
from pipelines.training.flops import StepFlops

INDICES = {
    "molmo-qwen2-clip": {"pooled_patches_idx": (12, 4)},
    "molmo-qwen2-dino": {"pooled_patches_idx": (12, 4)},
    "video-olmo": {"low_res_pooled_idx": (4, 16), "high_res_pooled_idx": (9, 4)},
    "he-molmo": {"low_res_tokens_idx": (9, 4), "high_res_tokens_idx": (20, 4)},
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("pixels", [False, True], ids=["patches", "pixels"])
def test_encoder_and_connector_are_counted_as_they_are_built(name, pixels):
    file = next((GOLDEN / name).glob("**/config.yaml"))
    torch.manual_seed(0)
    model = BaseModelConfig.load(file, ["vision_backbone.skip_unused_layers=true"]).build_model()  # those have no backward pass
    vision = model.vision_backbone
    vit = vision.config.vit
    assert len(vision.image_vit.transformer.resblocks) <= vit.image_num_layers
    rows = cols = int(vit.patches_per_crop**0.5)
    size = vit.image_patch_size
    images = torch.randn(2, 3, 3, rows * size, cols * size) if pixels else torch.randn(2, 3, rows * cols, size * size * 3)
    images.requires_grad_()  # the backward pass of the first layer counts as every other's
    batch = {"images": images, "input_ids": torch.zeros(2, 8, dtype=torch.int64)}
    for index, (tokens, window) in INDICES[name].items():
        batch[index] = torch.randint(0, rows * cols, (2, tokens, window))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know the CPU's kernel
        parts = vision(images, torch.ones(2, 3, rows * cols), *(batch[index] for index in INDICES[name]))
        sum(features.sum() for features, _ in parts).backward()
    assert StepFlops(model).vision(batch) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_batch_without_images_has_no_vision():
    model = BaseModelConfig.load(GOLDEN / "molmo-qwen2-clip" / "config.yaml").build_model()
    flops = StepFlops(model)
    batch = {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}
    assert flops.vision(batch) == 0
    assert flops(batch) == 16 * (6 * flops.llm + flops.attention * 4)
