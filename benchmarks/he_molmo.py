"""What HeMolmo's token selection saves: prefill time and memory against Molmo on the same image, at the shapes of a 7B model.

    python benchmarks/he_molmo.py            # on a GPU: Qwen2-7B and SigLIP shapes, random weights, bfloat16
    python benchmarks/he_molmo.py --tiny     # on any CPU: checks the script

Each row is one model. Prefill is everything from uint8 patches to the next token's logits; `tflop` counts its matrix products.
`two passes` is HeMolmo as published: the first pass is thrown away once it has scored. `HeMolmo` is what this project does without
gradients: the second pass goes on from the keys and values of the first, so every token goes through every layer once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from molmo_core.inputs import Inputs
from molmo_core.models.he_molmo import HeMolmo, HeMolmoConfig
from molmo_core.models.molmo import Molmo, MolmoConfig
from molmo_core.nn.kv_cache import KVCache
from molmo_core.preprocessing.he_layout import he_layout
from molmo_core.preprocessing.image_tokens import image_tokens
from molmo_core.preprocessing.tiling import image_tiling, pooled_patches, token_grids
from molmo_core.tokens import ImageTokenIds

ROOT = Path(__file__).resolve().parents[1]
QUESTION = 32
"""Text tokens before the image."""
ANSWER_PROMPT = 4


class TwoPassHeMolmo(HeMolmo):
    """The published way: the second pass starts from scratch."""

    def may_reuse_first_pass(self, inputs: Inputs) -> bool:
        return False


def special_ids(tokens: ImageTokenIds) -> SimpleNamespace:
    """The ids by the names that the layouts use."""
    return SimpleNamespace(
        image_start_token_id=tokens.start,
        image_end_token_id=tokens.end,
        image_patch_token_id=tokens.patch,
        image_col_token_id=tokens.col,
        image_low_token_id=tokens.low,
        low_res_image_start_token_id=tokens.low_res_start,
    )


def batch_of(config: MolmoConfig, size: tuple[int, int], rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`rows` prompts about random images of `size` (height, width): question, image, start of the answer."""
    settings, ids = config.image_settings(), special_ids(config.image_tokens)
    tiling = image_tiling(*size, settings)
    if isinstance(config, HeMolmoConfig):
        _, options = config.preprocessor_kind()
        layout = he_layout(tiling, settings, config.mm_preprocessor, ids, **options)
        tokens, positions, arrays = torch.from_numpy(layout.ids), torch.from_numpy(layout.positions), layout.arrays
    else:
        tokens = torch.from_numpy(image_tokens(token_grids(tiling, settings), ids, settings))
        positions, arrays = torch.arange(len(tokens)), {"pooled_patches_idx": pooled_patches(tiling, settings).copy()}
    words = torch.randint(0, config.llm.vocab_size, (QUESTION + ANSWER_PROMPT,))
    end = QUESTION + int(positions.max()) + 1
    inputs = {
        "input_ids": torch.cat([words[:QUESTION], tokens, words[QUESTION:]]),
        "position_ids": torch.cat([torch.arange(QUESTION), QUESTION + positions, torch.arange(end, end + ANSWER_PROMPT)]),
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
    }
    crops = 1 + (tiling.rows * tiling.cols if tiling else 0)
    batch = {name: value[None].repeat(rows, *[1] * value.dim()).to(device) for name, value in inputs.items()}
    shape = (rows, crops, settings.patches_per_crop, settings.patch_size**2 * 3)
    return batch | {"images": torch.randint(0, 256, shape, dtype=torch.uint8, device=device)}


