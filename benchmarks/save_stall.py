"""How much saving slows training down: steps of one process with and without a checkpoint being written beside them.

    python benchmarks/save_stall.py                # about 240 MB of weights and optimiser states, on any CPU
    python benchmarks/save_stall.py --width 128    # smaller

The loop of `pipelines.training` trains a text-only Molmo2 on random tokens and saves every few steps. Of each save: seconds of the copy
(staging), seconds that a later step waited for the writing, and seconds until the checkpoint was whole. Then medians of the steps beside
which one was being written and of the others: seconds, and of these the ones that the step's thread wanted neither a core nor had one
(`stands_still`: it waited for the interpreter's lock or a disk; from /proc/thread-self/schedstat, so that other processes do not count).
Every line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray.train.torch
import torch
from shapes import ROOT, TINY, pack

from molmo_core.models.base import BaseModelConfig
from pipelines.data.config import DataConfig
from pipelines.training import loop, preemption
from pipelines.training.config import CheckpointConfig, TrainConfig
from pipelines.training.events import Event, Metrics, Saved, Started
from pipelines.training.progress import Reporter


class Batches:
    """The same random pack in every step."""

    def __init__(self, data: Any, model: Any, global_batch_size: int, sequence_length: int, **_: Any):
        batch = pack(model, np.random.RandomState(0), global_batch_size, sequence_length, crops=0, image_tokens=0)
        self.batch = {name: torch.from_numpy(value) for name, value in batch.items()}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield self.batch

    def state_dict(self) -> dict[str, list[int]]:
        return {"0": [0]}

    def names(self, states: Any) -> list[str]:
        return []


class Watch(Reporter):
    """Notes when steps ended and what saves took."""

    def __init__(self, steps: int) -> None:
        """Stops the run after so many, before it writes a model, for which there is no tokenizer."""
        super().__init__(None)
        self.steps = steps
        self.ended: list[float] = []
        self.busy: list[float] = []
        """Seconds that this thread had a core or waited for one, at those times."""
        self.saves: dict[int, Saved] = {}
        self.began: dict[int, float] = {}

    def send(self, event: Event) -> None:
        if isinstance(event, Started):
            self.note_end()
        elif isinstance(event, Metrics):
            self.began[event.step] = time.perf_counter()  # a save of this step begins after its log
        elif isinstance(event, Saved):
            self.saves[event.step] = event

    def heartbeat(self, step: int) -> None:
        self.note_end()
        self.stop_requested = step == self.steps - 1

    def note_end(self) -> None:
        self.ended.append(time.perf_counter())
        on_core, queued, _ = map(int, Path("/proc/thread-self/schedstat").read_text().split())
        self.busy.append((on_core + queued) / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--interval", type=int, default=15)
    parser.add_argument("--length", type=int, default=512, help="tokens of a step")
    arguments = parser.parse_args()
    ray.train.torch.get_device = lambda: torch.device("cpu")  # this process is no worker of Ray Train
    preemption.ASK_S = float("inf")
    wide = [f"llm.d_model={arguments.width}", f"llm.mlp_hidden_size={8 * arguments.width}", "llm.n_layers=6"]
    model = BaseModelConfig.load(ROOT / "configs/models/molmo2-4b.yaml", [*TINY, *wide])
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.new(
            name="run", model=model, data=DataConfig.new(datasets={"random": {"path": "-"}}), steps=arguments.steps + 1, storage=folder,
            global_batch_size=1, sequence_length=arguments.length, precision="fp32", device="cpu", log_interval=1, ft_embedding="all",
            checkpoint=CheckpointConfig(interval=arguments.interval, keep=2), check_memory=False,
        )  # fmt: skip
        watch = Watch(arguments.steps)
        loop.train(config, Batches, watch)
    report(watch, 12 * config.model.build_model().num_params())


def report(watch: Watch, size: int) -> None:
    seconds, busy = np.diff(watch.ended), np.diff(watch.busy)  # of step 1, 2, ...
    beside: list[tuple[float, float]] = []
    alone: list[tuple[float, float]] = []
    for number, took in enumerate(zip(seconds, seconds - busy), 1):
        if number < 4 or number in watch.saves:  # warm-up; the step that stages
            continue
        writing = any(watch.began[step] < watch.ended[number - 1] < watch.began[step] + save.seconds for step, save in watch.saves.items())
        (beside if writing else alone).append(took)
    for step, save in watch.saves.items():
        line = {"step": step, "staging_s": save.staging, "blocked_s": save.blocked, "whole_after_s": save.seconds}
        print(json.dumps({key: round(value, 3) for key, value in line.items()}), flush=True)
    if not beside or not alone:
        raise SystemExit("all steps, or none, ran beside a save: other sizes or intervals are needed")
    line: dict[str, Any] = {"torch": torch.__version__, "state_mb": round(size / 1e6)}
    for name, values in (("beside", beside), ("alone", alone)):
        step, still = (round(statistics.median(column), 4) for column in zip(*values))
        line[name] = {"steps": len(values), "step_s": step, "stands_still_s": still}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
