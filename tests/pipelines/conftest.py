"""A small random model that answers differently to different prompts, for the stages that use a trained one."""

import pytest
import torch

from molmo_core.models.base import BaseModelConfig


@pytest.fixture(scope="session")
def tiny_model(golden):
    """A random Molmo of the demo's architecture whose blocks weigh more than the last token, so that answers differ."""
    torch.manual_seed(0)
    overrides = [f"llm.tokenizer.identifier={golden / 'tokenizer'}", "llm.vocab_size=1024", "llm.max_sequence_length=16384"]
    model = BaseModelConfig.load("configs/models/demo.yaml", overrides).build_model().eval()
    unreadable = [token for token in range(1024) if not model.tokenizer.decode([token], truncate_at_eos=False).isprintable()]
    with torch.no_grad():
        for parameter in (*model.transformer.blocks.parameters(), *model.vision_backbone.parameters()):
            parameter.mul_(12.0 if parameter.ndim > 1 else 1.0)
        model.transformer.ff_out.weight[unreadable] = 0
    return model


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tmp_path_factory):
    """The tiny model as a checkpoint folder."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model.save_checkpoint(path)
    return path
