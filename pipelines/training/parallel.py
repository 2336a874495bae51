"""What the ranks of a run tell each other, on gloo and CPUs as on NCCL and GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from pipelines.training.config import Precision

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def autocast(precision: Precision, device: torch.device) -> Iterator[None]:
    """bfloat16 arithmetic for `amp_bf16`, else nothing."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "amp_bf16"):
        yield


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of all ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def first(make: Callable[[], T]) -> T:
    """What the first rank makes, on all ranks."""
    values = [make() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


def together(act: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """What `act` gives on each rank; if it fails on one, all raise its error."""
    result: T | None = None
    problem: Exception | None = None
    try:
        result = act()
    except Exception as error:
        problem = error
    both = gathered((result, problem), group)
    for _, failed in both:
        if failed is not None:
            raise failed
    return [value for value, _ in both]  # type: ignore[misc]
