"""How fast linear layers are on a GPU, in bfloat16 and with weights in float8, for one row to many: Molmo2-4B's and Molmo-7B-D's shapes.

    python benchmarks/linear_layers.py                # bfloat16 beside float8, each as the engine calls it
    python benchmarks/linear_layers.py --sweep        # float8's kernels with other tiles, the five fastest of each

One JSON line a shape and number of rows. Times are microseconds of a call in a CUDA graph that goes through so many copies of the matrix
that no cache holds them, the shortest of five; `share` is what reading the matrix once at 3.0 TB/s would take, in those of the call;
`error` is relative to the exact product with the matrix before it was rounded (root mean square).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch

from molmo_core.nn import float8_kernels, row_kernel
from molmo_core.nn.float8 import Float8Linear
from molmo_core.nn.linear import Linear

BANDWIDTH = 3.0e12
COLD_BYTES = 400e6
"""Read in turn: several times an H100's cache."""
SHAPES = {
    "4B qkv": (6144, 2560), "4B o": (2560, 4096), "4B gate_up": (19456, 2560), "4B down": (2560, 9728),
    "7B qkv": (4608, 3584), "7B o": (3584, 3584), "7B gate_up": (37888, 3584), "7B down": (3584, 18944),
}  # fmt: skip
"""[out, in]"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU")
    print(json.dumps({"torch": torch.__version__, "device": torch.cuda.get_device_name()}), flush=True)
    for name in arguments.shapes:
        out, columns = SHAPES[name]
        torch.manual_seed(0)
        plain = [Linear(columns, out, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(copies(out * columns))]
        rounded = [Float8Linear(layer) for layer in plain]
        for rows in arguments.rows:
            x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
            if arguments.sweep:
                for settings in itertools.islice(sweep(rounded, x), 5):
                    print(json.dumps({"shape": name, "rows": rows} | settings), flush=True)
                continue
            with torch.inference_mode():
                exact = x.double() @ plain[0].weight.double().T
                line: dict[str, Any] = {"shape": name, "rows": rows}
                for kind, layers, width in (("bfloat16", plain, 2), ("float8", rounded, 1)):
                    microseconds = time_of(layers, x)
                    error = ((layers[0](x).double() - exact).norm() / exact.norm()).item()
                    share = out * columns * width / BANDWIDTH * 1e6 / microseconds
                    line[kind] = {"us": round(microseconds, 2), "share": round(share, 3), "error": round(error, 5)}
                del exact
            print(json.dumps(line | {"speedup": round(line["bfloat16"]["us"] / line["float8"]["us"], 2)}), flush=True)
        del plain, rounded
        torch.cuda.empty_cache()


def copies(numbers: int) -> int:
    return max(2, round(COLD_BYTES / numbers))


@torch.inference_mode()
def time_of(layers: list[Any], x: torch.Tensor) -> float:
    """Microseconds of a call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for layer in layers[:2]:
            layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            layer(x)
    graph.replay()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times) * 1000 / len(layers)


def sweep(layers: list[Float8Linear], x: torch.Tensor) -> list[dict[str, Any]]:
    """Tiles of the kernel for one row or for few, the fastest first, with what the engine takes beside them."""
    out = len(layers[0].weight)
    results: list[dict[str, Any]] = []

    def add(**tiles: Any) -> None:
        try:
            results.append({"us": round(time_of(layers, x), 2)} | tiles)
        except Exception as error:  # too much shared memory, or no such layout: one of the things to learn here
            results.append({"us": float("inf"), "error": f"{type(error).__name__}: {error}"[:200]} | tiles)

    add(tiles="as they are")
    if len(x) == 1:
        kept: Callable[..., Any] = row_kernel.tiles
        for rows_each, columns_each in itertools.product((1, 2, 4, 8, 16), (512, 1024, 2048)):
            row_kernel.tiles = lambda *_, tiles=(rows_each, columns_each): tiles
            if out % rows_each == 0 and rows_each * columns_each <= 16384:
                add(rows_each=rows_each, columns_each=columns_each)
        row_kernel.tiles = kept
    elif len(x) <= float8_kernels.MOST_ROWS:
        saved = float8_kernels.OUT_EACH, float8_kernels.COLUMNS_EACH, float8_kernels.parts_of
        for out_each, columns_each, parts in itertools.product((64, 128), (64, 128, 256), (1, 2, 4, 8, 16)):
            float8_kernels.OUT_EACH, float8_kernels.COLUMNS_EACH = out_each, columns_each
            float8_kernels.parts_of = lambda *_, parts=parts: parts
            if float8_kernels.fits(x, layers[0].weight):
                add(out_each=out_each, columns_each=columns_each, parts=parts)
        float8_kernels.OUT_EACH, float8_kernels.COLUMNS_EACH, float8_kernels.parts_of = saved
        kept_rows, float8_kernels.MOST_ROWS = float8_kernels.MOST_ROWS, 0
        add(tiles="a copy, and cuBLAS")
        float8_kernels.MOST_ROWS = kept_rows
    return sorted(results, key=lambda result: result["us"])


if __name__ == "__main__":
    main()
