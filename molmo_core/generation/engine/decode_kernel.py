"""Attention of one query a sequence over the pages of its cache, on a GPU: a split key/value kernel in Triton, then a sum of the parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _part_kernel(
    queries, keys, values, tables, lengths, maxima, sums, outs, result,
    q_row, page_row, head_row, table_row, table_column,
    SCALE: tl.constexpr, KV_HEADS: tl.constexpr, SHARE: tl.constexpr, SHARE_ROWS: tl.constexpr, WIDTH: tl.constexpr,
    PAGE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One part of the pages, of one key/value head of one sequence, for all query heads that share it."""
    row = tl.program_id(0) // KV_HEADS
    head = tl.program_id(0) % KV_HEADS
    part = tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    pages = tl.cdiv(length, PAGE)
    each = tl.cdiv(pages, PARTS)
    first, last = part * each, tl.minimum(part * each + each, pages)
    g, d, o = tl.arange(0, SHARE_ROWS), tl.arange(0, WIDTH), tl.arange(0, PAGE)
    real = (g < SHARE)[:, None]
    q = tl.load(queries + row * q_row + (head * SHARE + g)[:, None] * WIDTH + d[None, :], mask=real, other=0.0)
    top = tl.full([SHARE_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([SHARE_ROWS], tl.float32)
    acc = tl.zeros([SHARE_ROWS, WIDTH], tl.float32)
    inside = o[:, None] * WIDTH + d[None, :]
    for number in range(first, last):
        page = tl.load(tables + row * table_row + number * table_column).to(tl.int64)
        at = page * page_row + head * head_row + inside
        seen = number * PAGE + o < length
        k = tl.load(keys + at)
        scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * SCALE, -float("inf"))
        v = tl.load(values + at)
        v = tl.where(seen[:, None], v, 0.0)  # a page that is not full may hold anything
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2((scores - higher[:, None]) * 1.4426950408889634)
        shrink = tl.exp2((top - higher) * 1.4426950408889634)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        top = higher
    out = ((row * KV_HEADS + head) * PARTS + part) * SHARE + g
    if PARTS == 1:  # there is nothing to sum
        tl.store(result + out[:, None] * WIDTH + d[None, :], (acc / total[:, None]).to(result.dtype.element_ty), mask=real)
    else:
        tl.store(maxima + out, top, mask=g < SHARE)
        tl.store(sums + out, total, mask=g < SHARE)
        tl.store(outs + out[:, None] * WIDTH + d[None, :], acc, mask=real)


@triton.jit
def _sum_kernel(maxima, sums, outs, result, SHARE: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """The softmax over all parts, for one query head of one sequence."""
    at = tl.program_id(0)
    group, g = at // SHARE, at % SHARE
    parts, d = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    place = (group * PARTS + parts) * SHARE + g
    top = tl.load(maxima + place)
    weight = tl.exp2((top - tl.max(top, 0)) * 1.4426950408889634)
    total = tl.sum(tl.load(sums + place) * weight, 0)
    out = tl.sum(tl.load(outs + place[:, None] * WIDTH + d[None, :]) * weight[:, None], 0)
    tl.store(result + at * WIDTH + d, (out / total).to(result.dtype.element_ty))


def paged_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor, parts: int
) -> torch.Tensor:
    """Attention of the newest token of each sequence to all of its tokens.

    Args:
        q: [B, H, D], the heads of a row one after the other, D a power of two >= 16.
        keys, values: [pages, H_kv, page, D], contiguous; page a power of two >= 16.
        tables: int32 [B, most pages], the pages of each sequence; in any layout.
        lengths: int32 [B], its tokens (at least 1).
        parts: a power of two; so many programs share the pages of a sequence.

    Returns:
        [B, H, D], contiguous.
    """
    batch, heads, width = q.shape
    kv_heads, page = keys.shape[1:3]
    share = heads // kv_heads
    shape = (batch * kv_heads, parts, share) if parts > 1 else (0, 0, 0)
    maxima = torch.empty(shape, device=q.device, dtype=torch.float32)
    sums = torch.empty_like(maxima)
    outs = torch.empty(*shape, width, device=q.device, dtype=torch.float32)
    result = torch.empty(batch, heads, width, dtype=q.dtype, device=q.device)
    _part_kernel[(batch * kv_heads, parts)](
        q, keys, values, tables, lengths, maxima, sums, outs, result, q.stride(0), keys.stride(0), keys.stride(1), *tables.stride(),
        SCALE=width**-0.5, KV_HEADS=kv_heads, SHARE=share,
        SHARE_ROWS=max(16, triton.next_power_of_2(share)), WIDTH=width, PAGE=page, PARTS=parts,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    if parts > 1:
        _sum_kernel[(batch * heads,)](maxima, sums, outs, result, SHARE=share, WIDTH=width, PARTS=parts, num_warps=4)
    return result
