"""The service's benchmark scripts run; what the chaos must never show is checked here, too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.alone]


def lines(command_line: str) -> list[dict]:
    script, *arguments = command_line.split()
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]  # Ray tells of those who were killed


def test_load():
    first, line = lines("serve_load.py --tiny --alone --streams 2 --new 60 --rounds 1 --frontends 1 --clients 1")
    assert first["tiny"]
    assert line["streams"] == 2
    assert line["decode_tokens_s"] > 0
    assert line["share"] > 0
    assert set(line["cpu_ms_token"]) == {"frontends", "proxies", "replicas"}


def test_chaos():
    (result,) = lines("serve_chaos.py --requests 100 --concurrent 16 --kill-every 3")
    assert result["requests"] == 100, "none is lost from the count"
    assert result["distinct_answers"] > 20
    assert set(result["whole"]) == {"right"}
    assert set(result["streamed"]) <= {"right", "error event"}
    assert not [what for what in result["retried"] if what.startswith("500")], "the server itself asks again"
