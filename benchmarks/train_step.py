"""How fast one training step is on one device, without the loop around it: forward, backward, AdamW.

    python benchmarks/train_step.py            # on a GPU: Molmo2-4B, 4,096 tokens and 14 crops a row, bfloat16
    python benchmarks/train_step.py --tiny     # on any CPU: checks the script

FLOPs are counted as 6 x text parameters without the embedding look-up x tokens, plus 6 x parameters of the vision encoder x patches.
Every line is one JSON object; the first says what machine and versions these are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch
from shapes import model_config, pack, random_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rows", type=int, nargs="*", default=[1])
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.tiny else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps({"torch": torch.__version__, "device": name}), flush=True)
    config = model_config(arguments.tiny)
    model = random_model(config, device, torch.float32 if arguments.tiny else torch.bfloat16).train()
    model.apply_activation_checkpointing(arguments.recompute)
    if device.type == "cuda":
        model.apply_compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")
    vit = sum(p.numel() for p in model.get_vit_params())
    text = sum(p.numel() for p in model.parameters()) - vit - model.transformer.wte.embedding.numel()
    text += model.transformer.wte.embedding.numel() if config.llm.weight_tying else 0
    length, crops, image_tokens = (128, 2, 50) if arguments.tiny else (4096, 14, 392 + 2160)
    for rows in arguments.rows:
        batch = pack(config, np.random.RandomState(0), rows, length, crops, image_tokens)
        tensors = {key: torch.from_numpy(value).to(device) for key, value in batch.items()}
        times = []
        for _ in range(arguments.steps):
            start = time.perf_counter()
            loss = model(**tensors, return_logits=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value = loss.item()  # waits for the device
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times[3:])
        flops = 6 * text * rows * length + 6 * vit * batch["images"].shape[1] * rows * batch["images"].shape[2]
        line = {
            "rows": rows, "recompute": arguments.recompute, "loss": round(value, 4), "step_s": round(seconds, 4),
            "tokens_s": round(rows * length / seconds), "tflops": round(flops / seconds / 1e12, 1), "first_s": round(times[0], 1),
        }  # fmt: skip
        if device.type == "cuda":
            line["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
