"""A tiny Molmo2 that has learned a few answers by heart, so that what a browser must show is known beforehand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from molmo_core.models.molmo2 import Molmo2
from tests.molmo_core.models.test_molmo2 import config_of

STORY = "Once more and "
"""What it repeats without end when it is asked for a story."""


def picture(width: int, height: int, seed: int = 0) -> bytes:
    """A PNG of coloured noise."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


PICTURES = {"wide.png": picture(300, 120), "tall.png": picture(90, 240, 1)}
POINTED = "Point to the dogs."


def lessons(video: Path) -> list[dict[str, Any]]:
    """Conversations: media and messages. Points are in thousandths of width and height."""
    wide, tall = PICTURES.values()
    dogs = '<points coords="1 1 250 750">dogs</points>'
    return [
        {"image": wide, "messages": [POINTED, dogs]},
        {"image": wide, "messages": [POINTED, dogs, "And their color?", "brown"]},
        {"images": [wide, tall], "messages": ["Point to the cups.", '<points coords="1 1 100 200;2 2 800 600">cups</points>']},
        {"video": video, "messages": ["Where is the ball?", '<points coords="1.0 1 300 400;3.0 2 700 600">ball</points>']},
        {"messages": ["Hello!", "Hi."]},
        {"messages": ["Tell me a story.", STORY * 12]},
    ]


def taught_model(golden: Path) -> Molmo2:
    """The model, which answers every lesson greedily as it was taught; a story has no end."""
    torch.manual_seed(0)
    config = config_of(golden, max_sequence_length=16384)
    config.bi_directional_attn = None
    model = Molmo2(config).train()
    preprocess = config.build_preprocessor(for_inference=False, is_training=False)
    examples = [preprocess({**lesson, "placeholders": False}) for lesson in lessons(golden / "video-olmo" / "video.mp4")]
    examples[-1]["loss_masks"][np.flatnonzero(examples[-1]["loss_masks"])[-1]] = 0  # of the end of the story
    batch = config.build_collator(None, None, include_metadata=False)(examples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        output = model(**batch)
        wrong = (output.logits.argmax(-1) != batch["labels"]) & (batch["loss_masks"] > 0)
        if output.loss < 0.01 and not wrong.any():
            return model.eval()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError("the model has not learned its lessons")
