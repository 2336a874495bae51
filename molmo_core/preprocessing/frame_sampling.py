"""Which frames of a video the model sees. Pure functions of counts and times.

Modes of the published code, on frame numbers (VideoOlmo): `uniform`, `fps`, `fps_uniform`; on times (Molmo2):
`uniform_last_frame`. Modes of the models API: `random` and `adaptive`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from molmo_core.preprocessing.configs import FrameSampling

CANDIDATE_FPS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
ADAPTIVE_CANDIDATES = 4
"""`adaptive` looks at this many times more frames than it takes."""

_EPSILON = 1e-4  # seconds; times in files are rounded


class FrameSample(NamedTuple):
    """The chosen frames."""

    indices: np.ndarray
    """int64 [T], ascending; `uniform` repeats frames of a video that has fewer than asked for."""
    times: np.ndarray
    """float64 [T], seconds."""
    sampling_fps: float | None
    """The rate at which `fps` and `fps_uniform` took them; None = no fixed rate."""


def sample_frames(
    mode: FrameSampling,
    timestamps: np.ndarray,
    fps: float,
    max_frames: int,
    *,
    max_fps: float = 2.0,
    candidate_fps: Sequence[float] = CANDIDATE_FPS,
    rng: np.random.RandomState | None = None,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
) -> FrameSample:
    """Chooses at most `max_frames` frames.

    Args:
        mode: see the functions of this module.
        timestamps: float64 [n], when each frame is shown, ascending.
        fps: average rate of the video.
        max_fps: rate limit of `uniform_last_frame`.
        candidate_fps: rates that `fps` and `fps_uniform` try, ascending.
        rng: for `random`; None, as at inference, gives what `uniform` gives.
        change: for `adaptive`: from frame numbers [m] to how much each differs from the one before it, float [m].

    Returns:
        The frames, with the times at which they are shown.
    """
    n = len(timestamps)
    if n < 1 or max_frames < 1:
        raise ValueError(f"cannot choose at most {max_frames} of {n} frames")
    sampling_fps = None
    if mode == "uniform_last_frame":
        indices = by_time(timestamps, max_frames, max_fps)
    elif mode == "random" and rng is not None:
        indices = np.sort(rng.choice(n, min(n, max_frames), replace=False)).astype(np.int64)
    elif mode == "adaptive":
        if change is None:
            raise ValueError("adaptive sampling needs the change between frames")
        candidates = np.unique(np.linspace(0, n - 1, min(n, ADAPTIVE_CANDIDATES * max_frames)).round().astype(np.int64))
        indices = candidates if len(candidates) <= max_frames else candidates[by_change(change(candidates), max_frames)]
    else:
        indices, _, sampling_fps = by_rate(mode, n, fps, max_frames, candidate_fps)
    return FrameSample(indices, timestamps[indices], sampling_fps)


def by_rate(mode: FrameSampling, n: int, fps: float, max_frames: int, candidate_fps: Sequence[float] = CANDIDATE_FPS) -> FrameSample:
    """The modes of VideoOlmo.

    `fps` takes the highest candidate rate that gives at most `max_frames` frames, or the lowest one, cut off, if none does;
    `fps_uniform` spreads `max_frames` over the whole video instead of cutting it off; `uniform` always does that.

    Returns:
        `times` are nominal: frame number / whole frames a second, as the published code computes them. `sample_frames` gives
        the true ones.
    """
    step = rate = count = None
    for candidate in () if mode in ("uniform", "random") else candidate_fps:
        candidate_step = max(int(fps / candidate), 1)
        frames = int(n / candidate_step)
        if count is None:
            if mode == "fps_uniform" and frames > max_frames:
                break
        elif frames > max_frames or frames <= count:
            continue
        step, rate, count = candidate_step, candidate, frames
    position = np.linspace(0, n, max_frames, endpoint=False) if step is None else np.arange(0, n, step)[:max_frames].astype(np.float64)
    return FrameSample(position.astype(np.int64), position / max(int(fps), 1), rate)


def by_time(timestamps: np.ndarray, max_frames: int, max_fps: float) -> np.ndarray:
    """Molmo2's `uniform_last_frame`: one frame every 1/max_fps seconds and the last one; of long videos `max_frames`, evenly spread.

    Returns:
        int64 [T]: the frames shown at these times.
    """
    end = timestamps[-1]
    if (max_frames - 1) / max_fps < end:
        times = np.linspace(0, end, max_frames)
    else:
        times = np.append(np.arange(0, end - _EPSILON, 1 / max_fps), end)
    return np.maximum(np.searchsorted(timestamps, times + _EPSILON, side="right") - 1, 0)


def by_change(change: np.ndarray, count: int) -> np.ndarray:
    """Spends frames where the picture changes.

    Every candidate gets a share of the `count` frames: one half of them is shared out equally, the other half in proportion to
    the change since the previous candidate, and no candidate gets more than one (what is left over goes to the others). Walking
    along the video, a frame is taken whenever the shares add up to the next whole number. So a cut is always seen, motion is
    seen more often than rest, and a video in which nothing or everything changes is sampled evenly.

    Args:
        change: float [n] >= 0; that of the first candidate is ignored, it is always taken.
        count: frames to take, at most n.

    Returns:
        int64 [count] candidates, ascending.
    """
    weight = np.array(change, np.float64)
    weight[0] = 0
    largest = weight.max()
    weight = weight / largest if largest else np.ones(len(weight))  # only proportions count; sums of tiny changes would vanish
    weight += weight.mean()
    share = np.zeros(len(weight))
    full = np.zeros(len(weight), bool)
    full[0] = True
    while True:  # at most n rounds; two or three in practice
        share[full] = 1.0
        share[~full] = weight[~full] * ((count - full.sum()) / max(weight[~full].sum(), 1e-300))
        over = ~full & (share >= 1.0)
        if not over.any():
            break
        full |= over
    boundaries = np.cumsum(share)
    return np.searchsorted(boundaries, np.arange(count) + 0.5, side="left").clip(max=len(weight) - 1)
