"""How fast one training step is on one device: bare, through the training loop's own step, and where its time goes.

    python benchmarks/train_step.py                        # on a GPU: Molmo2-4B, 4,096 tokens and 14 crops a row, bfloat16
    python benchmarks/train_step.py --rows 1 2 4 --recompute none selective full
    python benchmarks/train_step.py --float8 --rows 2 --recompute selective
    python benchmarks/train_step.py --tiny                 # on any CPU: checks the script

`bare` is forward, backward and the optimiser on a batch that lies on the device; `loop` is `pipelines.training.step` with everything that
the loop does around it (batches of the host, norms, clipping, schedules, what is counted and looked at). FLOPs are counted as 6 x text
parameters without the embedding look-up x tokens, plus 6 x parameters of the vision encoder x patches; MFU is their share of the data
sheet's bfloat16 peak. `parts` are forward and backward of each part for itself; `kernels` is where a profiler saw the device's time go
in bare steps. Every line is one JSON object; the first says what machine and versions these are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from shapes import model_config, pack, random_model

from molmo_core.inputs import as_batch
from pipelines.data.config import DataConfig
from pipelines.training.config import TrainConfig
from pipelines.training.flops import peak_flops
from pipelines.training.health import Health
from pipelines.training.meter import Meter
from pipelines.training.optim import Optimizer
from pipelines.training.step import TrainStep, loss_weight

WARM = 3
"""Steps that compile and fill caches."""
KINDS = {
    "attention": ("flex_attention", "fmha", "flash", "sdpa", "attention"),
    "loss": ("_rows",),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk"),
    "copies": ("memcpy", "memset"),
    "compiled": ("triton_",),
}
"""Names of kernels contain one of these; the first match counts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rows", type=int, nargs="*", default=[1])
    parser.add_argument("--recompute", nargs="*", default=["none"], choices=["none", "selective", "full"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--what", nargs="*", default=["bare", "loop", "parts", "kernels"], choices=["bare", "loop", "parts", "kernels"])
    parser.add_argument("--float8", action="store_true", help="products of the language model's blocks in float8")
    parser.add_argument("--eager", action="store_true", help="not compiled")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.tiny else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps({"torch": torch.__version__, "device": name}), flush=True)
    config = model_config(arguments.tiny)
    model = random_model(config, device, torch.bfloat16).train()
    if arguments.float8:
        model.apply_float8()
    if device.type == "cuda" and not arguments.eager:
        model.apply_compile()
    settings = {
        "name": "-",
        "model": config,
        "data": DataConfig.new(datasets={"random": {"path": "-"}}),
        "steps": 10**6,
        "precision": "bf16",
    }
    for rows, recompute in itertools.product(arguments.rows, arguments.recompute):
        model.apply_activation_checkpointing(recompute)
        bench = Bench(model, TrainConfig(**settings, ft_embedding="all", global_batch_size=rows), arguments)
        for what in arguments.what:
            try:
                values = getattr(bench, what)()
            except torch.OutOfMemoryError as error:
                values = {"error": str(error)[:120]}
            print(json.dumps({"what": what, "rows": rows, "recompute": recompute, "float8": arguments.float8} | values), flush=True)
        del bench


class Bench:
    """Measures steps of one size."""

    def __init__(self, model: Any, config: TrainConfig, arguments: argparse.Namespace):
        self.model, self.config, self.steps, self.device = model, config, arguments.steps, model.device
        rows, llm = config.global_batch_size, model.config.llm
        length, crops, image_tokens = (128, 2, 50) if arguments.tiny else (4096, 14, 392 + 2160)
        batch = pack(model.config, np.random.RandomState(0), rows, length, crops, image_tokens)
        self.batch = {key: torch.from_numpy(value) for key, value in batch.items()}
        self.inputs = as_batch(self.batch, self.device)
        self.optimizer = Optimizer(model, config.optim)
        vit = sum(p.numel() for p in model.get_vit_params())
        text = sum(p.numel() for p in model.parameters()) - vit - model.transformer.wte.embedding.numel()
        text += model.transformer.wte.embedding.numel() if llm.weight_tying else 0
        self.tokens = rows * length
        self.flops = 6 * text * self.tokens + 6 * vit * batch["images"].shape[1] * rows * batch["images"].shape[2]
        self.left_out = torch.zeros((), dtype=torch.bool, device=self.device)

    def bare_step(self) -> torch.Tensor:
        loss = self.model(**self.inputs, return_logits=False).loss
        loss.backward()
        self.optimizer.step(self.left_out)
        self.optimizer.zero_grad()
        return loss

    def bare(self) -> dict[str, Any]:
        return self._measure(lambda number: self.bare_step())

    def loop(self) -> dict[str, Any]:
        meter = Meter(self.model, self.device)
        health = Health(self.config, self.device, lambda before: [], lambda event: None, lambda: "")
        step = TrainStep(self.config, self.model, self.optimizer, meter, [health])

        def take(number: int) -> torch.Tensor:
            torch.manual_seed(number)
            meter.begin()
            meter.has_batch()
            counts = meter.counts(self.batch)
            taken, sums, _ = step(number + 1, self.batch, loss_weight(self.batch), {})
            meter.end(sums, taken.left_out, *counts)
            health.after_step(taken)
            return taken.loss

        return self._measure(take)

    def _measure(self, step: Callable[[int], torch.Tensor]) -> dict[str, Any]:
        """Steps one after the other, as in training: the clock is read when all are done."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step(0).item()
        first = time.perf_counter() - start
        for number in range(1, WARM):
            step(number).item()
        start = time.perf_counter()
        for number in range(WARM, WARM + self.steps):
            loss = step(number)
        host = time.perf_counter() - start
        value = loss.item()  # waits for the device
        seconds = (time.perf_counter() - start) / self.steps
        line = {
            "loss": round(value, 4), "step_s": round(seconds, 4), "host_s": round(host / self.steps, 4), "first_s": round(first, 1),
            "tokens_s": round(self.tokens / seconds), "tflops": round(self.flops / seconds / 1e12, 1),
        }  # fmt: skip
        if self.device.type == "cuda":
            peak = peak_flops(self.device)
            line["mfu"] = round(self.flops / seconds / peak, 3) if peak else None
            line["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        return line

    def parts(self) -> dict[str, Any]:
        model, inputs = self.model, self.model.inputs(self.inputs)
        vision, transformer = model.vision_backbone, model.transformer
        with torch.no_grad():
            features = vision.patch_features(inputs.images, inputs.image_masks)
            embedded = model.embed(inputs)
        features = features.requires_grad_()
        x = embedded.tokens.x.detach().requires_grad_()
        hidden = x.detach().flatten(0, 1)[inputs.loss_positions].requires_grad_()
        labels = inputs.labels.flatten()[inputs.loss_positions]
        weights = torch.ones(len(labels), device=self.device)
        attention = model.attention(inputs)

        def backward(tensor: torch.Tensor) -> None:
            tensor.sum().backward()

        def optimise() -> None:
            self.optimizer.step(self.left_out)

        self.bare_step()
        model(**self.inputs, return_logits=False).loss.backward()  # gradients for the optimiser
        values = {"optimizer": self._timed(optimise)}
        self.optimizer.zero_grad()
        values |= {
            "vit": self._timed(lambda: backward(vision.patch_features(inputs.images, inputs.image_masks))),
            "connector": self._timed(lambda: backward(vision.pool(features, inputs.pooled_patches_idx)[0][0])),
            "mask": self._timed(lambda: model.attention(inputs)),
            "blocks": self._timed(lambda: backward(model.run(embedded.tokens._replace(x=x), attention).hidden)),
            "loss": self._timed(lambda: backward(transformer.loss_sums(hidden, labels, weights, 1e-4).total)),
        }
        self.optimizer.zero_grad()
        return {f"{name}_ms": round(1e3 * seconds, 2) for name, seconds in values.items()}

    def _timed(self, work: Callable[[], Any], repeats: int = 5) -> float:
        times = []
        for _ in range(repeats + 2):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def kernels(self) -> dict[str, Any]:
        activity = torch.profiler.ProfilerActivity
        on_device = self.device.type == "cuda"
        self.bare_step().item()
        count = 3 if on_device else 1
        with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if on_device else [])]) as profile:
            for _ in range(count):
                self.bare_step()
            self.left_out.item()
        if not on_device:
            return {"host_calls": len(profile.events())}
        spent: dict[str, float] = defaultdict(float)
        names: Counter[str] = Counter()
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and not e.name.startswith("ProfilerStep")]
        for event in events:
            kind = next((k for k, parts in KINDS.items() if any(part in event.name.lower() for part in parts)), "other")
            spent[kind] += event.time_range.elapsed_us()
            names[f"{kind}: {event.name[:90]}"] += round(event.time_range.elapsed_us())
        span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
        waits = Counter(e.name for e in profile.events() if "Synchronize" in e.name)
        return {
            "ms": {kind: round(us / count / 1e3, 1) for kind, us in sorted(spent.items(), key=lambda item: -item[1])},
            "idle_ms": round((span - sum(spent.values())) / count / 1e3, 1),
            "waits": dict(waits),
            "longest_ms": {name: round(us / count / 1e3, 2) for name, us in names.most_common(30)},
        }


if __name__ == "__main__":
    main()
