"""Where the time of a decoding step goes on a GPU: its kernels by kind, and the time between them."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.autograd import DeviceType

from molmo_core.generation.engine.engine import Engine
from molmo_core.generation.engine.requests import Request

STEPS = 20


def profile(engine: Engine, requests: list[Request]) -> dict[str, Any]:
    """Microseconds of a step of these requests: `wall` without the profiler, `kernels` in all and by name, `idle` between them, and `host`,
    the time in `Engine.step` without waiting for the device (the profiler's own cost included)."""
    for request in requests:
        engine.add(request)
    while engine.scheduler.waiting or any(sequence.count < 2 for sequence in engine.scheduler.running):
        engine.step()
    wall = _timed(engine)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as record:
        _timed(engine)
    for request in requests:
        engine.abort(request)
    while engine.active:
        engine.step()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in record.events()
        if event.device_type == DeviceType.CUDA and not event.name.startswith("## ")
    )
    by_name: dict[str, list[float]] = {}
    idle, last = 0.0, spans[0][0]
    for start, end, name in spans:
        by_name.setdefault(name, []).append(end - start)
        idle += max(0.0, start - last)
        last = max(last, end)
    kernels = sorted(((sum(times), len(times), name) for name, times in by_name.items()), reverse=True)
    waits = sum(event.cpu_time_total for event in record.key_averages() if "Synchronize" in event.key)
    return {
        "batch": len(requests), "wall_us": round(wall), "kernels_us": round(sum(total for total, *_ in kernels) / STEPS),
        "idle_us": round(idle / STEPS), "span_us": round((last - spans[0][0]) / STEPS), "waits_us": round(waits / STEPS),
        "launches": round(len(spans) / STEPS),
        "by_name": [[name[:70], round(total / STEPS, 1), round(count / STEPS, 1)] for total, count, name in kernels[:24]],
    }  # fmt: skip


def _timed(engine: Engine) -> float:
    """Microseconds of a step."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS * 1e6
