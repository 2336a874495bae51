"""One of lmms-eval's tasks on questions made here, both ways: its own process with our engine, and its client at our server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from pipelines import cluster
from pipelines.serving.app import serving
from pipelines.serving.config import ServeConfig
from pipelines.serving.port import free_port

ROOT = Path(__file__).parents[3]
INSTALLED = Path(sys.prefix) / "lmms-eval"
QUESTIONS = 8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED.is_dir(), reason=f"{INSTALLED} is missing (benchmarks/requirements-lmms-eval.txt)"),
]


@pytest.fixture(scope="module")
def task(tiny_model, tmp_path_factory):
    """RealWorldQA with questions whose answers are what the model says, but for every other one; one is too long for the model."""
    folder, random = tmp_path_factory.mktemp("task"), np.random.RandomState(0)
    preprocess = tiny_model.config.build_preprocessor(for_inference=True, is_training=False)
    collate = tiny_model.config.build_collator(None, None)
    rows = []
    for number in range(QUESTIONS):
        picture = Image.fromarray(random.randint(0, 255, (64, 64, 3), np.uint8))
        question = f"What is shape number {number}?"
        prompt = preprocess({"images": [picture], "messages": [{"role": "user", "content": question}], "placeholders": False})
        said = tiny_model.generate(**collate([prompt]), max_new_tokens=16).text[0].lower().strip().rstrip(".")
        rows.append({"image": picture, "question": question, "answer": said if number % 2 else f"not {said}"})
    rows.append({"image": picture, "question": "why " * tiny_model.config.llm.max_sequence_length, "answer": "because"})
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(folder / "test.parquet")
    lines = [
        f"include: {INSTALLED}/lmms_eval/tasks/realworldqa/realworldqa.yaml",
        "task: ours",
        "dataset_path: parquet",
        f"dataset_kwargs: {{data_files: {{test: {folder}/test.parquet}}}}",
    ]
    (folder / "ours.yaml").write_text("\n".join(lines))
    return folder


def run(task, out, *arguments):
    """Score, and the answers in order."""
    command = [sys.executable, "-m", "lmms_eval", "--tasks", "ours", "--include_path", str(task), "--batch_size", "1"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(task / "hf")}
    done = subprocess.run(
        [*command, "--log_samples", "--output_path", str(out), *arguments],
        env={**os.environ, **offline, "PYTHONPATH": f"{INSTALLED}:{ROOT}"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (scores,) = out.rglob("*_results.json")
    (samples,) = out.rglob("*_samples_ours.jsonl")
    answers = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(scores.read_text())["results"]["ours"]["exact_match,none"], [
        one["filtered_resps"] for one in sorted(answers, key=lambda one: one["doc_id"])
    ]


def test_both_ways_give_the_same(task, tiny_checkpoint, tmp_path):
    ours, answers = run(task, tmp_path / "engine", "--model", "molmo", "--model_args", f"model={tiny_checkpoint}")
    assert ours == pytest.approx(QUESTIONS / 2 / (QUESTIONS + 1))
    assert answers[-1].startswith("[LMMS_EVAL_REQUEST_FAILED] the prompt is")
    assert len(set(answers)) == QUESTIONS + 1

    config = ServeConfig(model=str(tiny_checkpoint), name="tiny", port=free_port())
    with cluster.connect(num_cpus=2, object_store_memory=256 << 20), serving(config) as address:
        client = f"model_version=tiny,base_url={address}/v1,api_key=none,num_cpus=2,max_retries=1"
        served, told = run(task, tmp_path / "server", "--model", "async_openai", "--model_args", client)
    assert served == ours
    assert told[:-1] == answers[:-1]
    assert told[-1].startswith("[LMMS_EVAL_REQUEST_FAILED")
