"""benchmarks/scaling.py at tiny size on CPUs: through Ray and in plain processes, the same losses on any number of workers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.slow


def lines(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks/scaling.py"), "--device", "cpu", "--steps", "6", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")][1:]


def test_plain_processes():
    found = lines("--launcher", "spawn", "--workers", "1", "2", "--parts", "step", "context", "equal")
    assert [(line["part"], line["workers"]) for line in found] == [
        ("step", 1), ("equal", 1), ("step", 2), ("context", 2), ("equal", 2),
    ]  # fmt: skip
    assert [line["mesh"] for line in found if "mesh" in line] == [[1, 1, 1], [1, 2, 1], [1, 1, 2]]
    assert found[-1]["difference"] < 1e-4
    assert len(set(found[-1]["losses"])) > 10


def test_through_ray():
    (equal,) = lines("--workers", "2", "--parts", "equal")
    assert len(equal["losses"]) == 20
