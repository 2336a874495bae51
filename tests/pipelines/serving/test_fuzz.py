"""The fuzzer's short run: malformed requests and media harm nobody."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent.parent


@pytest.mark.alone
@pytest.mark.slow
def test_malformed_requests_harm_nobody():
    command = [sys.executable, str(ROOT / "benchmarks/serve_fuzz.py"), "--requests", "400"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=550)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["requests"] == 400
    assert report["neighbour"]["asked"] > 1
    for kind in ("described", "changed", "media", "bytes"):
        assert report["statuses"][kind]["200"] + report["statuses"][kind]["400"] > 50, kind
