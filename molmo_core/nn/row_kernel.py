"""A vector times a matrix on a GPU, in Triton: bound by reading the matrix once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LARGEST = 100_000
"""Matrices with more rows (output heads) are as fast in cuBLAS."""


@triton.jit
def _kernel(x, weight, out, COLUMNS: tl.constexpr, ROWS_EACH: tl.constexpr, COLUMNS_EACH: tl.constexpr):
    rows = tl.program_id(0) * ROWS_EACH + tl.arange(0, ROWS_EACH)
    columns = tl.arange(0, COLUMNS_EACH)
    at = weight + rows[:, None].to(tl.int64) * COLUMNS + columns[None, :]
    acc = tl.zeros([ROWS_EACH, COLUMNS_EACH], tl.float32)
    for start in range(0, COLUMNS, COLUMNS_EACH):
        w = tl.load(at + start, eviction_policy="evict_first").to(tl.float32)
        acc += w * tl.load(x + start + columns).to(tl.float32)[None, :]
    tl.store(out + rows, tl.sum(acc, 1).to(out.dtype.element_ty))


def tiles(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of the matrix that a program reads at a time; small matrices are cut finer, so that all multiprocessors read."""
    wide = 1024 if columns % 1024 == 0 and rows < 4096 else 512
    return (2 if wide == 1024 else 4 if rows < 4096 else 8), wide


def fits(weight: torch.Tensor) -> bool:
    """Whether `multiply` takes this matrix [out, in]."""
    rows, columns = weight.shape
    rows_each, columns_each = tiles(rows, columns)
    return weight.dtype in (torch.bfloat16, torch.float16) and rows <= LARGEST and rows % rows_each == 0 and columns % columns_each == 0


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight [out, in] times x [in], summed in float32; [out] in their dtype."""
    rows, columns = weight.shape
    rows_each, columns_each = tiles(rows, columns)
    out = torch.empty(rows, dtype=x.dtype, device=x.device)
    _kernel[(rows // rows_each,)](
        x, weight, out, COLUMNS=columns, ROWS_EACH=rows_each, COLUMNS_EACH=columns_each, num_warps=4, num_stages=2
    )
    return out
