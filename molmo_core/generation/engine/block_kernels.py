"""What is between the matrix products of a block, on a GPU, in Triton: one kernel each where plain torch has three to ten.

They round where `nn.RMSNorm`'s published form, `apply_rotary` and `fused_swiglu` round.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from molmo_core.generation.engine.paged import Stored


class RotaryTable(NamedTuple):
    """Of all positions that a model takes."""

    cos: torch.Tensor
    """float32 [positions, D / 2]; of both halves."""
    sin: torch.Tensor


@triton.jit
def _add_norm_kernel(x, branch, weight, out, EPS, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * WIDTH
    d = tl.arange(0, BLOCK)
    inside = d < WIDTH
    value = tl.load(x + row + d, mask=inside, other=0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(branch + row + d, mask=inside, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(x + row + d, value, mask=inside)
    y = value.to(tl.float32)
    y = (y * tl.rsqrt(tl.sum(y * y, 0) / WIDTH + EPS)).to(value.dtype)
    w = tl.load(weight + d, mask=inside, other=0.0)
    tl.store(out + row + d, (y.to(tl.float32) * w.to(tl.float32)).to(value.dtype), mask=inside)


def add_norm(x: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The root-mean-square norm of x [T, d], to which the branch [T, d] is added first, in place; all contiguous."""
    rows, width = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _add_norm_kernel[(rows,)](
        x, x if branch is None else branch, weight, out, eps, WIDTH=width, BLOCK=block, ADD=branch is not None,
        num_warps=8 if block > 2048 else 4,
    )  # fmt: skip
    return out


