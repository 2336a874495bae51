"""Tiny models of the whole family, and prompts of every kind that each takes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from molmo_core.checkpoint import from_pretrained, load_checkpoint
from molmo_core.models.base import BaseModelConfig
from tests.molmo_core.models.test_molmo2 import config_of, random_model

RNG = np.random.RandomState(0)
IMAGES = [RNG.randint(0, 256, size, np.uint8) for size in ((70, 130, 3), (56, 40, 3), (160, 60, 3))]
TEXT = {"messages": ["What is the capital of France?"]}
LONG_TEXT = {"messages": ["Say this again and again and again, as often as you can: " * 4]}
QUESTIONS = ("How many dogs are there?", "How many dogs are there in this image?", "What is it?")
IMAGE = [{"image": IMAGES[i], "messages": [question]} for i, question in zip((0, 0, 2), QUESTIONS)]
SEVERAL = [{"images": IMAGES, "messages": ["Which one shows a cat?"]}, {"images": IMAGES[:2], "messages": ["Which one shows a cat?"]}]
VIDEO = "video-olmo/video.mp4"

FAMILY: dict[str, list[dict[str, Any]]] = {
    "molmo-qwen2-clip": [TEXT, *IMAGE, LONG_TEXT],
    "molmo-olmo-clip": [TEXT, *IMAGE],
    "molmo-qwen2-siglip-bidir": [TEXT, *IMAGE, LONG_TEXT],
    "molmo-qwen2-dino": [TEXT, *IMAGE],
    "hub-molmoe": [TEXT, *IMAGE],
    "video-olmo/per-frame": [{"video": VIDEO, "messages": [question]} for question in QUESTIONS[:2]],
    "video-olmo/mixed-res": [{"video": VIDEO, "messages": [question]} for question in QUESTIONS[:2]],
    "he-molmo": [*IMAGE, TEXT],
    "molmo2": [TEXT, *IMAGE, *SEVERAL, {"video": VIDEO, "messages": ["What happens?"]}],
    "molmo2 within_image": [*IMAGE, *SEVERAL],
    "molmo2 image_to_question": [TEXT, *IMAGE, *SEVERAL[:1]],
    "molmo2 causal": [*IMAGE, *SEVERAL],
}
"""Models and what each is asked."""


def family_model(name: str, golden: Path) -> Any:
    """A golden model with its weights, or a random Molmo2 with the attention among image tokens that is named."""
    folder, tokenizer = golden / name, str(golden / "tokenizer")
    if name.startswith("hub-"):
        model = from_pretrained(folder)
        model.config.llm.tokenizer.identifier = tokenizer
    elif folder.is_dir():
        model = BaseModelConfig.load(folder / "config.yaml", [f"llm.tokenizer.identifier={tokenizer}"]).build_model().eval()
        load_checkpoint(model, folder / "model.safetensors")
    else:
        config = config_of(golden)
        mode = name.partition(" ")[2]
        if mode:
            config.bi_directional_attn = None if mode == "causal" else mode
        model = random_model(config)
    with torch.no_grad():  # wider, so that the answers of a few tokens differ
        for parameter in model.transformer.blocks.parameters():
            parameter.mul_(1.5 if parameter.ndim > 1 else 1.0)
    return model.eval()


def family_prompts(name: str, model: Any, golden: Path, videos: bool = True) -> list[dict[str, Any]]:
    """Model inputs of the prompts, without metadata; those with videos only where a decoder is."""
    preprocess = model.config.build_preprocessor(for_inference=True, is_training=False)
    prompts = []
    for example in FAMILY[name]:
        example = dict(example)
        if "video" in example and not videos:
            continue
        if "video" in example:
            example["video"] = str(golden / example["video"])
        prompts.append({k: v for k, v in preprocess(example).items() if k != "metadata"})
    return prompts
