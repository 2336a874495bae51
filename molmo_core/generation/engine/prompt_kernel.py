"""Attention of the tokens of prompts over the pages of their sequences, on a GPU: one kernel in Triton for all prompts of a step."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

ROWS = 128
"""Queries of a program."""
KEYS = 64
"""Keys that a program looks at in one go."""


class PromptTables(NamedTuple):
    """Where the queries of a step are, and what they see; on the device."""

    blocks: torch.Tensor
    """int32 [programs, 6], for each run of at most `ROWS` queries: the row of its table, its first row, how many, the place of the
    first in its sequence, one behind the last place that any of them sees, and the first place that is computed in this step."""
    tables: torch.Tensor
    """int32 [sequences, n]: the pages of each."""
    flags: torch.Tensor
    """int32 [T]: of every token of the step, see `Prompt.flags`."""


@triton.jit
def _softmax_step(q, k, v, seen, top, total, acc, FACTOR: tl.constexpr):
    """One more block of keys and values."""
    scores = tl.dot(q, tl.trans(k)) * FACTOR
    if seen is not None:
        scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(top - higher)
    return higher, total * shrink + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, acc * shrink[:, None])


@triton.jit
def _prompt_kernel(
    queries, own_keys, own_values, keys, values, out, blocks, tables, flags,
    q_head, q_row, k_head, k_row, v_head, v_row, out_row, page_row, head_row, table_row,
    SCALE: tl.constexpr, SHARE: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    TWO_WAYS: tl.constexpr,
):  # fmt: skip
    block = blocks + tl.program_id(0) * 6
    head = tl.program_id(1)
    kv_head = head // SHARE
    table = tables + tl.load(block) * table_row
    row, count = tl.load(block + 1), tl.load(block + 2)
    place, limit, first = tl.load(block + 3), tl.load(block + 4), tl.load(block + 5)
    m, d, o, n = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, PAGE), tl.arange(0, KEYS)
    real = m < count
    rows = (row + m).to(tl.int64)
    q = tl.load(queries + head * q_head + rows[:, None] * q_row + d[None, :], mask=real[:, None], other=0.0)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    FACTOR: tl.constexpr = SCALE * 1.4426950408889634
    # What was computed in earlier steps is in pages, and everybody sees it: prompts are cut where nobody looks ahead.
    inside = kv_head * head_row + o[:, None] * WIDTH + d[None, :]
    for number in range(0, tl.cdiv(first, PAGE)):
        at = tl.load(table + number).to(tl.int64) * page_row + inside
        before = number * PAGE + o < first
        v = tl.where(before[:, None], tl.load(values + at), 0.0)  # a page that is not full may hold anything
        top, total, acc = _softmax_step(q, tl.load(keys + at), v, before[None, :], top, total, acc, FACTOR)
    # This step's tokens are rows of k and v; `own`: how many of them the first query sees, itself included.
    start, own, all_own = (row - place + first).to(tl.int64), place - first + 1, limit - first
    k_at = own_keys + kv_head * k_head + (start + n)[:, None] * k_row + d[None, :]
    v_at = own_values + kv_head * v_head + (start + n)[:, None] * v_row + d[None, :]
    whole = own // KEYS * KEYS  # keys that all of these queries see
    for at in range(0, whole, KEYS):
        k, v = tl.load(k_at + at * k_row), tl.load(v_at + at * v_row)
        top, total, acc = _softmax_step(q, k, v, None, top, total, acc, FACTOR)
    if TWO_WAYS:
        group = tl.load(flags + rows, mask=real, other=-2) >> 1
    for at in range(whole, all_own, KEYS):
        inner = at + n < all_own
        seen = (at + n)[None, :] < own + m[:, None]
        if TWO_WAYS:
            flag = tl.load(flags + start + at + n, mask=inner, other=-2)
            meet = (group[:, None] == (flag >> 1)[None, :]) | ((flag & 1) != 0)[None, :]
            seen = seen | ((group >= 0)[:, None] & meet)
        k = tl.load(k_at + at * k_row, mask=inner[:, None], other=0.0)
        v = tl.load(v_at + at * v_row, mask=inner[:, None], other=0.0)
        top, total, acc = _softmax_step(q, k, v, seen & inner[None, :], top, total, acc, FACTOR)
    to = out + rows[:, None] * out_row + head * WIDTH + d[None, :]
    tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])


def prompt_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: PromptTables, two_ways: bool
) -> torch.Tensor:
    """Attention of the tokens of a step to the tokens of their sequences that they see.

    Args:
        q: [1, H, T, D], the last axis contiguous, D a power of two >= 16; rows that no block has get 0.
        k, v: [1, H_kv, T, D] of the same tokens, the last axis contiguous.
        keys, values: [pages, H_kv, page, D], contiguous, of earlier tokens; page a power of two >= 16.
        tables: who sees what.
        two_ways: some tokens see ahead.

    Returns:
        [1, H, T, D], as q; in memory [T, H, D].
    """
    _, heads, rows, width = q.shape
    out = torch.zeros(rows, heads, width, dtype=q.dtype, device=q.device)
    _prompt_kernel[(len(tables.blocks), heads)](
        q, k, v, keys, values, out, tables.blocks, tables.tables, tables.flags,
        q.stride(1), q.stride(2), k.stride(1), k.stride(2), v.stride(1), v.stride(2), out.stride(0),
        keys.stride(0), keys.stride(1), tables.tables.stride(0),
        SCALE=width**-0.5, SHARE=heads // keys.shape[1], WIDTH=width, PAGE=keys.shape[2], ROWS=ROWS, KEYS=KEYS, TWO_WAYS=two_ways,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return out.transpose(0, 1)[None]


@triton.jit
def _write_kernel(
    own_keys, own_values, keys, values, pages, offsets, k_head, k_row, v_head, v_row, page_row, head_row,
    HEADS: tl.constexpr, HEAD_ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, HEAD_ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    to = tl.load(pages + row) * page_row + h * head_row + tl.load(offsets + row) * WIDTH + d
    real = h < HEADS
    tl.store(keys + to, tl.load(own_keys + h * k_head + row * k_row + d, mask=real), mask=real)
    tl.store(values + to, tl.load(own_values + h * v_head + row * v_row + d, mask=real), mask=real)


def write_pages(
    k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: torch.Tensor, offsets: torch.Tensor
) -> None:
    """Stores k, v [1, H_kv, T, D] (see `prompt_attention`) at (page, offset), int64 [1, T]."""
    heads, width = keys.shape[1], keys.shape[3]
    _write_kernel[(k.shape[2],)](
        k, v, keys, values, pages, offsets, k.stride(1), k.stride(2), v.stride(1), v.stride(2), keys.stride(0), keys.stride(1),
        HEADS=heads, HEAD_ROWS=triton.next_power_of_2(heads), WIDTH=width, num_warps=4,
    )  # fmt: skip
