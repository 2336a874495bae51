"""The models' benchmark scripts run (on tiny models; what they measure is for a GPU), and an export's processor agrees with ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "lines"),
    [
        ("he_molmo.py", ["--batch", "1", "--repeats", "1"], 5),
        ("molmo2_parity.py", [], 9),
        ("decode.py", ["--rounds", "1", "--compare", "--peer"], 10),
        ("token_gaps.py", [], 7),
        ("train_step.py", ["--steps", "2"], 5),
        ("flex_attention.py", ["--sweep"], 12),
    ],
)
def test_script_runs(script: str, arguments: list[str], lines: int) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--tiny", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == lines
    measured = {
        "he_molmo.py": "tflop",
        "molmo2_parity.py": "error",
        "decode.py": "decode_tokens_s",
        "token_gaps.py": "tokens_s",
        "train_step.py": "tokens_s",
        "flex_attention.py": "error",
    }[script]
    values = [row[measured] for row in rows[1:] if measured in row]
    assert len(values) >= 1
    assert all(value < 1e-5 for value in values) if measured == "error" else all(value > 0 for value in values)


@pytest.mark.slow
def test_pointing_by_choosing_and_by_spelling(tmp_path: Path) -> None:
    """Two steps of each variant; what labels can reach is known without training."""
    script = [sys.executable, str(ROOT / "benchmarks/molmo_point.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*script, "prepare", str(tmp_path), "--limit", "30"], check=True, env=environment)
    compare = [*script, "compare", str(tmp_path), "--seeds", "0", "--limit", "4", "--device", "cpu", "--set", "steps=2"]
    output = subprocess.run(compare, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    rows = [json.loads(line) for line in output if line.startswith("{")]
    possible = {row["variant"]: row["possible"] for row in rows if "possible" in row}
    assert possible.keys() == {"demo", "spelled", "chosen"}
    assert all(found["within_5%"] == 1 for found in possible.values())
    assert possible["chosen"]["within_1%"] < 1, "a cell is 2 % of the width"
    assert len([line for line in output if line.startswith("| ")]) == 4


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / ".venv-peers").is_dir(), reason="transformers' processors need torchvision (benchmarks/requirements-peers.txt)"
)
def test_transformers_processor_of_an_export() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "exported_processors.py")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stdout + result.stderr
    prompts = [json.loads(line) for line in result.stdout.splitlines()][1:]
    assert {"text", "four images", "video"} <= {prompt["prompt"] for prompt in prompts}
    assert all(prompt["agrees"] for prompt in prompts)
