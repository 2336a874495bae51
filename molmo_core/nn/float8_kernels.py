"""Products with a matrix in float8 on a GPU, in Triton: its numbers become those of the other factor's dtype in registers.

One row is multiplied by `row_kernel`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MOST_ROWS = 256
"""More are multiplied faster by cuBLAS, with the matrix in their dtype (`dequantise`)."""
OUT_EACH = 64
"""Rows of the matrix of a program: what a warp group multiplies at a time on Hopper."""
COLUMNS_EACH = 128
"""Columns that are read at a time."""
PROGRAMS = 256
"""So many keep all multiprocessors of an H100 (132) reading."""


@triton.jit
def _multiply_kernel(
    x, weight, scales, partial, out, rows, OUT: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS_EACH: tl.constexpr, OUT_EACH: tl.constexpr, COLUMNS_EACH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One part of the columns, for some rows of both. The matrix is the left factor, which tensor cores take from registers."""
    row = tl.program_id(0) * ROWS_EACH + tl.arange(0, ROWS_EACH)
    n = tl.program_id(1) * OUT_EACH + tl.arange(0, OUT_EACH)
    part = tl.program_id(2)
    column = tl.arange(0, COLUMNS_EACH)
    inside = row < rows
    at = weight + n[:, None].to(tl.int64) * COLUMNS + column[None, :]
    beside = x + row[None, :] * COLUMNS + column[:, None]
    each = (COLUMNS // COLUMNS_EACH + PARTS - 1) // PARTS
    acc = tl.zeros([OUT_EACH, ROWS_EACH], tl.float32)
    for number in range(part * each, tl.minimum(part * each + each, COLUMNS // COLUMNS_EACH)):
        w = tl.load(at + number * COLUMNS_EACH)
        v = tl.load(beside + number * COLUMNS_EACH, mask=inside[None, :], other=0.0)
        acc = tl.dot(w.to(tl.float32).to(v.dtype), v, acc)  # straight to bfloat16 is an instruction of a quarter of the speed
    to = row[None, :] * OUT + n[:, None]
    if PARTS == 1:  # there is nothing to sum
        acc *= tl.load(scales + n)[:, None]
        tl.store(out + to, acc.to(out.dtype.element_ty), mask=inside[None, :])
    else:
        tl.store(partial + part * rows * OUT + to, acc, mask=inside[None, :])


@triton.jit
def _sum_kernel(partial, scales, out, size, OUT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the parts, always in the same order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(partial + part * size + at, mask=inside, other=0.0)
    total *= tl.load(scales + at % OUT, mask=inside, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dequantise_kernel(weight, scales, out, rows, COLUMNS: tl.constexpr, ROWS_EACH: tl.constexpr, COLUMNS_EACH: tl.constexpr):
    row = tl.program_id(0) * ROWS_EACH + tl.arange(0, ROWS_EACH)
    column = tl.program_id(1) * COLUMNS_EACH + tl.arange(0, COLUMNS_EACH)
    inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    at = row[:, None].to(tl.int64) * COLUMNS + column[None, :]
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) * tl.load(scales + row, mask=row < rows, other=0.0)[:, None]
    tl.store(out + at, w.to(out.dtype.element_ty), mask=inside)


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `multiply` takes these, [T, in] and [out, in], and is the faster way."""
    out, columns = weight.shape
    return x.dtype in (torch.bfloat16, torch.float16) and len(x) <= MOST_ROWS and out % OUT_EACH == 0 and columns % COLUMNS_EACH == 0


def parts_of(programs: int, blocks: int) -> int:
    """In how many parts the columns are read, if there are so many programs otherwise: each of at least four of the blocks of columns."""
    parts = 1
    while parts < 8 and programs * parts < PROGRAMS and blocks >= 8 * parts:
        parts *= 2
    return parts


def multiply(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x · (scales · weight)ᵀ, summed in float32.

    Args:
        x: [T, in], contiguous, bfloat16 or float16.
        weight: float8_e4m3fn [out, in], contiguous.
        scales: float32 [out].

    Returns:
        [T, out] in the dtype of x.
    """
    rows, (width, columns) = len(x), weight.shape
    rows_each = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
    tiles, blocks = triton.cdiv(rows, rows_each), columns // COLUMNS_EACH
    parts = parts_of(tiles * (width // OUT_EACH), blocks)
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    partial = torch.empty((parts, rows, width) if parts > 1 else 0, dtype=torch.float32, device=x.device)
    _multiply_kernel[(tiles, width // OUT_EACH, parts)](
        x, weight, scales, partial, out, rows, OUT=width, COLUMNS=columns,
        ROWS_EACH=rows_each, OUT_EACH=OUT_EACH, COLUMNS_EACH=COLUMNS_EACH, PARTS=parts, num_warps=4, num_stages=4 if rows_each < 64 else 3,
    )  # fmt: skip
    if parts > 1:
        size = rows * width
        _sum_kernel[(triton.cdiv(size, 1024),)](partial, scales, out, size, OUT=width, PARTS=parts, BLOCK=1024, num_warps=4)
    return out


def dequantise(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """scales float32 [out] · weight float8_e4m3fn [out, in], contiguous; in another dtype."""
    rows, columns = weight.shape
    out = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    grid = (triton.cdiv(rows, 8), triton.cdiv(columns, 512))
    _dequantise_kernel[grid](weight, scales, out, rows, COLUMNS=columns, ROWS_EACH=8, COLUMNS_EACH=512, num_warps=4)
    return out
