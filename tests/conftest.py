"""Shared fixtures. Tests run on one thread a process, so that timings and results do not depend on the machine."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """Inputs, tiny weights and outputs of the published implementations (tests/golden/README.md)."""
    return Path(__file__).parent / "golden"
