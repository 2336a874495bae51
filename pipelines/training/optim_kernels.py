"""What an optimiser does to all parameters, in one launch: AdamW with stochastic rounding, and sums of squares.

A launch for each of some 700 parameters would keep the host longer than the device. Here a table has the addresses of all of them, and
every program works on one chunk of one parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from molmo_core.nn.host import to_device

CHUNK = 4096


class Chunks:
    """Chunks of parameters of some sizes, on the device."""

    def __init__(self, sizes: Sequence[int], device: torch.device):
        counts = torch.tensor([triton.cdiv(size, CHUNK) for size in sizes])
        owner = torch.repeat_interleave(torch.arange(len(sizes)), counts)
        first = (counts.cumsum(0) - counts)[owner]
        self.count = len(owner)
        self.counts: list[int] = counts.tolist()
        """Of each parameter."""
        self.owner = to_device(owner.int(), device)
        """int32 [count]: the parameter of each chunk."""
        self.number = to_device((torch.arange(self.count) - first).int(), device)
        """int32 [count]: which of its chunks it is."""


def table(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, bool]:
    """Addresses and sizes (the last of each row) on the device, int64 [n, m], and whether all addresses are multiples of 16."""
    host = torch.tensor(rows)
    return to_device(host, device), not bool((host[:, :-1] % 16).any())


def squared_sums(gradients: Sequence[torch.Tensor], chunks: Chunks) -> torch.Tensor:
    """Σ x² of each chunk, float32 [count]; of contiguous tensors of one dtype, bfloat16 or float32."""
    device = gradients[0].device
    addresses, aligned = table([(g.data_ptr(), g.numel()) for g in gradients], device)
    sums = torch.empty(chunks.count, dtype=torch.float32, device=device)
    _squares[(chunks.count,)](
        addresses, chunks.owner, chunks.number, sums, gradients[0].dtype == torch.bfloat16, aligned, CHUNK, num_warps=4
    )
    return sums


def adamw(addresses: torch.Tensor, aligned: bool, chunks: Chunks, numbers: torch.Tensor, seeds: torch.Tensor, bf16_moments: bool) -> None:
    """One step of all parameters (`pipelines.training.adamw.update`).

    Args:
        addresses, aligned: `table` of weights, gradients (both bfloat16), first and second moments, sizes.
        chunks: of the parameters.
        numbers: float32 [n, 8], see `update`.
        seeds: int32 [n, 2], see `update`.
        bf16_moments: the moments are bfloat16, else float32.
    """
    _adamw[(chunks.count,)](addresses, chunks.owner, chunks.number, numbers, seeds, bf16_moments, aligned, CHUNK, num_warps=8)


@triton.jit
def _pointers(address, offsets, BF16: tl.constexpr, ALIGNED: tl.constexpr):
    """To numbers of a tensor; bfloat16 ones as the upper half of a float32 number."""
    if BF16:
        pointer = address.to(tl.pointer_type(tl.uint16))
    else:
        pointer = address.to(tl.pointer_type(tl.float32))
    pointer += offsets
    if ALIGNED:  # eight numbers at a time
        pointer = tl.max_contiguous(tl.multiple_of(pointer, 16), 8)
    return pointer


@triton.jit
def _read(pointers, size, offsets, WHOLE: tl.constexpr, BF16: tl.constexpr):
    """As float32. A mask, which only the last chunk of a parameter needs, would split the reads."""
    value = tl.load(pointers) if WHOLE else tl.load(pointers, mask=offsets < size, other=0)
    return (value.to(tl.uint32) << 16).to(tl.float32, bitcast=True) if BF16 else value


@triton.jit
def _write(pointers, size, offsets, value, bits, WHOLE: tl.constexpr, BF16: tl.constexpr):
    """Rounds stochastically by the low 16 bits where the tensor is bfloat16."""
    if BF16:
        raw = value.to(tl.uint32, bitcast=True)
        finite = (raw & 0x7F800000) != 0x7F800000
        value = (tl.where(finite, raw + (bits & 0xFFFF), raw) >> 16).to(tl.uint16)
    if WHOLE:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=offsets < size)


@triton.jit
def _update(w_at, g_at, m_at, v_at, size, offsets, numbers, seeds, WHOLE: tl.constexpr, BF16: tl.constexpr):
    """`pipelines.training.adamw.update` of one chunk."""
    rate, root, kept = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    new1, new2, eps, scale = tl.load(numbers + 3), tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6)
    g = _read(g_at, size, offsets, WHOLE, True) * scale
    m = _read(m_at, size, offsets, WHOLE, BF16)
    v = _read(v_at, size, offsets, WHOLE, BF16)
    m += (g - m) * new1
    v += (g * g - v) * new2
    w = _read(w_at, size, offsets, WHOLE, True) * kept - rate * m / (tl.sqrt(v) * root + eps)
    # `rounding.random_bits`
    x = (offsets + tl.load(seeds + 1)).to(tl.uint32, bitcast=True) ^ tl.load(seeds).to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    bits = x ^ (x >> 15)
    _write(w_at, size, offsets, w, bits, WHOLE, True)
    _write(m_at, size, offsets, m, bits >> 16, WHOLE, BF16)
    _write(v_at, size, offsets, v, (bits * 0x2C1B3C6D) >> 16, WHOLE, BF16)


@triton.jit
def _adamw(addresses, owner, number, numbers, seeds, BF16: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    who = tl.load(owner + tl.program_id(0)).to(tl.int64)
    numbers += who * 8
    seeds += who * 2
    if tl.load(numbers + 7) > 0:
        row = addresses + who * 5
        size = tl.load(row + 4).to(tl.int32)
        first = tl.load(number + tl.program_id(0)) * CHUNK
        offsets = first + tl.arange(0, CHUNK)
        w_at, g_at = _pointers(tl.load(row), offsets, True, ALIGNED), _pointers(tl.load(row + 1), offsets, True, ALIGNED)
        m_at, v_at = _pointers(tl.load(row + 2), offsets, BF16, ALIGNED), _pointers(tl.load(row + 3), offsets, BF16, ALIGNED)
        if first + CHUNK <= size:
            _update(w_at, g_at, m_at, v_at, size, offsets, numbers, seeds, True, BF16)
        else:
            _update(w_at, g_at, m_at, v_at, size, offsets, numbers, seeds, False, BF16)


@triton.jit
def _squares(addresses, owner, number, sums, BF16: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    who = tl.load(owner + tl.program_id(0)).to(tl.int64)
    size = tl.load(addresses + who * 2 + 1).to(tl.int32)
    first = tl.load(number + tl.program_id(0)) * CHUNK
    offsets = first + tl.arange(0, CHUNK)
    at = _pointers(tl.load(addresses + who * 2), offsets, BF16, ALIGNED)
    if first + CHUNK <= size:
        x = _read(at, size, offsets, True, BF16)
    else:
        x = _read(at, size, offsets, False, BF16)
    tl.store(sums + tl.program_id(0), tl.sum(x * x, 0))
