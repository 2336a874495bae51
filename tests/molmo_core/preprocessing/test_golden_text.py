"""The reference's own sequences: prompts and answers by style, trees, points, counting, multiple choice, and two whole batches."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from molmo_core.config import read_yaml
from molmo_core.nn.configs import LlmConfig, VitConfig
from molmo_core.preprocessing.collator import MMCollator
from molmo_core.preprocessing.configs import DataFormatter, MolmoPreprocessorConfig
from molmo_core.preprocessing.preprocessor import build_preprocessor
from molmo_core.preprocessing.tokenizer import Tokenizer

CASES = json.loads((Path(__file__).parents[2] / "golden/text/text_formatting.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(golden):
    return Tokenizer.load(golden / "tokenizer", first_special_id=448)


@pytest.mark.parametrize("case", CASES["results"])
def test_sequences_equal_the_reference(case, tokenizer):
    system_prompt, templates, name, mode = case.split("/")
    preprocessor = build_preprocessor(
        tokenizer,
        VitConfig(image_default_input_size=(56, 56)),
        DataFormatter(prompt_templates=templates, system_prompt=system_prompt, message_format="role", always_start_with_space=True),
        MolmoPreprocessorConfig(max_crops=6, overlap_margins=(1, 1), loss_token_weighting="root_subsegments"),
        for_inference=mode == "inference",
        is_training=mode == "train",
    )
    example = CASES["examples"][name] | {"image": np.zeros((*CASES["image_hw"], 3), np.uint8)}
    expected = CASES["results"][case]

    got = preprocessor(example, np.random.RandomState(7))

    assert got["input_ids"].tolist() == expected["input_tokens"]
    assert got["position_ids"].tolist() == expected["position_ids"]
    assert got.get("subsegment_ids", np.array([])).tolist() == expected.get("subsegment_ids", [])
    if mode == "train":
        assert got["labels"].tolist() == expected["target_tokens"]
        np.testing.assert_allclose(got["loss_masks"], expected["loss_masks"], atol=1e-6)
    else:
        assert not {"labels", "loss_masks"} & got.keys()


EXAMPLES = [
    {"style": "demo", "question": "Point to the dogs.", "answer": '<point x="10.5" y="20.1" alt="dogs">dogs</point>'},
    {"style": "demo", "question": "How many cups are on the table?", "answer": "3"},
]
BATCHES = ["molmo-qwen2-clip", "molmo-olmo-clip", "molmo-qwen2-siglip-bidir", "molmo-qwen2-dino"]


def _preprocessor(golden, folder, tokenizer, for_inference):
    config = read_yaml(golden / folder / "config.yaml")
    llm = LlmConfig.from_dict(config["llm"], base=golden / folder)
    assert Tokenizer.load(llm.tokenizer.identifier, first_special_id=llm.embedding_rows).vocab_size == tokenizer.vocab_size
    return build_preprocessor(
        tokenizer,
        VitConfig.from_dict(config["vision_backbone"]["vit"]),
        DataFormatter.from_dict(config["data_formatter"]),
        MolmoPreprocessorConfig.from_dict(config["mm_preprocessor"]),
        for_inference=for_inference,
        is_training=not for_inference,
    )


@pytest.mark.parametrize("folder", BATCHES)
def test_batch_equals_the_reference(golden, tokenizer, folder):
    expected = load_file(golden / folder / "batch.safetensors")
    images = np.load(golden / folder / "images.npz")
    preprocessor = _preprocessor(golden, folder, tokenizer, for_inference=False)
    examples = [preprocessor(e | {"image": images[f"image{i}"]}) for i, e in enumerate(EXAMPLES)]

    batch = {k: v.numpy() for k, v in MMCollator(None, None, include_metadata=False)(examples).items()}

    assert set(batch) == set(expected)
    for key in ("input_ids", "labels", "position_ids", "pooled_patches_idx"):
        np.testing.assert_array_equal(batch[key], expected[key], err_msg=key)
    np.testing.assert_allclose(batch["loss_masks"], np.clip(expected["loss_masks"], 0, None), atol=1e-6)
    assert batch["images"].shape == expected["images"].shape


@pytest.mark.parametrize("folder", BATCHES)
def test_prompt_equals_the_reference(golden, tokenizer, folder):
    expected = load_file(golden / folder / "prompt.safetensors")
    images = np.load(golden / folder / "images.npz")
    preprocessor = _preprocessor(golden, folder, tokenizer, for_inference=True)
    question = {k: v for k, v in EXAMPLES[0].items() if k != "answer"}

    batch = MMCollator(None, None, include_metadata=False)([preprocessor(question | {"image": images["image0"]})])

    assert set(batch) == set(expected)
    for key in ("input_ids", "position_ids", "pooled_patches_idx"):
        np.testing.assert_array_equal(batch[key].numpy(), expected[key], err_msg=key)