@triton.jit
def _rotate_kernel(
    qkv, q_weight, k_weight, cos, sin, positions, scale, keys, values, pages, offsets, EPS, last, row_stride, page_row, head_row,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, EACH: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * EACH
    h, d = first + tl.arange(0, EACH), tl.arange(0, HALF)
    at = qkv + row * row_stride + h[:, None] * (2 * HALF) + d[None, :]
    a, b = tl.load(at), tl.load(at + HALF)
    if first < HEADS + KV_HEADS:
        u, v = a.to(tl.float32), b.to(tl.float32)
        if NORM:
            factor = tl.rsqrt((tl.sum(u * u, 1) + tl.sum(v * v, 1)) / (2 * HALF) + EPS)[:, None]
            query = first < HEADS
            w_a = tl.where(query, tl.load(q_weight + d), tl.load(k_weight + d)).to(tl.float32)[None, :]
            w_b = tl.where(query, tl.load(q_weight + HALF + d), tl.load(k_weight + HALF + d)).to(tl.float32)[None, :]
            u = ((u * factor).to(a.dtype).to(tl.float32) * w_a).to(a.dtype).to(tl.float32)
            v = ((v * factor).to(a.dtype).to(tl.float32) * w_b).to(a.dtype).to(tl.float32)
        place = tl.minimum(tl.load(positions + row).to(tl.int64), last) * HALF
        c, s = tl.load(cos + place + d)[None, :], tl.load(sin + place + d)[None, :]
        a, b = (u * c - v * s).to(a.dtype), (v * c + u * s).to(a.dtype)
        tl.store(at, a)
        tl.store(at + HALF, b)
    elif SCALED:
        factor = tl.load(scale + row).to(a.dtype).to(tl.float32)
        a, b = (a.to(tl.float32) * factor).to(a.dtype), (b.to(tl.float32) * factor).to(a.dtype)
        tl.store(at, a)
        tl.store(at + HALF, b)
    if first >= HEADS:
        place = tl.load(pages + row) * page_row + tl.load(offsets + row) * (2 * HALF)
        if first < HEADS + KV_HEADS:
            to = keys + place + (h - HEADS)[:, None] * head_row + d[None, :]
            tl.store(to, a)
            tl.store(to + HALF, b)
        else:
            to = values + place + (h - HEADS - KV_HEADS)[:, None] * head_row + d[None, :]
            tl.store(to, a)
            tl.store(to + HALF, b)


def rotate_and_store(
    qkv: torch.Tensor, norms: tuple[torch.Tensor, torch.Tensor] | None, eps: float, rotary: RotaryTable, positions: torch.Tensor,
    scale: torch.Tensor | None, stored: Stored,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Norms and rotates queries and keys where they are, and copies keys and values to their pages.

    Args:
        qkv: [T, (H + 2 H_kv) D], contiguous, D a power of two.
        norms: weights [D] of queries and keys; None: no norm.
        eps: of the norms.
        rotary: of the layer.
        positions: integers [T], not negative; those behind the table are taken for its last.
        scale: float [T], factors of the values; None: 1.
        stored: where to.

    Returns:
        q [T, H, D], k, v [T, H_kv, D]: parts of qkv.
    """
    rows, width = qkv.shape
    kv_heads, size = stored.keys.shape[1], stored.keys.shape[3]
    heads = width // size - 2 * kv_heads
    each = 1
    while each < (8 if rows > 256 else 2) and heads % (2 * each) == kv_heads % (2 * each) == 0:
        each *= 2
    weights = norms or (qkv, qkv)
    _rotate_kernel[(rows, width // size // each)](
        qkv, *weights, *rotary, positions, qkv if scale is None else scale, *stored, eps, len(rotary.cos) - 1, qkv.stride(0),
        stored.keys.stride(0), stored.keys.stride(1), HEADS=heads, KV_HEADS=kv_heads, EACH=each, HALF=size // 2, NORM=norms is not None,
        SCALED=scale is not None, num_warps=1 if each < 4 else 2,
    )  # fmt: skip
    return qkv.view(rows, -1, size).split((heads, kv_heads, kv_heads), 1)  # type: ignore[return-value]


@triton.jit
def _swiglu_kernel(x, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < WIDTH
    up = tl.load(x + row * (2 * WIDTH) + d, mask=inside)
    gate = tl.load(x + row * (2 * WIDTH) + WIDTH + d, mask=inside).to(tl.float32)
    gate = (gate / (1 + tl.exp(-gate))).to(up.dtype).to(tl.float32)
    tl.store(out + row * WIDTH + d, (gate * up.to(tl.float32)).to(up.dtype), mask=inside)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """`fused_swiglu` of x [T, 2 I], contiguous; [T, I]."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(width))
    _swiglu_kernel[(rows, triton.cdiv(width, block))](x, out, WIDTH=width, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _open_kernel(
    packet, newest, embedding, new_embedding, x, pages, offsets, size,
    PAGE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    last = tl.load(packet + 2 * size + row) - 1
    tl.store(pages + row, tl.load(packet + (3 + last // PAGE) * size + row).to(tl.int64))
    tl.store(offsets + row, (last % PAGE).to(tl.int64))
    token = tl.load(newest + tl.load(packet + row))
    d = tl.arange(0, BLOCK)
    inside = d < WIDTH
    text = tl.load(embedding + token * WIDTH + d, mask=inside & (token < ROWS), other=0.0)
    special = tl.load(new_embedding + (token - ROWS) * WIDTH + d, mask=inside & (token >= ROWS), other=0.0)
    tl.store(x + row.to(tl.int64) * WIDTH + d, tl.where(token < ROWS, text, special), mask=inside)


def open_step(
    packet: torch.Tensor, newest: torch.Tensor, embedding: torch.Tensor, new_embedding: torch.Tensor, page: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a packet int32 [3 + pages, B] (see `DecodeState`) says.

    Returns:
        Embeddings [B, d] of the newest tokens, pages and offsets int64 [B] of where they go.
    """
    size, width = packet.shape[1], embedding.shape[1]
    x = torch.empty(size, width, dtype=embedding.dtype, device=packet.device)
    pages, offsets = torch.empty(2, size, dtype=torch.int64, device=packet.device)
    _open_kernel[(size,)](
        packet, newest, embedding, new_embedding, x, pages, offsets, size,
        PAGE=page, ROWS=len(embedding), WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return x, pages, offsets
