"""A vector times a matrix on a GPU, in Triton: bound by reading the matrix once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LARGEST = 100_000
"""Matrices with more rows (output heads) are as fast in cuBLAS."""


@triton.jit
def _kernel(
    x, weight, scales, out,
    COLUMNS: tl.constexpr, ROWS_EACH: tl.constexpr, COLUMNS_EACH: tl.constexpr, WHOLE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS_EACH + tl.arange(0, ROWS_EACH)
    columns = tl.arange(0, COLUMNS_EACH)
    at = weight + rows[:, None].to(tl.int64) * COLUMNS + columns[None, :]
    acc = tl.zeros([ROWS_EACH, COLUMNS_EACH], tl.float32)
    for start in range(0, COLUMNS, COLUMNS_EACH):
        if WHOLE:
            w = tl.load(at + start, eviction_policy="evict_first").to(tl.float32)
            v = tl.load(x + start + columns).to(tl.float32)
        else:
            inside = start + columns < COLUMNS
            w = tl.load(at + start, mask=inside[None, :], other=0.0, eviction_policy="evict_first").to(tl.float32)
            v = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
        acc += w * v[None, :]
    total = tl.sum(acc, 1)
    if SCALED:
        total *= tl.load(scales + rows)
    tl.store(out + rows, total.to(out.dtype.element_ty))


def tiles(rows: int, columns: int, bytes_each: int = 2) -> tuple[int, int]:
    """Rows and columns of the matrix that a program reads at a time; small matrices are cut finer, so that all multiprocessors read.

    Of one byte a number twice as many, so that as many bytes are on their way; there the last columns may be fewer.
    """
    if bytes_each == 1:
        return (4, 1024) if rows < 4096 else (8, 1024 if columns % 1024 == 0 else 512)
    wide = 1024 if columns % 1024 == 0 and rows < 4096 else 512
    return (2 if wide == 1024 else 4 if rows < 4096 else 8), wide


def fits(weight: torch.Tensor) -> bool:
    """Whether `multiply` takes this matrix [out, in]."""
    rows, columns = weight.shape
    rows_each, columns_each = tiles(rows, columns, weight.itemsize)
    if weight.dtype == torch.float8_e4m3fn:
        return rows % rows_each == 0 and columns % 16 == 0
    return weight.dtype in (torch.bfloat16, torch.float16) and rows <= LARGEST and rows % rows_each == 0 and columns % columns_each == 0


def multiply(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    """weight [out, in] times x [in], summed in float32; [out] in the dtype of x.

    `scales`: float32 [out], factors of the rows of a weight in float8.
    """
    rows, columns = weight.shape
    rows_each, columns_each = tiles(rows, columns, weight.itemsize)
    out = torch.empty(rows, dtype=x.dtype, device=x.device)
    _kernel[(rows // rows_each,)](
        x, weight, x if scales is None else scales, out, COLUMNS=columns, ROWS_EACH=rows_each, COLUMNS_EACH=columns_each,
        WHOLE=columns % columns_each == 0, SCALED=scales is not None, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
