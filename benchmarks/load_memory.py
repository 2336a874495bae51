"""Peak memory of loading a checkpoint, as a multiple of the loaded model.

    python benchmarks/load_memory.py            # random checkpoints of 1B parameters; needs about 6 GB of disk for a minute
    python benchmarks/load_memory.py --tiny     # checks the script

Every load runs in a process of its own; what the process holds before (Python, torch, this project) is subtracted from its
peak resident size. `ratio` is that peak over the size of the loaded tensors: 1.0 would be a load without any buffer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch

from molmo_core.checkpoint import from_pretrained
from molmo_core.checkpoint.layouts import Layout, published_links
from molmo_core.checkpoint.links import export_specs, model_tensors, same_names
from molmo_core.checkpoint.published_export import write_published_files
from molmo_core.checkpoint.safetensors_stream import write_safetensors
from molmo_core.models.molmo2 import Molmo2Config
from molmo_core.nn.configs import VIT_PRESETS
from molmo_core.preprocessing.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "tests/golden/tokenizer"
LIMIT = 1.2
# layout, stored as, loaded as
CASES: tuple[tuple[Layout | Literal["native"], torch.dtype, torch.dtype], ...] = (
    ("molmo2", torch.bfloat16, torch.bfloat16),
    ("molmo2", torch.float32, torch.bfloat16),
    ("molmo2_modules", torch.bfloat16, torch.bfloat16),
    ("native", torch.bfloat16, torch.bfloat16),
)


def model_config(tiny: bool) -> Molmo2Config:
    """1.0 billion parameters; the tensors that are joined or cut on the way are the usual share of it."""
    width, layers, rows = (64, 2, 512) if tiny else (2048, 7, 32768)
    data: dict[str, Any] = {
        "llm": {
            "d_model": width, "n_heads": 16, "n_kv_heads": 8, "n_layers": layers, "mlp_hidden_size": 8 * width, "vocab_size": rows,
            "embedding_size": rows, "attention_layer_norm": True, "attention_layer_norm_type": "qwen3",
            "tokenizer": {"identifier": str(TOKENIZER)},
        },
        "vision_backbone": {"vit": VIT_PRESETS["siglip2"] | ({"image_num_layers": 9} if tiny else {}), "pooling_attention_mask": True},
    }  # fmt: skip
    return Molmo2Config.from_dict(data)


def write_checkpoint(folder: Path, config: Molmo2Config, layout: Layout | Literal["native"], dtype: torch.dtype) -> int:
    """Random tensors, one at a time; returns the number of parameters."""
    with torch.device("meta"):
        tensors = model_tensors(config.build_model())
    if layout == "native":
        config.save(folder / "config.yaml")
        links = same_names(tensors)
    else:
        write_published_files(folder, config, "molmo2", Tokenizer.load(TOKENIZER), str(dtype).removeprefix("torch."))
        links = published_links(layout, tensors, config.llm)
    specs = export_specs(tensors, links, dtype)
    write_safetensors(folder, specs, lambda name: torch.randn(specs[name].shape), max_shard_bytes=10**9)
    return sum(tensor.numel() for tensor in tensors.values())


def measure(folder: str, dtype: str) -> dict[str, float]:
    """Loads in this process."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = memory("VmRSS")
    start = time.perf_counter()
    model = from_pretrained(folder, dtype=dtype)
    seconds = time.perf_counter() - start
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    used = memory("VmHWM") - before
    return {"model_mb": size / 1e6, "peak_mb": used / 1e6, "ratio": used / size, "seconds": seconds}


def memory(field: str) -> int:
    """A size from /proc/self/status (Linux), bytes: VmRSS = resident now, VmHWM = its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model: checks the script, its ratios mean nothing")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    results = []
    for layout, stored, loaded in CASES:
        with tempfile.TemporaryDirectory() as folder:
            parameters = write_checkpoint(Path(folder), model_config(arguments.tiny), layout, stored)
            command = [sys.executable, __file__, "--measure", folder, str(loaded).removeprefix("torch.")]
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        names = {"layout": layout, "parameters": parameters, "stored": str(stored)[6:], "loaded": str(loaded)[6:]}
        results.append(names | {key: round(value, 3) for key, value in json.loads(output.stdout).items()})
        print(json.dumps(results[-1]))
    worst = max(result["ratio"] for result in results)
    if not arguments.tiny:
        print(f"worst ratio {worst:.2f}, allowed {LIMIT}: {'ok' if worst <= LIMIT else 'TOO MUCH'}")


if __name__ == "__main__":
    main()
