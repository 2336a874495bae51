"""Batches for training tests: random, a function of (seed, step, stream), like the real loader's, and resumable like them."""

import json
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image

from molmo_core.models.base import BaseModelConfig
from pipelines.data.config import DataConfig
from pipelines.training.config import GroupConfig, OptimConfig, SamplesConfig, ScheduleConfig, TrainConfig, ValidationConfig

GOLDEN = Path(__file__).parents[2] / "golden"


def tiny_model(**llm):
    """A golden model, cut down: 1 block each, crops of 2 x 2 pooled tokens."""
    overrides = ["llm.n_layers=1", "llm.d_model=32", "llm.mlp_hidden_size=64", *(f"llm.{k}={v}" for k, v in llm.items())]
    return BaseModelConfig.load(GOLDEN / "molmo-qwen2-clip" / "config.yaml", overrides)


def tiny_config(tmp_path, **changes):
    groups = {name: GroupConfig(lr=3e-3, warmup=2, muon_lr=0.02) for name in ("connector", "vit", "llm")}
    settings = {
        "name": "tiny",
        "model": tiny_model(),
        "data": DataConfig.new(datasets={"random": {"path": "-"}}),
        "steps": 6,
        "storage": str(tmp_path),
        "experiment": "tests",
        "global_batch_size": 4,
        "sequence_length": 64,
        "precision": "fp32",
        "device": "cpu",
        "ft_embedding": "all",
        "log_interval": 1,
        "optim": OptimConfig(**groups, schedule=ScheduleConfig("constant")),
    }
    return TrainConfig(**(settings | changes))


def looks(folder):
    """Settings of `tiny_config` that validate and draw samples in steps 3 and 6, ... of a run."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (60, 40), "red").save(folder / "red.png")
    annotations = [{"style": "demo", "question": "Which colour?", "answer": "red", "type": "colour"}]
    annotations.append({"style": "demo", "question": "A shape?", "answer": "no", "type": "yes_no"})
    (folder / "records.jsonl").write_text(3 * (json.dumps({"image": "red.png", "message_list": annotations}) + "\n"))
    return {
        "validation": ValidationConfig(data=DataConfig.new(datasets={"other": {"path": "-"}}), interval=3, batches=2),
        "samples": SamplesConfig(records=str(folder / "records.jsonl"), interval=3, count=3, max_new_tokens=3),
    }


class RandomLoader:
    """Stands in for TrainLoader. Every third global batch has images only in its first stream, so that a rank gets text alone.

    `die_at` kills the process at a step, once (`marker` remembers); `poison_at` gives a batch with a pixel that is not a number.
    """

    def __init__(
        self, data, model, global_batch_size, sequence_length, seed, rank, world_size, die_at=None, marker=None, poison_at=None, delay=0.0
    ):
        self.model, self.seed, self.rank = model, seed, rank
        self.owned = np.array_split(np.arange(global_batch_size), world_size)[rank].tolist()
        self.die_at, self.marker, self.poison_at, self.delay = die_at, marker, poison_at, delay
        self.positions = dict.fromkeys(self.owned, 0)
        self.collate = model.build_collator(None, None, include_metadata=False)

    def __iter__(self):
        while True:
            step = self.positions[self.owned[0]] + 1
            time.sleep(self.delay)
            if step == self.die_at and self.rank == 1 and not Path(self.marker).exists():
                Path(self.marker).touch()
                os._exit(1)
            batch = self.collate([self.example(stream, step) for stream in self.owned])
            if step == self.poison_at and "images" in batch:
                batch["images"][0, 0, 0, 0] = float("nan")
            self.positions = dict.fromkeys(self.owned, step)
            yield batch

    def example(self, stream, step):
        rng = np.random.RandomState(self.seed + 1000 * step + stream)
        text = int(rng.randint(8, 20))
        ids = rng.randint(0, 400, text)
        example = {}
        if step % 3 or stream == 0:
            tokens = self.model.image_tokens
            ids = np.concatenate([[tokens.start], [tokens.patch] * 4, [tokens.end], ids])
            example["images"] = rng.standard_normal((1, 16, 588)).astype(np.float32)
            example["image_masks"] = np.ones((1, 16), np.float32)
            example["pooled_patches_idx"] = np.arange(16).reshape(4, 4)
        labels = np.append(ids[1:], 5)
        weights = np.zeros(len(ids), np.float32)
        weights[-5:] = rng.uniform(0.5, 1.5, 5)
        return example | {"input_ids": ids, "labels": labels, "loss_masks": weights, "position_ids": np.arange(len(ids))}

    def names(self, states):
        return [f"random[{stream}.{position + 1}]" for stream, (position,) in states.items()]

    def state_dict(self):
        return {stream: [position] for stream, position in self.positions.items()}

    def load_state_dict(self, states):
        self.positions = {stream: states[str(stream)][0] if str(stream) in states else states[stream][0] for stream in self.owned}
