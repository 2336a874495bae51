"""Frame sampling against the published code and by its rules."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_core.preprocessing.frame_sampling import by_change, by_rate, by_time, sample_frames


def test_published_modes(golden: Path) -> None:
    cases = json.loads((golden / "video-olmo" / "frame_sampling.json").read_text())
    assert len(cases) == 144
    for case in cases:
        sample = by_rate(case["mode"], case["total_frames"], case["video_fps"], case["max_frames"])
        assert sample.indices.tolist() == case["indices"], case
        np.testing.assert_allclose(sample.times, case["times"], atol=6e-6)
        assert sample.sampling_fps == case["sampling_fps"]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["uniform", "random", "adaptive", "fps", "fps_uniform", "uniform_last_frame"]),
    st.lists(st.floats(0.01, 3), min_size=0, max_size=80),
    st.integers(1, 24),
    st.floats(0.3, 8),
    st.integers(0, 99),
)
def test_every_mode(mode: str, gaps: list[float], max_frames: int, max_fps: float, seed: int) -> None:
    timestamps = np.concatenate([[0], np.cumsum(gaps)])
    n = len(timestamps)
    fps = (n - 1) / timestamps[-1] if n > 1 else 1.0
    rng = np.random.RandomState(seed)
    change = np.random.RandomState(seed + 1).rand(10_000)
    sample = sample_frames(mode, timestamps, fps, max_frames, max_fps=max_fps, rng=rng, change=lambda i: change[i])
    assert 1 <= len(sample.indices) <= max_frames
    assert (np.diff(sample.indices) >= 0).all()
    assert sample.indices.min() >= 0
    assert sample.indices.max() < n
    np.testing.assert_array_equal(sample.times, timestamps[sample.indices])
    if mode in ("random", "adaptive"):
        assert len(np.unique(sample.indices)) == len(sample.indices) == min(n, max_frames)
    if mode == "uniform_last_frame" and max_frames > 1:
        assert sample.indices[0] == 0
        assert sample.indices[-1] == n - 1
        if (max_frames - 1) / max_fps >= timestamps[-1]:
            assert np.diff(sample.times).max(initial=0) <= 1 / max_fps + max(gaps, default=0)


def test_times_not_rates() -> None:
    """Half of the frames in the first second, the other half in the next nine: time decides."""
    timestamps = np.concatenate([np.linspace(0, 1, 50, endpoint=False), np.linspace(1, 10, 51)])
    chosen = timestamps[by_time(timestamps, 11, 1.0)]
    np.testing.assert_allclose(chosen, np.arange(11), atol=0.2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 255), min_size=1, max_size=100), st.data())
def test_by_change(change: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(change)))
    chosen = by_change(np.array(change), count)
    assert len(chosen) == count
    assert chosen[0] == 0
    assert (np.diff(chosen) > 0).all()
    assert chosen[-1] < len(change)


def test_by_change_takes_cuts_and_spreads_the_rest() -> None:
    still = by_change(np.zeros(64), 16)
    assert np.diff(still).max() <= 5  # 4 apart, but for the first one that is always taken
    cuts = np.zeros(64)
    cuts[[13, 37, 50]] = 80
    assert {0, 13, 37, 50} <= set(by_change(cuts, 16).tolist())
    moving = np.zeros(64)
    moving[32:48] = 10
    chosen = by_change(moving, 16)
    assert ((chosen >= 32) & (chosen < 48)).sum() >= 9
    assert (chosen < 32).sum() >= 3


def test_by_change_counts_proportions_only() -> None:
    change = np.array([5.0, 0, 1, 30, 2, 0, 0, 7])
    for scale in (1e-308, 1e-3, 1e300):
        np.testing.assert_array_equal(by_change(change * scale, 4), by_change(change, 4))
    np.testing.assert_array_equal(by_change(np.array([0, 0, 1.1125369292536007e-308]), 3), [0, 1, 2])


def test_what_cannot_be_sampled() -> None:
    with pytest.raises(ValueError, match="at most 0 of 3"):
        sample_frames("uniform", np.arange(3.0), 1, 0)
    with pytest.raises(ValueError, match="adaptive"):
        sample_frames("adaptive", np.arange(3.0), 1, 2)