def measure(run: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, float]:
    """Median seconds of a call, and peak memory above what was held before, MiB (0 on a CPU)."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(3 if device.type == "cuda" else 1):
        once()
    if device.type != "cuda":
        return statistics.median(once() for _ in range(repeats)), 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = statistics.median(once() for _ in range(repeats))
    return seconds, (torch.cuda.max_memory_allocated() - before) / 2**20


@torch.inference_mode()
def row(name: str, model: Molmo, size: tuple[int, int], rows: int, repeats: int) -> dict[str, Any]:
    """One line of the report."""
    device = model.device
    batch = batch_of(model.config, size, rows, device)
    length = batch["input_ids"].shape[1]

    def prefill() -> None:
        model(**batch, past_key_values=KVCache(length), use_cache=True, last_logits_only=True)

    with FlopCounterMode(display=False) as counter:
        prefill()
    seconds, memory = measure(prefill, device, repeats)
    index = [batch[k] for k in ("low_res_tokens_idx", "high_res_tokens_idx", "pooled_patches_idx") if k in batch]
    vision, _ = measure(lambda: model.vision_backbone(batch["images"], None, *index), device, repeats)  # type: ignore[misc]
    llm = model.config.llm
    cache = 2 * rows * length * llm.n_layers * llm.kv_heads * llm.head_width * model.transformer.wte.embedding.element_size()
    return {
        "model": name, "batch": rows, "crops": batch["images"].shape[1], "tokens": length,
        "tflop": float(f"{counter.get_total_flops() / 1e12:.4g}"), "prefill_ms": round(seconds * 1e3, 2),
        "vision_ms": round(vision * 1e3, 2), "peak_mib": round(memory, 1), "kv_cache_mib": round(cache / 2**20, 2),
    }  # fmt: skip


def build(kind: type[Molmo], config: MolmoConfig, device: torch.device, dtype: torch.dtype) -> Molmo:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with device:
        model = kind(config)
    torch.set_default_dtype(default)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a few thousand parameters, for a check of the script")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    device = torch.device("cpu" if args.tiny or not torch.cuda.is_available() else "cuda")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    path = ROOT / ("tests/golden/he-molmo/config.yaml" if args.tiny else "configs/models/he-molmo.yaml")
    scenes = [((70, 110), 6)] if args.tiny else [((768, 1024), 8), ((1080, 1920), 24)]
    print(json.dumps({"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__}), flush=True)

    def he(max_crops: int, layers: int | None) -> HeMolmoConfig:
        overrides = [
            f"selection_ratio={args.ratio}",
            "mm_preprocessor.num_high_res_features=null",
            f"mm_preprocessor.max_crops={max_crops}",
        ]
        return HeMolmoConfig.load(path, [*overrides, f"token_scorer.n_low_res_layers={layers or 'null'}"])

    layers = he(1, None).llm.n_layers
    kinds: list[tuple[str, type[Molmo], int | None]] = [
        ("Molmo", Molmo, None),
        ("HeMolmo, two passes, all layers", TwoPassHeMolmo, None),
        (f"HeMolmo, two passes, {layers // 4 or 1} layers", TwoPassHeMolmo, layers // 4 or 1),
        ("HeMolmo", HeMolmo, None),
    ]
    results: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for name, kind, low_layers in kinds:
        model = None
        for (size, max_crops), rows in ((scene, rows) for scene in scenes for rows in args.batch):
            config: MolmoConfig = he(max_crops, low_layers)
            if kind is Molmo:
                shared = {"llm": config.llm, "vision_backbone": config.vision_backbone}
                media = {"max_crops": max_crops, "overlap_margins": config.mm_preprocessor.overlap_margins}
                config = MolmoConfig.new(**shared, mm_preprocessor=media)  # causal, as published
            model = model or build(kind, config, device, dtype)
            model.config = config
            found = row(name, model, size, rows, args.repeats)
            base = results.setdefault((max_crops, rows), [found])[0]
            found["less_work"] = round(base["tflop"] / found["tflop"], 2)
            found["speedup"] = round(base["prefill_ms"] / found["prefill_ms"], 2)
            found["without_vision"] = round((base["prefill_ms"] - base["vision_ms"]) / (found["prefill_ms"] - found["vision_ms"]), 2)
            print(json.dumps(found), flush=True)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
