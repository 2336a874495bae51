"""How fast FlexAttention's kernels are with packed documents and pictures, by the form of the rule of who sees whom and by tiles.

    python benchmarks/flex_attention.py               # on a GPU: Molmo2-4B's rows, and short ones of a small model; each a compilation
    python benchmarks/flex_attention.py --sweep       # our rule with other tiles
    python benchmarks/flex_attention.py --tiny        # on any CPU: checks the script

One JSON line a case: milliseconds of a call, forward and backward (medians of ten), and how many blocks of 128 x 128 are looked at in part
and whole. `spelt out` is the rule as `SequenceLayout` tells it, on its int64 arrays; `ours` is `SequenceLayout.rule`. Errors are relative
to the dense mask's attention in float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from shapes import model_config, pack
from torch.nn.attention.flex_attention import flex_attention

from molmo_core.nn.attention import Rule, SequenceLayout, block_mask
from molmo_core.nn.sequence_layout import sequence_layout
from molmo_core.tokens import PACK_STRIDE

CASES = {
    "Molmo2-4B, 1 row": (1, 4096, 2552, 32, 8, 128),
    "Molmo2-4B, 2 rows": (2, 4096, 2552, 32, 8, 128),
    "SmolLM2-135M, 24 rows": (24, 640, 192, 9, 3, 64),
}
"""Rows, tokens, those of a picture, heads, heads of keys, their size."""
TINY = {"tiny": (2, 64, 16, 4, 2, 16)}
CALLS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("needs a GPU; --tiny checks the script")
    device = torch.device("cpu" if arguments.tiny else "cuda")
    name = "cpu" if arguments.tiny else torch.cuda.get_device_name()
    print(json.dumps({"torch": torch.__version__, "device": name}), flush=True)
    for case, sizes in (TINY if arguments.tiny else CASES).items():
        layout = layout_of(*sizes[:3], device)
        rules = {"ours": layout.rule()} if arguments.sweep else {"spelt out": spelt_out(layout), "ours": layout.rule()}
        for (kind, rule), options in itertools.product(rules.items(), tiles() if arguments.sweep else [{}]):
            print(json.dumps({"case": case, "rule": kind} | options | measure(layout, rule, sizes, options, device)), flush=True)


def layout_of(rows: int, length: int, image_tokens: int, device: torch.device) -> SequenceLayout:
    """Of rows of three documents, the picture in the first."""
    config = model_config(True)
    batch = pack(config, np.random.RandomState(0), rows, length, 0, 0)
    ids, segments = (torch.from_numpy(batch[name]).to(device) for name in ("input_ids", "subsegment_ids"))
    ids[:, 4 : 4 + image_tokens] = config.image_tokens.patch
    segments[:, : 8 + image_tokens] = segments[:, :1]
    return sequence_layout(ids, config.image_tokens, config.bi_directional_attn, torch.ones_like(ids, dtype=torch.bool), segments)


def spelt_out(layout: SequenceLayout) -> Rule:
    """The rule as it is told, pair by pair."""
    valid, segments, groups = layout.valid, layout.segments, layout.groups
    assert valid is not None
    assert segments is not None
    assert groups is not None

    def may_attend(b: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        both_ways = groups[b, q] == groups[b, k]
        if layout.questions is not None:
            both_ways = both_ways | (layout.questions[b, k] & (segments[b, q] // PACK_STRIDE == segments[b, k] // PACK_STRIDE))
        allowed = (k <= q) | ((groups[b, q] >= 0) & both_ways)
        return (allowed & (segments[b, q] <= segments[b, k]) & valid[b, q] & valid[b, k]) | (q == k)

    return may_attend


def tiles() -> Iterator[dict[str, int]]:
    """Settings of FlexAttention's kernels (`kernel_options`); those with a prefix are of one direction."""
    yield {}
    for m, n, warps in ((128, 64, 4), (128, 64, 8), (128, 128, 8), (64, 64, 4)):
        yield {"fwd_BLOCK_M": m, "fwd_BLOCK_N": n, "fwd_num_warps": warps}
    for small, large, warps, stages in ((32, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 3), (32, 128, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3)):
        blocks = {"bwd_BLOCK_M1": small, "bwd_BLOCK_N1": large, "bwd_BLOCK_M2": large, "bwd_BLOCK_N2": small}
        yield blocks | {"bwd_num_warps": warps, "bwd_num_stages": stages}


def measure(layout: SequenceLayout, rule: Rule, sizes: tuple[int, ...], options: dict[str, int], device: torch.device) -> dict[str, Any]:
    """Times of both directions; of settings that a kernel does not take, the reason."""
    rows, length, _, heads, key_heads, width = sizes
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(rows, n, length, width, device=device, dtype=dtype, requires_grad=device.type == "cuda")
        for n in (heads, key_heads, key_heads)
    )
    mask = block_mask(rule, rows, length, length, device)
    torch.compiler.reset()
    attention = flex_attention if device.type == "cpu" else torch.compile(flex_attention)

    def forward() -> Any:
        return attention(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options or None)

    share, dense = heads // key_heads, layout.dense_mask(rows, length, device=device)
    with torch.no_grad():
        keys, values = (x[:1].float().repeat_interleave(share, dim=1) for x in (k, v))
        exact = F.scaled_dot_product_attention(q[:1].float(), keys, values, dense[:1])
    found: dict[str, Any] = {"partial": int(mask.kv_num_blocks.sum()), "whole": 0}
    if mask.full_kv_num_blocks is not None:
        found["whole"] = int(mask.full_kv_num_blocks.sum())
    try:
        out = forward()
        found["error"] = float(f"{((out[:1].float() - exact).norm() / exact.norm()).item():.1e}")
        found["forward_ms"] = time_of(forward, device)
        if device.type == "cuda":
            gradient = torch.randn_like(out)
            found["backward_ms"] = time_of(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True), device)
    except Exception as error:  # Inductor has a class for each reason
        found["failed"] = str(error).splitlines()[0][:120]
    return found


def time_of(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds, the median."""
    times = []
    for _ in range(CALLS + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times[3:]) * 1000, 3)


if __name__ == "__main__":
    main()
